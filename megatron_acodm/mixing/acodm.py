"""Policy ``acodm``: an actor-critic agent that learns the mixture while the model trains."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from megatron_acodm.config import MixingConfig
from megatron_acodm.mixing.agent import DDPGAgent
from megatron_acodm.mixing.networks import FLOOR_MARGIN
from megatron_acodm.mixing.objective import Objective
from megatron_acodm.mixing.observation import Observation
from megatron_acodm.mixing.policy import Policy, Setting
from megatron_acodm.mixing.rails import rails, restricted
from megatron_acodm.mixing.replay import ReplayBuffer, Transitions
from megatron_acodm.mixing.reward import RewardTracker
from megatron_acodm.mixing.simplex import Bounds
from megatron_acodm.mixing.state import StateEncoder
from megatron_acodm.mixing.transfer import SavedPolicy

_PAPER_DOMAINS = 22
"""Of more domains each weight is smaller, and explored with noise that is smaller by as much."""

_ROUNDING = 1e-6
"""Differences of weights up to this are float32's."""


class AcodmPolicy(Policy):
    """AC-ODM (arXiv 2505.23878) without a proxy: agent and model train together.

    Each step it smooths the domains' alignments with its objective (or their losses) into rewards,
    stores the transition (state before, weights that drew the batch, rewards, state after), updates
    the agent once the replay can fill a batch, and acts on the new state. It departs from the
    mixture that descends on the objective as far as the rewards give reason to. Early in the run it
    explores: normal noise on the weights, then back onto the bounded simplex.
    """

    name: ClassVar[str] = "acodm"
    needs_alignment = True
    needs_probes: ClassVar[bool] = True

    def __init__(self, config: MixingConfig, setting: Setting) -> None:
        """Raises ValueError for fewer than 2 domains with data, or bounds that leave no mixture."""
        self.setting = setting
        self.config = config.agent
        self.bounds, self.initial_weights = _bounds_and_prior(config, setting)
        self._first_bounds = self.bounds  # wider ones may follow when domains are used up
        num_domains = len(setting.domains)
        self.encoder = StateEncoder(num_domains, setting.num_probes)
        self.objective = Objective(self.config.objective, self.initial_weights)
        self.needs_alignment = self.compares_gradients(config)
        self.needs_affinity = self.needs_alignment and self.objective.needs_affinity
        self.reward = RewardTracker(num_domains, self.config.reward_smoothing)
        seeds = np.random.SeedSequence(setting.seed).generate_state(3).tolist()
        self.replay = ReplayBuffer(
            self.config.replay_capacity,
            self.encoder.size,
            num_domains,
            self.config.replay_recency,
            seeds[0],
        )
        self.agent = DDPGAgent(
            self.config, self.encoder.size, self.initial_weights, self.bounds, seeds[1]
        )
        self._noise = torch.Generator().manual_seed(seeds[2])
        self._exploration_std = self.config.exploration_std * min(1.0, _PAPER_DOMAINS / num_domains)
        self._explores = True  # no more when that is over, also if the run is then made longer
        self._previous: Tensor | None = None
        self._figures: dict[str, float] = {}  # of the last update and the last action

    @classmethod
    def compares_gradients(cls, config: MixingConfig) -> bool:
        """Unless losses are its rewards."""
        return config.agent.reward == "alignment"

    def decide(self, observation: Observation) -> np.ndarray:
        """Learn from one step; weights [K] for the next undecided one."""
        self.objective.observe(observation.loss)
        self.agent.lean_on(self.objective.mixture)
        measured = self._measured(observation)
        rewards = self.reward.update(measured, observation.weights)
        state = self.encoder.observe(observation)
        if self._previous is not None:
            drawn_with = torch.tensor(observation.weights)
            self.replay.add(self._previous, drawn_with, rewards, state)
        self._previous = state
        if self.replay.size >= self.config.replay_batch_size:
            for _ in range(self.config.updates_per_step):
                self._figures |= self.agent.update(self._sample())._asdict()
        weights = self.agent.act(self.encoder.standardize(state))
        self._explores &= observation.progress <= self.config.exploration_fraction
        if self._explores:
            noise = torch.randn(len(weights), generator=self._noise, dtype=torch.float64)
            weights = weights + self._exploration_std * noise.numpy()
        projected = self.bounds.project(weights)
        self._figures["clipped_share"] = _clipped_share(self.bounds, weights, projected)
        return projected

    def restrict(self, available: np.ndarray) -> None:
        """Mask the other domains out of the action, now and in every mixture to come."""
        self.bounds = restricted(self.bounds, available)
        self.agent.restrict(self.bounds)

    def interrupt(self) -> None:
        """Forget the last state, so that no transition spans the lost step."""
        self._previous = None

    @property
    def rewards(self) -> np.ndarray:
        """[K] moving averages of the alignments; nan for a domain never measured."""
        return self.reward.rewards

    def diagnostics(self) -> dict[str, float]:
        """Figures of the agent; those of an update are missing until the first one.

        - ``reward``: the last step's scalar, raw.
        - ``replay_size``: transitions.
        - ``critic_loss``, ``value``: see ``Losses``.
        - ``clipped_share``: share of the weights that floor or ceiling cut after exploration noise.
        """
        figures = {"reward": self.reward.scalar, "replay_size": float(self.replay.size)}
        return figures | self._figures

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizers, replay, moments, random states and what was last seen."""
        return {
            "encoder": self.encoder.state_dict(),
            "objective": self.objective.state_dict(),
            "reward": self.reward.state_dict(),
            "replay": self.replay.state_dict(),
            "agent": self.agent.state_dict(),
            "noise": self._noise.get_state(),
            "explores": self._explores,
            "previous": None if self._previous is None else self._previous.clone(),
            "figures": dict(self._figures),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue bit for bit; raises ValueError if the saved agent has another shape."""
        self.encoder.load_state_dict(state["encoder"])
        self.objective.load_state_dict(state["objective"])
        self.reward.load_state_dict(state["reward"])
        self.replay.load_state_dict(state["replay"])
        self.agent.load_state_dict(state["agent"])
        self._noise.set_state(state["noise"])
        self._explores = state["explores"]
        self._previous = None if state["previous"] is None else state["previous"].clone()
        self._figures = dict(state["figures"])

    def exported(self, provenance: dict[str, Any]) -> SavedPolicy:
        """The actor as it is, for policy ``frozen``.

        Args:
            provenance: of this run, for people to read.
        """
        actor = self.agent.actor.network.state_dict()
        return SavedPolicy(
            domains=list(self.setting.domains),
            num_probes=self.setting.num_probes,
            objective=self.config.objective,
            hidden_size=self.config.hidden_size,
            num_layers=self.config.num_layers,
            min_weight=float(self._first_bounds.floor.max()),
            max_weight=float(self._first_bounds.ceiling.max()),
            prior=torch.from_numpy(self.initial_weights.copy()),
            actor={name: value.detach().clone() for name, value in actor.items()},
            provenance=provenance,
        )

    def _measured(self, observation: Observation) -> np.ndarray:
        """What the step says of each domain's worth, [K]; nan for a domain not drawn."""
        if self.config.reward == "loss":
            return observation.loss
        return self.objective.alignment(observation)

    def _sample(self) -> Transitions:
        """A replay batch on the scales of today."""
        raw = self.replay.sample(self.config.replay_batch_size)
        states = self.encoder.standardize(torch.stack([raw.states, raw.next_states]))
        return Transitions(states[0], raw.weights, self.reward.standardize(raw.rewards), states[1])


def _clipped_share(bounds: Bounds, point: np.ndarray, projected: np.ndarray) -> float:
    """Share of the domains whose weight a bound changed when ``point`` [K] was projected.

    The projection moves all other weights alike, so that the sum is 1 again.
    """
    active = bounds.active
    free = active & (projected > bounds.floor) & (projected < bounds.ceiling)
    if not free.any():
        return 1.0
    moved = projected - point
    return float((np.abs(moved - moved[free].mean()) > _ROUNDING)[active].mean())


def _bounds_and_prior(config: MixingConfig, setting: Setting) -> tuple[Bounds, np.ndarray]:
    """The rails, and the mixture [K] to start from: as configured, but a little above the floor.

    That little is what the actor needs to leave the floor (``Actor.lean_on``).
    """
    active = setting.active
    count = int(active.sum())
    if count < 2:
        raise ValueError(
            f"policy 'acodm' has {count} domain with data; it mixes at least 2. "
            "Add domains, or use policy 'static'"
        )
    bounds, wanted = rails(config, setting, min_weight=0.1 / count)
    above_floor = np.where(active, bounds.floor + FLOOR_MARGIN * (1.0 / count - bounds.floor), 0.0)
    return bounds, Bounds(above_floor, bounds.ceiling).project(wanted)
