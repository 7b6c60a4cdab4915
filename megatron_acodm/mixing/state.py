"""The agent's view of training: the state vector s = (n, l, dl, |w|, |dw|, t) of the paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_acodm.mixing.moments import RunningMoments
from megatron_acodm.mixing.observation import Observation

_CLIP = 5.0


def state_size(num_domains: int, num_probes: int) -> int:
    """Numbers in a state of K domains and D probes, 3 K + 2 D + 1."""
    return 3 * num_domains + 2 * num_probes + 1


class StateEncoder:
    """Turns observations into state vectors of 3K + 2D + 1 numbers for K domains and D probes.

    In this order: n [K] shares of the step's sequences; l [K] losses; dl [K] their change per
    step; |w| [D] and |dw| [D] root mean squares of the probed layers' weights and of their change;
    t, the progress. A quantity that a step did not measure keeps its last value: a domain that was
    not drawn keeps its loss, and dl stays the slope between its last two measured losses. A domain
    never seen counts as having the mean loss of the others.

    ``observe`` gives raw numbers. ``standardize`` puts each feature on its own running scale, so
    that neither the size of the model nor the level of a domain's loss leaks, and is applied when
    a state is *used*: states of any age that meet in a replay batch share one scale. Progress has
    a scale already: it runs from -1 to 1.
    """

    def __init__(self, num_domains: int, num_probes: int) -> None:
        self.num_domains = num_domains
        self.num_probes = num_probes
        self.size = state_size(num_domains, num_probes)
        self.moments = RunningMoments(self.size, as_they_are=1)
        self._loss = np.full(num_domains, np.nan)
        self._slope = np.zeros(num_domains)
        self._seen_at = np.zeros(num_domains, dtype=np.int64)
        self._probes = np.zeros(2 * num_probes)

    def observe(self, observation: Observation) -> Tensor:
        """Raw state [3K + 2D + 1] float32 after ``observation``; always finite."""
        self._track_losses(observation)
        self._track_probes(observation)
        known = np.isfinite(self._loss)
        neutral = self._loss[known].mean() if known.any() else 0.0
        features = (
            observation.samples / max(int(observation.samples.sum()), 1),
            np.where(known, self._loss, neutral),
            self._slope,
            self._probes,
            [2.0 * observation.progress - 1.0],
        )
        state = np.concatenate(features).astype(np.float32)
        self.moments.update(state)
        return torch.from_numpy(state)

    def standardize(self, states: Tensor) -> Tensor:
        """Raw ``states`` [..., 3K + 2D + 1] on the scale the networks see, clipped."""
        return self.moments.standardize(states, _CLIP)

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to continue bit for bit."""
        return {
            "moments": self.moments.state_dict(),
            "loss": torch.from_numpy(self._loss.copy()),
            "slope": torch.from_numpy(self._slope.copy()),
            "seen_at": torch.from_numpy(self._seen_at.copy()),
            "probes": torch.from_numpy(self._probes.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.moments.load_state_dict(state["moments"])
        self._loss = state["loss"].numpy().copy()
        self._slope = state["slope"].numpy().copy()
        self._seen_at = state["seen_at"].numpy().copy()
        self._probes = state["probes"].numpy().copy()

    def _track_losses(self, observation: Observation) -> None:
        measured = np.isfinite(observation.loss)
        elapsed = np.maximum(observation.iteration - self._seen_at, 1)
        slope = (observation.loss - self._loss) / elapsed
        self._slope = np.where(np.isfinite(slope), slope, self._slope)
        self._loss = np.where(measured, observation.loss, self._loss)
        self._seen_at = np.where(measured, observation.iteration, self._seen_at)

    def _track_probes(self, observation: Observation) -> None:
        if observation.weight_norm is None or observation.weight_delta_norm is None:
            raise ValueError(
                "the observation has no weight norms, which the state needs; "
                f"measure {self.num_probes} probed layers"
            )
        probes = np.concatenate([observation.weight_norm, observation.weight_delta_norm])
        if probes.shape != self._probes.shape:
            raise ValueError(
                f"the observation has {len(probes) // 2} probed layers, the policy was built for "
                f"{self.num_probes}; set alignment.num_probes to match"
            )
        self._probes = np.where(np.isfinite(probes), probes, self._probes)
