"""The policies by name."""

from __future__ import annotations

import numpy as np

from megatron_acodm.config import MixingConfig
from megatron_acodm.mixing.acodm import AcodmPolicy
from megatron_acodm.mixing.ado import AdoPolicy
from megatron_acodm.mixing.frozen import FrozenPolicy
from megatron_acodm.mixing.odm import OdmPolicy
from megatron_acodm.mixing.pike import PikePolicy
from megatron_acodm.mixing.policy import Policy, Setting
from megatron_acodm.mixing.static import StaticPolicy
from megatron_acodm.mixing.uniform import UniformPolicy

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        AcodmPolicy,
        StaticPolicy,
        UniformPolicy,
        FrozenPolicy,
        OdmPolicy,
        AdoPolicy,
        PikePolicy,
    )
}
"""Policy class by the name in ``mixing.policy``."""


def build_policy(
    config: MixingConfig,
    domains: list[str],
    sizes: np.ndarray,
    num_probes: int,
    train_iters: int,
    seed: int,
    lowest_share: float = 0.0,
) -> Policy:
    """Build the configured policy.

    Args:
        config: which policy, and its rails.
        domains: K names, in the order of every vector.
        sizes: [K] natural weights, on any scale: sequences per epoch; 0 masks a domain out.
        num_probes: D, the number of probed layers in an observation.
        train_iters: length of the run in optimizer steps.
        seed: seed of every random choice of the policy.
        lowest_share: share of a batch that every domain with a weight gets, however small that is.

    Raises:
        ValueError: if the config does not fit the domains.
    """
    setting = Setting(list(domains), np.asarray(sizes), num_probes, train_iters, seed, lowest_share)
    return POLICIES[config.policy](config, setting)
