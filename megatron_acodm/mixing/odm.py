"""Policy ``odm``: a bandit that draws more from the domains with the higher loss."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch

from megatron_acodm.config import MixingConfig
from megatron_acodm.mixing.observation import Observation
from megatron_acodm.mixing.policy import Policy, Setting
from megatron_acodm.mixing.rails import masked, rails, restricted

_MAX_LOSS = 50.0
"""Nats beyond which a loss is a fault, not a reward to exponentiate."""


class OdmPolicy(Policy):
    """Efficient Online Data Mixing (Albalak et al. 2023, arXiv 2312.02406).

    Exp3 with a moving average in place of the sum of rewards. With K domains that can be drawn,

        e_t = min(1/K, sqrt(ln K / (K t)))
        weight_i(t) = (1 - K e_t) S_i / sum_j S_j + e_t
        R_i <- alpha R_i + (1 - alpha) r_i,  for each domain drawn in a step; 0 at first

    The authors describe and publish two rules for the score S and the reward r:

    - ``code`` (alon-albalak/online-data-mixing, ``SmoothedMeanWeightUpdater``): r_i = exp(loss_i),
      S_i = R_i. The weights of their 1B run, kept beside the code, are such: Pile-CC 0.089, Github
      0.016 of 22 domains.
    - ``paper`` (algorithm 1): r_i = loss_i / weight_i, S_i = exp(e_{t-1} R_i). As e_t falls this
      becomes uniform; after 100,000 steps no weight is far from 1/22.

    Through the warm-up the initial weights hold and nothing is learned. A step draws several
    domains at once, and some of them often: loss_i is the mean over what the step drew of domain i,
    as in the authors' trainer, so that R does not grow with the batch. The weight that it is
    divided by is the one that drew the step, which with a decision lag is not the last decided.
    """

    name: ClassVar[str] = "odm"

    def __init__(self, config: MixingConfig, setting: Setting) -> None:
        """Raises ValueError for bounds that leave no mixture."""
        self.setting = setting
        self.config = config.odm
        self.bounds, prior = rails(config, setting, min_weight=0.0)  # e_t is the paper's floor
        self.initial_weights = self.bounds.project(prior)
        self._warmup = round(self.config.warmup_fraction * setting.train_iters)
        self._rewards = np.zeros(len(setting.domains))

    def decide(self, observation: Observation) -> np.ndarray:
        """Learn from one step's losses; weights [K] for the next undecided one."""
        if observation.iteration <= self._warmup:
            return masked(self.initial_weights, self.bounds)
        drawn = np.isfinite(observation.loss) & (observation.weights > 0.0)
        loss = observation.loss[drawn]
        if self.config.rule == "code":
            reward = np.exp(np.minimum(loss, _MAX_LOSS))
        else:
            reward = loss / observation.weights[drawn]
        alpha = self.config.smoothing
        self._rewards[drawn] = alpha * self._rewards[drawn] + (1.0 - alpha) * reward
        return masked(self._mixture(observation.iteration + 1), self.bounds)

    def restrict(self, available: np.ndarray) -> None:
        """From now on K counts the available domains."""
        self.bounds = restricted(self.bounds, available)

    @property
    def rewards(self) -> np.ndarray:
        """[K] moving averages R; nan for a domain never measured."""
        return np.where(self._rewards > 0.0, self._rewards, np.nan)

    def state_dict(self) -> dict[str, Any]:
        """The rewards, and when the warm-up ends, whatever the length of the run is by then."""
        return {"rewards": torch.from_numpy(self._rewards.copy()), "warmup": self._warmup}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._rewards = state["rewards"].numpy().copy()
        self._warmup = state["warmup"]

    def _mixture(self, step: int) -> np.ndarray:
        """Weights [K] of ``step`` (2 or later), 0 for masked domains."""
        active = self.bounds.active
        count = int(active.sum())
        scores = self._rewards[active]
        if self.config.rule == "paper":
            exponents = exploration_rate(count, step - 1) * scores
            scores = np.exp(exponents - exponents.max())
        total = scores.sum()
        shares = scores / total if total > 0.0 else np.full(count, 1.0 / count)
        epsilon = exploration_rate(count, step)
        weights = np.zeros(len(active))
        weights[active] = (1.0 - count * epsilon) * shares + epsilon
        return weights


def exploration_rate(num_domains: int, step: int) -> float:
    """e_t = min(1/K, sqrt(ln K / (K t))): the least weight of a domain in step t >= 1."""
    return min(1.0 / num_domains, math.sqrt(math.log(num_domains) / (num_domains * step)))
