"""Running mean and spread of a stream, so that features and rewards are standardised over time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_FORGETTING = 3.0
"""Of t observations, the s-th counts in proportion to about (s / t)^3: the recent quarter of the
run dominates, so that the large losses and gradients of the first steps do not set the scale for
ever. 0 would be the plain average."""

_MIN_RELATIVE_SPREAD = 1e-5
"""A feature that varies by less than this share of its mean counts as constant: float32 rounding
must not be blown up to unit variance."""


class RunningMoments:
    """Mean and variance of vectors, averaged with polynomial decay (Shamir & Zhang 2013)."""

    def __init__(self, size: int, as_they_are: int = 0) -> None:
        """The last ``as_they_are`` features have a scale already: they are but clipped."""
        self.count = 0
        self._scaled = size - as_they_are
        self.mean = np.zeros(size)
        self.variance = np.zeros(size)
        self._refresh()

    def update(self, value: np.ndarray, inner_variance: float = 0.0) -> None:
        """Take in one ``value`` [size].

        Args:
            value: the observation.
            inner_variance: where the value is itself a mean, the variance of what it averages.
        """
        self.count += 1
        rate = (1.0 + _FORGETTING) / (self.count + _FORGETTING)
        difference = value - self.mean
        self.mean += rate * difference
        self.variance += rate * difference * difference
        self.variance *= 1.0 - rate
        self.variance += rate * inner_variance
        self._refresh()

    def standardize(self, values: Tensor, clip: float) -> Tensor:
        """``values`` [..., size] in units of spread around the mean, within [-clip, clip]."""
        return ((values - self._shift) * self._inverse_spread).clamp_(-clip, clip)

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to continue bit for bit."""
        return {
            "count": self.count,
            "mean": torch.from_numpy(self.mean.copy()),
            "variance": torch.from_numpy(self.variance.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            ValueError: if the saved moments are of another size.
        """
        if len(state["mean"]) != len(self.mean):
            raise ValueError(
                f"the saved moments are of {len(state['mean'])} features, this policy has "
                f"{len(self.mean)}; keep the domains and alignment.num_probes of the saved run"
            )
        self.count = state["count"]
        self.mean = state["mean"].numpy().copy()
        self.variance = state["variance"].numpy().copy()
        self._refresh()

    def _refresh(self) -> None:
        spread = np.maximum(np.sqrt(self.variance), 1e-30)
        spread = np.maximum(spread, _MIN_RELATIVE_SPREAD * np.abs(self.mean))
        shift, inverse = self.mean.astype(np.float32), (1.0 / spread).astype(np.float32)
        shift[self._scaled :], inverse[self._scaled :] = 0.0, 1.0
        self._shift, self._inverse_spread = torch.from_numpy(shift), torch.from_numpy(inverse)
