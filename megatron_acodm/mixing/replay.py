"""Replay: the most recent transitions, in a ring buffer, the newer ones sampled more often."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Transitions(NamedTuple):
    """B transitions of S-dimensional states and K domains."""

    states: Tensor
    """[B, S]: before the step."""

    weights: Tensor
    """[B, K]: the action, the weights that drew the step's batch."""

    rewards: Tensor
    """[B, K]: each domain's reward; the step's scalar reward is their sum over the weights."""

    next_states: Tensor
    """[B, S]: after the step."""


class ReplayBuffer:
    """Up to ``capacity`` transitions in a preallocated float32 tensor; the oldest leave first.

    A sample's age is ``size * u ** recency`` for uniform u. Recency 1 is uniform sampling, under
    which a new transition waits for size / batch updates to be seen: as the buffer fills, the
    critic learns of the actor's mistakes ever later than the actor makes them. At recency 3, half
    of a batch comes from the newest eighth, whatever the size.
    """

    def __init__(
        self, capacity: int, state_size: int, num_domains: int, recency: float, seed: int
    ) -> None:
        self.capacity = capacity
        self.recency = recency
        self.size = 0
        self._next = 0
        self._widths = (state_size, num_domains, num_domains, state_size)
        self._rows = torch.zeros(capacity, sum(self._widths))
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, state: Tensor, weights: Tensor, rewards: Tensor, next_state: Tensor) -> None:
        """Store one transition: [S], [K], [K], [S]."""
        torch.cat([state, weights, rewards, next_state], out=self._rows[self._next])
        self._next = (self._next + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, batch_size: int) -> Transitions:
        """Draw ``batch_size`` of the stored transitions, with replacement."""
        uniform = torch.rand(batch_size, dtype=torch.float64, generator=self._generator).numpy()
        ages = (self.size * uniform**self.recency).astype(np.int64)
        indices = (self._next - 1 - ages) % self.capacity
        return self._parts(self._rows[torch.from_numpy(indices)])

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to continue bit for bit."""
        parts = self._parts(self._rows[: self.size])._asdict()
        return {
            "next": self._next,
            "generator": self._generator.get_state(),
            "transitions": {name: part.clone() for name, part in parts.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            ValueError: if the stored transitions do not fit this buffer.
        """
        saved = state["transitions"]
        parts = self._parts(self._rows)._asdict()
        for name, part in parts.items():
            size = len(saved[name])
            full = size == self.capacity
            if saved[name].shape[1:] != part.shape[1:] or not (full or state["next"] == size):
                raise ValueError(
                    f"the saved replay has {name} of shape {list(saved[name].shape)}, which does "
                    f"not fit a buffer of {list(part.shape)}; keep agent.replay_capacity, the "
                    "domains and alignment.num_probes of the saved run"
                )
        for name, part in parts.items():
            self.size = len(saved[name])
            part[: self.size] = saved[name]
        self._next = state["next"]
        self._generator.set_state(state["generator"])

    def _parts(self, rows: Tensor) -> Transitions:
        """Views of ``rows`` [N, S + K + K + S]."""
        return Transitions(*rows.split(self._widths, dim=-1))
