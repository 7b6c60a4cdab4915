"""Notices when a policy has collapsed: one domain gets nearly all the weight, step after step."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from megatron_acodm.config import MixingConfig
from megatron_acodm.mixing.policy import Policy
from megatron_acodm.mixing.rails import masked
from megatron_acodm.mixing.simplex import Bounds

logger = logging.getLogger(__name__)

_SHARE_OF_THE_WAY = 0.9
"""The default threshold lies this far from the uniform share to the most that floors leave."""


class CollapseDetector:
    """Watches a policy's decisions for one domain that stays above a threshold.

    A mixture that starts with a domain above the threshold is no collapse onto it: it was asked
    for. What bounds a collapse is the policy's floor, which every other domain keeps; the detector
    only says that it happened, and goes on saying so at every doubling of its length.

    Args:
        policy: whose decisions they are.
        config: with the threshold and the steps.
    """

    def __init__(self, policy: Policy, config: MixingConfig) -> None:
        self._policy = policy
        self._threshold = config.collapse_weight
        self._patience = config.collapse_steps
        self._domain = -1
        self._streak = 0

    @property
    def steps(self) -> int:
        """Decisions that the collapse has lasted for; 0 where there is none."""
        return self._streak if self._streak >= self._patience else 0

    def watch(self, iteration: int, weights: np.ndarray) -> None:
        """Take in the decision ``weights`` [K] that followed from step ``iteration``."""
        domain = self._dominant(weights)
        if domain != self._domain:
            if self.steps:
                logger.warning(
                    "step %d: the policy's collapse onto %s is over after %d steps",
                    iteration,
                    self._name(self._domain),
                    self.steps,
                )
            self._domain, self._streak = domain, 0
        if domain < 0:
            return
        self._streak += 1
        doublings, rest = divmod(self._streak, self._patience)
        if rest == 0 and doublings & (doublings - 1) == 0:
            self._report(iteration, float(weights[domain]))

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to continue."""
        return {"domain": self._domain, "streak": self._streak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._domain, self._streak = state["domain"], state["streak"]

    def _dominant(self, weights: np.ndarray) -> int:
        """The domain that the mixture has collapsed onto, or -1."""
        bounds = self._policy.bounds
        domain, threshold = int(np.argmax(weights)), self._limit(bounds)
        if weights[domain] <= threshold:
            return -1
        start = masked(self._policy.initial_weights, bounds)
        return -1 if start[domain] > threshold else domain

    def _limit(self, bounds: Bounds) -> float:
        """Weight above which a domain has the mixture to itself."""
        if self._threshold is not None:
            return self._threshold
        uniform = 1.0 / int(bounds.active.sum())
        highest = 1.0 - float(bounds.floor.sum() - bounds.floor.max())
        return uniform + _SHARE_OF_THE_WAY * (highest - uniform)

    def _name(self, domain: int) -> str:
        return self._policy.setting.domains[domain]

    def _report(self, iteration: int, weight: float) -> None:
        bounds = self._policy.bounds
        floor = float(bounds.floor.max())
        logger.warning(
            "POLICY %s HAS COLLAPSED at step %d: %s has had more than %.3g of the weight for %d "
            "steps, now %.3g. %s",
            self._policy.name,
            iteration,
            self._name(self._domain),
            self._limit(bounds),
            self._streak,
            weight,
            f"The floor keeps each other domain at {floor:.3g} or more; where that is too little, "
            "raise mixing.min_weight or lower mixing.max_weight"
            if floor > 0.0
            else "No floor holds the other domains: set mixing.min_weight or mixing.max_weight",
        )
