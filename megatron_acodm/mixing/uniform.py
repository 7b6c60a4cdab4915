"""Policy ``uniform``: the same weight for every domain, at every step."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from megatron_acodm.config import MixingConfig
from megatron_acodm.mixing.observation import Observation
from megatron_acodm.mixing.policy import Policy, Setting
from megatron_acodm.mixing.simplex import Bounds, uniform_weights


class UniformPolicy(Policy):
    """Draws from every domain that has data alike."""

    name: ClassVar[str] = "uniform"

    def __init__(self, config: MixingConfig, setting: Setting) -> None:
        self.setting = setting
        self.bounds = Bounds.build(setting.active, 0.0, 1.0)
        self.initial_weights = uniform_weights(setting.active)

    def decide(self, observation: Observation) -> np.ndarray:
        """1/K [K] over the domains that have data."""
        return self.initial_weights
