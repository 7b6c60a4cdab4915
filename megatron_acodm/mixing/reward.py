"""The reward: how well each domain's gradient serves the others, smoothed, and its weighted sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_acodm.mixing.moments import RunningMoments

REWARD_CLIP = 5.0
"""Largest standardised reward of a domain, in standard deviations."""


class RewardTracker:
    """Rewards of K domains, r_i <- xi r_i + (1 - xi) w_i, and the scalar r = sum_i a_i r_i.

    w_i is measured on *mean* gradients (or is the mean loss), so nothing is divided by the sampling
    probability here.
    The first measurement of a domain starts its average; a domain not drawn keeps its value, and
    xi^t takes the place of xi when it is measured t steps after the last time. So averages of all
    domains forget as fast: else one that is seldom drawn would keep the large alignments of the
    first steps, and be drawn for them.

    Rewards are standardised over time by two running moments that all domains share: the mean of
    sum_i a_i w_i, and the mean squared deviation of the w_i from it. So a step whose domains all
    align better earns more, which standardising across the domains of each step would hide, and
    sum_i a_i standardize(r)_i = standardize(r). The unit is the spread of single measurements, not
    that of their averages: where these are mostly noise, averaged rewards are small, and the less
    is made of them. Like the states, rewards are standardised when they are used: transitions of
    any age that meet in a replay batch share one scale.
    """

    def __init__(self, num_domains: int, smoothing: float) -> None:
        self.smoothing = smoothing
        self.moments = RunningMoments(1)
        self.rewards = np.full(num_domains, np.nan)
        """[K] float64 moving averages; nan until a domain is first measured."""
        self._elapsed = np.ones(num_domains, dtype=np.int64)  # steps since the last measurement
        self.scalar = float("nan")
        """r of the last step, raw; nan before the first."""

    def update(self, alignment: np.ndarray, weights: np.ndarray) -> Tensor:
        """Take in the alignments w [K] of a step that was drawn with ``weights`` [K].

        Returns:
            [K] float32 raw rewards. A domain never measured counts as having the (weighted) mean
            reward of the others.

        Raises:
            ValueError: if no domain that has weight was ever measured.
        """
        measured = ~np.isnan(alignment)
        kept = self.smoothing**self._elapsed
        rewards = np.where(
            np.isnan(self.rewards), alignment, kept * self.rewards + (1.0 - kept) * alignment
        )
        self.rewards = np.where(measured, rewards, self.rewards)
        self._elapsed = np.where(measured, 1, self._elapsed + 1)
        known = ~np.isnan(self.rewards)
        share = weights[known].sum()
        if not share > 0.0:
            raise ValueError("no domain with a positive weight has been measured yet")
        self.scalar = float(weights[known] @ self.rewards[known] / share)
        self._update_moments(alignment, np.where(measured, weights, 0.0))
        return torch.from_numpy(np.where(known, self.rewards, self.scalar)).float()

    def _update_moments(self, alignment: np.ndarray, weights: np.ndarray) -> None:
        drawn = weights > 0.0
        if not drawn.any():
            return
        share, single = weights[drawn] / weights[drawn].sum(), alignment[drawn]
        mean = float(share @ single)
        deviation = float(share @ (single - mean) ** 2)
        self.moments.update(np.array([mean], dtype=np.float32), inner_variance=deviation)

    def standardize(self, rewards: Tensor) -> Tensor:
        """Raw ``rewards`` [..., K] on the scale the critic sees, clipped."""
        return self.moments.standardize(rewards, REWARD_CLIP)

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to continue bit for bit."""
        return {
            "moments": self.moments.state_dict(),
            "rewards": torch.from_numpy(self.rewards.copy()),
            "elapsed": torch.from_numpy(self._elapsed.copy()),
            "scalar": self.scalar,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.moments.load_state_dict(state["moments"])
        self.rewards = state["rewards"].numpy().copy()
        self._elapsed = state["elapsed"].numpy().copy()
        self.scalar = state["scalar"]
