"""Policy ``frozen``: an actor that learned in another run drives this one, and learns no more."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from megatron_acodm.config import MixingConfig
from megatron_acodm.mixing.objective import Objective
from megatron_acodm.mixing.observation import Observation
from megatron_acodm.mixing.policy import Policy, Setting
from megatron_acodm.mixing.rails import restricted
from megatron_acodm.mixing.simplex import Bounds
from megatron_acodm.mixing.state import StateEncoder
from megatron_acodm.mixing.transfer import SavedPolicy, load_policy


class FrozenPolicy(Policy):
    """AC-ODM with a proxy (arXiv 2505.23878): the policy of a small model's run, for a large one.

    It needs the losses and weight norms of each step, and no gradient. Domains are matched by name,
    in any order. The rails are those that it learned within, unless the config has a min_weight or
    a lower max_weight. Features are standardised over this run's own past, as they were over the
    proxy's. The first mixture is what the actor gives to the mean state at the start of a run.
    """

    name: ClassVar[str] = "frozen"
    needs_probes: ClassVar[bool] = True

    def __init__(self, config: MixingConfig, setting: Setting) -> None:
        """Raises ValueError for a policy that is missing, damaged, or of other domains."""
        if config.policy_file is None:
            raise ValueError(
                "policy 'frozen' needs a policy: give mixing.policy_file (--acodm-load-policy), as "
                "written by a run with --acodm-save-policy"
            )
        self.setting = setting
        self._saved = load_policy(config.policy_file)
        self._order = _matched(self._saved, setting, config.policy_file)
        active = setting.active[self._order]
        share = 1.0 / int(active.sum())
        high = min(max(self._saved.max_weight, share), config.max_weight)
        low = config.min_weight
        if low is None:
            low = min(self._saved.min_weight, share, high)
        self._own_bounds = Bounds.build(active, low, high)
        self._actor = self._saved.build_actor(self._own_bounds)
        self.encoder = StateEncoder(len(self._order), setting.num_probes)
        self.objective = Objective(self._saved.objective, self._saved.prior.numpy())
        start = torch.zeros(self.encoder.size)
        start[-1] = -1.0
        self.initial_weights = self._act(start)

    @property
    def bounds(self) -> Bounds:  # type: ignore[override]
        """In the run's order of domains."""
        floor, ceiling = (np.zeros(len(self._order)) for _ in range(2))
        floor[self._order], ceiling[self._order] = self._own_bounds.floor, self._own_bounds.ceiling
        return Bounds(floor, ceiling)

    def decide(self, observation: Observation) -> np.ndarray:
        """The actor's weights [K] for the state after a step."""
        observation = observation.in_order(self._order)
        self.objective.observe(observation.loss)
        self._actor.lean_on(self.objective.mixture)
        state = self.encoder.observe(observation)
        return self._act(self.encoder.standardize(state))

    def restrict(self, available: np.ndarray) -> None:
        """Mask the other domains out of the actor's choice."""
        self._own_bounds = restricted(self._own_bounds, available[self._order])
        self._actor.restrict(self._own_bounds)

    def state_dict(self) -> dict[str, Any]:
        """What the run has seen so far, and which actor decided."""
        return {
            "encoder": self.encoder.state_dict(),
            "objective": self.objective.state_dict(),
            "actor": dict(self._saved.actor),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``; raises ValueError if another actor had decided."""
        actor = self._saved.actor
        if actor.keys() != state["actor"].keys() or not all(
            torch.equal(actor[name], value) for name, value in state["actor"].items()
        ):
            raise ValueError(
                "the run was driven by another policy than mixing.policy_file holds; resume with "
                "the same file"
            )
        self.encoder.load_state_dict(state["encoder"])
        self.objective.load_state_dict(state["objective"])

    @torch.no_grad()
    def _act(self, state: torch.Tensor) -> np.ndarray:
        weights = np.empty(len(self._order))
        # Rounded in float32: back onto the bounded simplex.
        weights[self._order] = self._own_bounds.project(self._actor(state).double().numpy())
        return weights


def _matched(saved: SavedPolicy, setting: Setting, path: str) -> np.ndarray:
    """Where in the run each domain of the policy is, [K]."""
    gone = sorted(set(saved.domains) - set(setting.domains))
    new = sorted(set(setting.domains) - set(saved.domains))
    if gone or new:
        raise ValueError(
            f"the policy in {path} is of other domains"
            + (f"; only there: {', '.join(gone)}" if gone else "")
            + (f"; only in this run: {', '.join(new)}" if new else "")
            + ". Names must be the same; train a policy on this run's domains"
        )
    if saved.num_probes != setting.num_probes:
        raise ValueError(
            f"the policy in {path} is shown {saved.num_probes} probed layers, this run has "
            f"alignment.num_probes {setting.num_probes}; set it to {saved.num_probes}"
        )
    return np.array([setting.domains.index(name) for name in saved.domains])
