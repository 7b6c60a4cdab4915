"""A learned policy as files: what a proxy run leaves for the runs that it is to drive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_acodm.mixing.networks import Actor
from megatron_acodm.mixing.serialization import load_state, save_state
from megatron_acodm.mixing.simplex import Bounds
from megatron_acodm.mixing.state import state_size

_KIND = "megatron_acodm policy"

STATE_SCHEMA = (
    "samples losses slopes norms changes progress; own running moments; prior by objective; 2"
)
"""What the actor is shown, in order, and on which scale: see ``StateEncoder``.

Every run standardises its features over its own recent past, as the run did that the actor learned
in. So nothing of the proxy's scales has to fit the target's. The actor's prior is that of the
proxy's objective for the losses of the run that it drives.
"""


@dataclass(frozen=True)
class SavedPolicy:
    """An actor and what it takes to run it; K domains, D probes."""

    domains: list[str]  # K, in the order of every vector
    num_probes: int  # D
    objective: str  # which gives the actor its prior, from the losses of the run that it drives
    hidden_size: int
    num_layers: int
    min_weight: float  # of a domain that can be drawn
    max_weight: float
    prior: torch.Tensor  # [K] float64: the first mixture of the run that it learned in
    actor: dict[str, torch.Tensor]
    provenance: dict[str, Any]  # of that run, for people

    def build_actor(self, bounds: Bounds) -> Actor:
        """The actor, to choose within ``bounds``.

        Raises:
            ValueError: its weights do not fit its sizes.
        """
        size, prior = state_size(len(self.domains), self.num_probes), self.prior.numpy()
        with torch.random.fork_rng(devices=[]):  # the host's random numbers must not notice
            actor = Actor(size, self.hidden_size, self.num_layers, prior, bounds)
        try:
            actor.load_state_dict(self.actor)
        except RuntimeError as error:
            raise ValueError(f"the saved policy's actor does not fit its sizes: {error}") from error
        return actor.requires_grad_(False)


def save_policy(path: str | Path, policy: SavedPolicy) -> None:
    """Write ``<path>.safetensors`` and ``<path>.json``; either suffix of ``path`` is dropped."""
    save_state(_prefix(path), {"kind": _KIND, "schema": STATE_SCHEMA} | vars(policy))


def load_policy(path: str | Path) -> SavedPolicy:
    """Read what ``save_policy`` wrote; executes nothing of what it reads.

    Raises:
        ValueError: the files are missing or damaged, or hold something else.
    """
    state = load_state(_prefix(path))
    if state.pop("kind", None) != _KIND:
        raise ValueError(f"{path} is no policy saved with --acodm-save-policy")
    schema = state.pop("schema", None)
    if schema != STATE_SCHEMA:
        raise ValueError(
            f"{path} is of a policy that is shown {schema!r}; this version shows {STATE_SCHEMA!r}: "
            "use the version that saved it, or train the policy anew"
        )
    try:
        return SavedPolicy(**state)
    except TypeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _prefix(path: str | Path) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
