"""Fits the scaling law loss(n) = irreducible + beta n^-exponent to noisy losses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EXPONENTS = np.linspace(0.05, 0.8, 31)
"""The exponents tried: the range that ADO's published code bounds them to."""

MIN_POINTS = 10
"""Points that a law of three numbers is fitted to at least."""

_ITERATIONS = 10
_DELTA = 1e-3  # of the Huber loss on log(loss), as in ADO's published code


@dataclass(frozen=True)
class ScalingLaws:
    """The laws of K domains, each [K] float64; nan for a domain with too few points."""

    irreducible: np.ndarray
    """The loss that remains for n without end, in nats."""

    beta: np.ndarray
    """The reducible loss at n = 1, in nats."""

    exponent: np.ndarray

    def speed(self, n: float) -> np.ndarray:
        """-n dloss/dn [K] at n: how much the loss falls while n grows by a factor e, in nats."""
        return self.exponent * self.beta * n**-self.exponent


def fit_scaling_laws(n: np.ndarray, losses: np.ndarray) -> ScalingLaws:
    """The laws that fit best in the Huber loss of log(loss); deterministic.

    For a given exponent the law is linear in its two other numbers, so each of EXPONENTS is tried,
    and the two found by iteratively reweighted least squares with both kept at 0 or more.

    Args:
        n: [T] positive amounts of data.
        losses: [T, K] positive losses; nan where not measured.
    """
    known = np.isfinite(losses)
    best = np.full(losses.shape[1], np.inf)
    fitted = np.full((3, losses.shape[1]), np.nan)
    scale = float(n[-1])  # n^-exponent near 1, whatever n counts
    for exponent in EXPONENTS:
        x = ((n / scale) ** -exponent)[:, None]
        irreducible, beta, objective = _fit_linear(x, np.where(known, losses, 1.0), known)
        better = (objective < best) & (known.sum(axis=0) >= MIN_POINTS)
        best = np.where(better, objective, best)
        candidate = np.stack([irreducible, beta * scale**exponent, np.full_like(beta, exponent)])
        fitted = np.where(better, candidate, fitted)
    return ScalingLaws(*fitted)


def _fit_linear(
    x: np.ndarray, y: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset >= 0, slope >= 0 and Huber loss, each [K], of y [T, K] ~ offset + slope x [T, 1]."""
    log_y = np.log(y)
    per_log = known / y**2  # a small residual r of y is r / y of log y
    weights = per_log
    for _ in range(_ITERATIONS):
        total = np.maximum(weights.sum(axis=0), 1e-300)
        mean_x, mean_y = (weights * x).sum(axis=0) / total, (weights * y).sum(axis=0) / total
        variance = (weights * (x - mean_x) ** 2).sum(axis=0)
        covariance = (weights * (x - mean_x) * (y - mean_y)).sum(axis=0)
        slope = np.maximum(covariance, 0.0) / np.maximum(variance, 1e-300)
        offset = mean_y - slope * mean_x
        through_0 = (weights * x * y).sum(axis=0) / np.maximum((weights * x**2).sum(axis=0), 1e-300)
        slope = np.where(offset < 0.0, through_0, slope)
        offset = np.maximum(offset, 0.0)
        fit = np.maximum(offset + slope * x, 1e-300)  # 0 only where nothing was measured
        residual = np.where(known, np.abs(np.log(fit) - log_y), 0.0)
        weights = per_log / np.maximum(residual, _DELTA)
    quadratic = residual <= _DELTA
    huber = np.where(quadratic, 0.5 * residual**2, _DELTA * (residual - 0.5 * _DELTA))
    return offset, slope, huber.sum(axis=0)
