"""What the online baselines share: their bounds, the mixture they start from, masking."""

from __future__ import annotations

import numpy as np

from megatron_acodm.config import MixingConfig
from megatron_acodm.mixing.policy import Setting
from megatron_acodm.mixing.simplex import Bounds, natural_weights, uniform_weights


def rails(config: MixingConfig, setting: Setting, min_weight: float) -> tuple[Bounds, np.ndarray]:
    """The bounds of a policy, and the prior [K]: the configured first mixture, not yet bounded.

    Args:
        config: whose ``min_weight``, if given, comes before the policy's.
        setting: of the run.
        min_weight: the policy's own; where K is large, half of the uniform share, if that is less.

    Raises:
        ValueError: if no mixture satisfies the bounds.
    """
    active = setting.active
    floor = config.min_weight
    if floor is None:  # to go below the lowest share would change nothing
        floor = max(min(min_weight, 0.5 / int(active.sum())), setting.lowest_share)
    natural = config.initial_weights == "natural"
    prior = natural_weights(setting.sizes) if natural else uniform_weights(active)
    return Bounds.build(active, floor, config.max_weight), prior


def restricted(bounds: Bounds, available: np.ndarray) -> Bounds:
    """``bounds`` with every domain masked that is not ``available`` [K] bool.

    The ceiling rises, and the floor falls, as far as fewer domains need it to.
    """
    share = 1.0 / int(available.sum())
    floor, ceiling = bounds.floor.max(), max(bounds.ceiling.max(), share)
    return Bounds.build(available, min(floor, share), ceiling)


def masked(weights: np.ndarray, bounds: Bounds) -> np.ndarray:
    """The mixture within ``bounds`` that gives what ``weights`` [K] gives to masked domains away.

    In proportion to the weights of the others.
    """
    kept = np.where(bounds.active, weights, 0.0)
    total = kept.sum()
    return bounds.project(kept / total if total > 0.0 else uniform_weights(bounds.active))
