"""Policy ``pike``: draws more from domains with a large gradient and less from noisy ones."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from megatron_acodm.config import MixingConfig
from megatron_acodm.mixing.observation import Observation
from megatron_acodm.mixing.policy import Policy, Setting
from megatron_acodm.mixing.rails import masked, rails, restricted

_MIN_INTERVAL = 10
"""Steps between updates at least."""

_MIN_SPREAD = 1e-3
"""Relative spread of 1 / sequences below which a domain's counts tell nothing of its variance."""


class PikePolicy(Policy):
    """PiKE (Li et al. 2025, arXiv 2502.06244, algorithm 1).

    Every T0 steps, with L_k the loss of domain k and sigma_k^2 the variance of its gradient between
    sequences,

        weight_k <- weight_k exp(zeta_1 ||grad L_k||^2 - zeta_2 / 2 sigma_k^2),  then normalised

    Departures:

    - Both statistics are in units of their mean over the domains, in place of raw norms and of
      sigma_k^2 / b for a batch of b: the paper tunes zeta for each model, which a default cannot.
    - They are of the parameters that ``alignment`` selects, not of all.
    - A weight stops at a tenth of the uniform share by default: at 0 it could never rise again.
    - The variance is not measured but inferred. The mean gradient of b_k sequences has a squared
      norm of ||grad L_k||^2 + sigma_k^2 / b_k on average, so the T0 steps since the last update,
      which drew different b_k, give both by a line through squared norm over 1 / b_k, kept at 0 or
      more. A domain whose b_k did not change counts as having no variance, and its norm is that
      of the noisy gradient.
    """

    name: ClassVar[str] = "pike"
    needs_alignment: ClassVar[bool] = True

    def __init__(self, config: MixingConfig, setting: Setting) -> None:
        """Raises ValueError for bounds that leave no mixture."""
        self.setting = setting
        self.config = config.pike
        self.bounds, prior = rails(config, setting, 0.1 / int(setting.active.sum()))
        self.initial_weights = self.bounds.project(prior)
        self._interval = max(
            _MIN_INTERVAL, round(self.config.update_fraction * setting.train_iters)
        )
        self._next_update = self._interval
        self._weights = self.initial_weights
        self._gains = np.full(len(setting.domains), np.nan)
        self._sums = np.zeros((5, len(setting.domains)))  # of 1, x, y, x^2, xy: see gradient_noise

    def decide(self, observation: Observation) -> np.ndarray:
        """Learn from one step's gradients; weights [K] for the next undecided one."""
        assert observation.grad_sq_norm is not None  # comes with the alignments
        measured = np.isfinite(observation.grad_sq_norm) & (observation.samples > 0)
        x = 1.0 / np.maximum(observation.samples, 1)
        y = np.where(measured, observation.grad_sq_norm, 0.0)
        self._sums = self._sums + measured * np.stack([np.ones_like(x), x, y, x * x, x * y])
        if observation.iteration >= self._next_update:
            self._update()
            self._next_update = observation.iteration + self._interval
        self._weights = masked(self._weights, self.bounds)
        return self._weights

    def restrict(self, available: np.ndarray) -> None:
        """From now on only the available domains get weight."""
        self.bounds = restricted(self.bounds, available)

    @property
    def rewards(self) -> np.ndarray:
        """[K] what the last update added to each log weight, before normalising; nan: unknown."""
        return self._gains

    def state_dict(self) -> dict[str, Any]:
        """The weights, and the sums since their last update."""
        return {
            "next_update": self._next_update,
            "weights": torch.from_numpy(self._weights.copy()),
            "gains": torch.from_numpy(self._gains.copy()),
            "sums": torch.from_numpy(self._sums.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._next_update = state["next_update"]
        self._weights = state["weights"].numpy().copy()
        self._gains = state["gains"].numpy().copy()
        self._sums = state["sums"].numpy().copy()

    def _update(self) -> None:
        """The paper's step, from the sums since the last one; a domain not drawn gains the mean."""
        known = self.bounds.active & (self._sums[0] > 0)
        if known.any():
            sq_norm, variance = gradient_noise(self._sums[:, known])
            gains = self.config.norm_rate * _relative(sq_norm)
            gains -= self.config.variance_rate / 2.0 * _relative(variance)
            self._gains = np.full(len(known), np.nan)
            self._gains[known] = gains
            gains = np.where(known, self._gains, gains.mean())
            self._weights = masked(self._weights * np.exp(gains - gains.max()), self.bounds)
        self._sums = np.zeros_like(self._sums)


def gradient_noise(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """||grad L_k||^2 and sigma_k^2, [K] each, by least squares of y = ||grad L_k||^2 + sigma_k^2 x.

    Args:
        sums: [5, K] sums over steps of 1 (at least one step), x = 1 / sequences, y = squared norm
            of their mean gradient, x^2 and xy.
    """
    x, y, xx, xy = sums[1:] / sums[0]
    spread = xx - x * x
    tells = spread > (_MIN_SPREAD * x) ** 2
    slope = np.where(tells, (xy - x * y) / np.where(tells, spread, 1.0), 0.0)
    variance = np.clip(slope, 0.0, y / x)
    return y - variance * x, variance


def _relative(values: np.ndarray) -> np.ndarray:
    """``values`` in units of their mean; 0 where that is 0."""
    mean = values.mean()
    return values / mean if mean > 0.0 else np.zeros_like(values)
