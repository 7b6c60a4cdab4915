"""Mixtures: points of the simplex whose coordinates stay between a floor and a ceiling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bounds:
    """The mixtures a policy may choose: sum 1, floor <= weights <= ceiling.

    A masked domain has floor = ceiling = 0. Use ``build``, which checks that such mixtures exist.
    """

    floor: np.ndarray
    """[K] float64."""

    ceiling: np.ndarray
    """[K] float64."""

    @classmethod
    def build(cls, active: np.ndarray, min_weight: float, max_weight: float) -> Bounds:
        """Bounds with the same floor and ceiling for every active domain, 0 for the others.

        Args:
            active: [K] bool, False for a domain that must not be drawn.
            min_weight: lowest weight of an active domain.
            max_weight: highest weight of an active domain.

        Raises:
            ValueError: if no mixture satisfies the bounds.
        """
        count = int(active.sum())
        if count == 0:
            raise ValueError("no domain can be drawn: all are empty or masked; add data to one")
        if not 0.0 <= min_weight <= max_weight:
            raise ValueError(
                f"min_weight is {min_weight:g} and max_weight {max_weight:g}; "
                "they must satisfy 0 <= min_weight <= max_weight"
            )
        slack = 1e-9  # so that min_weight = 1/K is accepted whatever its rounding
        if min_weight * count > 1.0 + slack:
            raise ValueError(
                f"min_weight {min_weight:g} for {count} domains adds up to {min_weight * count:g}, "
                f"more than 1; lower min_weight to at most {1.0 / count:.6g}"
            )
        if max_weight * count < 1.0 - slack:
            raise ValueError(
                f"max_weight {max_weight:g} for {count} domains adds up to {max_weight * count:g}, "
                f"less than 1; raise max_weight to at least {1.0 / count:.6g}"
            )
        floor = np.where(active, min(min_weight, 1.0 / count), 0.0)
        ceiling = np.where(active, min(max(max_weight, 1.0 / count), 1.0), 0.0)
        return cls(floor, ceiling)

    @property
    def active(self) -> np.ndarray:
        """[K] bool: the domains that may be drawn."""
        return self.ceiling > 0.0

    def contains(self, weights: np.ndarray, tolerance: float = 1e-6) -> bool:
        """Whether ``weights`` [K] is such a mixture, up to ``tolerance`` per coordinate and sum."""
        return bool(
            abs(weights.sum() - 1.0) <= tolerance
            and np.all(weights >= self.floor - tolerance)
            and np.all(weights <= self.ceiling + tolerance)
        )

    def project(self, point: np.ndarray) -> np.ndarray:
        """The mixture nearest to ``point`` [K] in the Euclidean norm.

        It is clip(point - shift, floor, ceiling) for the one shift that makes the sum 1. The sum
        falls piecewise linearly as the shift grows, with a kink where a coordinate meets a bound:
        bisect over the kinks, then solve the linear piece. Exact; O(K log K).

        Raises:
            ValueError: if ``point`` holds a non-finite number.
        """
        point = np.asarray(point, dtype=np.float64)
        if not np.all(np.isfinite(point)):
            raise ValueError(f"cannot project {point.tolist()} onto the simplex: not finite")
        kinks = np.sort(np.concatenate([point - self.ceiling, point - self.floor]))

        def clipped(shift: float) -> np.ndarray:
            return np.minimum(np.maximum(point - shift, self.floor), self.ceiling)

        low, high = 0, len(kinks) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if clipped(kinks[middle]).sum() >= 1.0:
                low = middle
            else:
                high = middle
        excess, deficit = clipped(kinks[low]).sum() - 1.0, 1.0 - clipped(kinks[high]).sum()
        piece = excess + deficit
        fraction = excess / piece if piece > 0.0 else 0.0
        return clipped(kinks[low] + fraction * (kinks[high] - kinks[low]))


def natural_weights(sizes: np.ndarray) -> np.ndarray:
    """Weights in proportion to ``sizes`` [K]: every sequence is as likely as any other."""
    sizes = np.asarray(sizes, dtype=np.float64)
    return sizes / sizes.sum()


def uniform_weights(active: np.ndarray) -> np.ndarray:
    """Equal weights over the ``active`` [K] domains, 0 for the others."""
    return active / active.sum()


def entropy(weights: np.ndarray) -> float:
    """Entropy of ``weights`` [K] in nats: log K for uniform, 0 for a single domain."""
    positive = weights[weights > 0.0]
    return float(-(positive * np.log(positive)).sum())
