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
    - Both come from products with a moving average of the domain's gradient over earlier steps,
      whose noise is other: <g_k, m_k> stands for ||grad L_k||^2, and what ||g_k||^2 exceeds it by
      for sigma_k^2 / b_k, in a step with b_k sequences of the domain. The optimizer comes back from
      what it overshoots, so that the first is too low, and counts as 0 where it is negative.
    """

    name: ClassVar[str] = "pike"
    needs_alignment = True
    needs_affinity = True

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
        self._sums = np.zeros((3, len(setting.domains)))  # of 1, ||grad L_k||^2, sigma_k^2

    def decide(self, observation: Observation) -> np.ndarray:
        """Learn from one step's gradients; weights [K] for the next undecided one."""
        assert observation.grad_sq_norm is not None and observation.affinity is not None
        own = np.diagonal(observation.affinity)
        # 0 in the step that first draws a domain, before it has an average.
        measured = np.isfinite(own) & (observation.samples > 0) & (own != 0.0)
        sq_norm = np.where(measured, own, 0.0)
        noise = np.where(measured, observation.grad_sq_norm - sq_norm, 0.0)
        self._sums = self._sums + np.stack([measured, sq_norm, noise * observation.samples])
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
            sq_norm, variance = np.maximum(self._sums[1:, known] / self._sums[0, known], 0.0)
            gains = self.config.norm_rate * _relative(sq_norm)
            gains -= self.config.variance_rate / 2.0 * _relative(variance)
            self._gains = np.full(len(known), np.nan)
            self._gains[known] = gains
            gains = np.where(known, self._gains, gains.mean())
            self._weights = masked(self._weights * np.exp(gains - gains.max()), self.bounds)
        self._sums = np.zeros_like(self._sums)


def _relative(values: np.ndarray) -> np.ndarray:
    """``values`` in units of their mean; 0 where that is 0."""
    mean = values.mean()
    return values / mean if mean > 0.0 else np.zeros_like(values)
