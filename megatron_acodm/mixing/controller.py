"""Guard rails around a policy: whatever happens in it, training goes on, and hears about it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_acodm.config import MixingConfig
from megatron_acodm.mixing.collapse import CollapseDetector
from megatron_acodm.mixing.observation import Observation
from megatron_acodm.mixing.policy import Policy
from megatron_acodm.mixing.simplex import entropy, natural_weights, uniform_weights

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_MAX_MAGNITUDE = float(np.finfo(np.float32).max)
"""Measurements beyond float32 count as not finite: the networks work in float32."""

_AT_FLOOR = 1.01
"""A weight up to this multiple of its floor counts as at the floor."""


class MixingController:
    """Runs a policy and keeps the last good weights for when it cannot be run.

    - A step with a measurement that is not finite is dropped: the policy does not see it, and no
      transition spans it.
    - An exception in the policy, or weights that are no mixture within its bounds, leave the last
      good weights in force; the next step tries again.
    - A policy that has collapsed onto one domain goes on, held by its floor (``CollapseDetector``).

    All are counted in ``diagnostics`` and logged: the first time (an exception: the first of its
    kind, with traceback), then at every doubling of the count.

    Args:
        policy: what is run.
        config: what counts as a collapse.
    """

    def __init__(self, policy: Policy, config: MixingConfig | None = None) -> None:
        self.policy = policy
        self.collapse = CollapseDetector(policy, config or MixingConfig())
        self.weights = policy.initial_weights
        """[K] float64: the last good decision."""
        self.dropped_steps = 0
        self.policy_failures = 0
        self._known_failures: set[str] = set()
        self._available = policy.setting.active
        self._iteration = 0

    def decide(self, observation: Observation) -> np.ndarray:
        """Weights [K] float64 for the next undecided stage: a mixture, whatever happens."""
        self._iteration = observation.iteration
        fault = self._fault(observation)
        if fault is not None:
            self._drop(fault)
        else:
            try:
                self.weights = self._checked(self._ask(observation))
            except Exception as error:  # the run must survive any fault of the agent
                self._report_failure(error)
                self._guarded(self.policy.interrupt, None)
        self.collapse.watch(observation.iteration, self.weights)
        return self.weights.copy()

    @torch.inference_mode()  # gradients are written out; a tenth of a decision's time
    def _ask(self, observation: Observation) -> np.ndarray:
        available = observation.available & self.policy.setting.active
        if available.any() and not np.array_equal(available, self._available):
            self.policy.restrict(available)
            self._available = available
        return self.policy.decide(observation)

    def _drop(self, fault: str) -> None:
        self.dropped_steps += 1
        self._guarded(self.policy.interrupt, None)
        if _is_power_of_two(self.dropped_steps):
            logger.warning(
                "step %d is dropped from mixing: %s. The weights stay as they are "
                "(%d steps dropped so far)",
                self._iteration,
                fault,
                self.dropped_steps,
            )

    def _guarded(self, ask: Callable[[], Answer], otherwise: Answer) -> Answer:
        """What the policy answers, or ``otherwise``, where it fails."""
        try:
            return ask()
        except Exception as error:
            self._report_failure(error)
            return otherwise

    def weights_to_resume_with(self) -> np.ndarray:
        """Weights [K] for steps that a restored run has not decided yet.

        The last decision; or the first mixture, where that decision left out domains that can be
        drawn again, as after their data or its cap was raised.
        """
        good = self.policy.bounds.contains(self.weights)
        return (self.weights if good else self.policy.initial_weights).copy()

    @property
    def needs_alignment(self) -> bool:
        """Whether observations must carry alignments."""
        return self.policy.needs_alignment

    @property
    def needs_affinity(self) -> bool:
        """Whether observations must carry affinities."""
        return self.policy.needs_affinity

    @property
    def initial_weights(self) -> np.ndarray:
        """[K] float64: the mixture before anything was observed."""
        return self.policy.initial_weights

    @property
    def rewards(self) -> np.ndarray | None:
        """[K] reward of each domain, nan where unknown; None if the policy has none."""
        return self._guarded(lambda: self.policy.rewards, None)

    def diagnostics(self) -> dict[str, float]:
        """The policy's own figures, those of its last decision, and what the guard rails did.

        - ``policy_entropy``: of the weights, in nats.
        - ``distance_from_natural``, ``distance_from_uniform``: total variation, the share of the
          batch that would have to come from other domains; both mixtures are of all domains that
          had data at the start.
        - ``floor_share``: share of the domains that can be drawn whose weight is within 1% of its
          floor.
        - ``dropped_steps``, ``policy_failures``: counts since the start of the run.
        - ``collapsed_steps``: how long the policy has been collapsed for; 0 where it is not.
        """
        own = self._guarded(self.policy.diagnostics, dict[str, float]())
        setting, bounds, weights = self.policy.setting, self.policy.bounds, self.weights
        at_floor = weights <= _AT_FLOOR * bounds.floor
        return own | {
            "policy_entropy": entropy(weights),
            "distance_from_natural": _total_variation(weights, natural_weights(setting.sizes)),
            "distance_from_uniform": _total_variation(weights, uniform_weights(setting.active)),
            "floor_share": float(at_floor[bounds.active].mean()),
            "dropped_steps": float(self.dropped_steps),
            "policy_failures": float(self.policy_failures),
            "collapsed_steps": float(self.collapse.steps),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to continue bit for bit."""
        return {
            "policy_name": self.policy.name,
            "domains": list(self.policy.setting.domains),
            "weights": torch.from_numpy(self.weights.copy()),
            "dropped_steps": self.dropped_steps,
            "policy_failures": self.policy_failures,
            "collapse": self.collapse.state_dict(),
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            ValueError: if it is of another policy or other domains, which are spelled out.
        """
        try:
            self._refuse_other_run(state)
            self.policy.load_state_dict(state["policy"])
            self.weights = state["weights"].numpy().copy()
            self.dropped_steps = state["dropped_steps"]
            self.policy_failures = state["policy_failures"]
            self.collapse.load_state_dict(state["collapse"])
        except KeyError as error:
            raise ValueError(
                f"the saved mixing state has no {error}; it was saved by another version"
            ) from error

    def _fault(self, observation: Observation) -> str | None:
        """What makes the observation unusable, or None."""
        domains = self.policy.setting.domains
        drawn = observation.samples > 0
        measured = {"loss": observation.loss}
        if self.policy.needs_alignment:
            if observation.alignment is None:
                return "no alignment was measured"
            measured["alignment"] = observation.alignment
        if self.policy.needs_affinity:
            if observation.affinity is None:
                return "no affinity was measured"
            # One value that is not finite makes the sum so.
            measured["sum of affinities"] = observation.affinity.sum(axis=1)
        for what, values in measured.items():
            usable = np.abs(values) <= _MAX_MAGNITUDE  # False for nan
            bad = np.where(drawn, ~usable, ~usable & ~np.isnan(values))
            if bad.any():
                return ", ".join(
                    f"{what} of {domains[i]} is {values[i]}" for i in np.nonzero(bad)[0]
                )
        return None

    def _checked(self, weights: np.ndarray) -> np.ndarray:
        count = len(self.policy.setting.domains)
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != (count,):
            raise ValueError(
                f"the policy's weights have shape {list(weights.shape)}, not [{count}]"
            )
        if not self.policy.bounds.contains(weights):  # nor if any is nan
            raise ValueError(
                f"the policy's weights {weights.tolist()} are no mixture within its bounds"
            )
        return weights

    def _report_failure(self, error: Exception) -> None:
        self.policy_failures += 1
        new = type(error).__name__ not in self._known_failures
        self._known_failures.add(type(error).__name__)
        if new or _is_power_of_two(self.policy_failures):
            logger.error(
                "POLICY %s FAILED at step %d: %s: %s. Training continues on the last good weights "
                "(%d failures so far)",
                self.policy.name,
                self._iteration,
                type(error).__name__,
                error,
                self.policy_failures,
                exc_info=error if new else None,
            )

    def _refuse_other_run(self, state: dict[str, Any]) -> None:
        if state["policy_name"] != self.policy.name:
            raise ValueError(
                f"the saved mixing state is of policy {state['policy_name']!r}, this run uses "
                f"{self.policy.name!r}; resume with the saved one, or start without its state"
            )
        saved, current = state["domains"], self.policy.setting.domains
        if saved == current:
            return
        gone = [name for name in saved if name not in current]
        new = [name for name in current if name not in saved]
        raise ValueError(
            "the saved mixing state is of other domains"
            + (f"; only saved: {', '.join(gone)}" if gone else "")
            + (f"; only in this run: {', '.join(new)}" if new else "")
            + ("" if gone or new else f"; saved in the order {', '.join(saved)}")
            + ". Resume with the saved run's domains in its order"
        )


def _total_variation(left: np.ndarray, right: np.ndarray) -> float:
    """Distance of two mixtures [K]: 0 for the same one, 1 where they share no domain."""
    return float(np.abs(left - right).sum() / 2.0)


def _is_power_of_two(count: int) -> bool:
    return count & (count - 1) == 0
