"""What mixture next? Policies that turn a step's measurements into domain weights."""

from megatron_acodm.mixing.controller import MixingController
from megatron_acodm.mixing.observation import Observation
from megatron_acodm.mixing.policy import Policy
from megatron_acodm.mixing.registry import POLICIES, build_policy
from megatron_acodm.mixing.serialization import load_state, save_state

__all__ = [
    "POLICIES",
    "MixingController",
    "Observation",
    "Policy",
    "build_policy",
    "load_state",
    "save_state",
]
