"""Policy ``ado``: draws more from the domains whose scaling law says that they still teach."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from megatron_acodm.config import MixingConfig
from megatron_acodm.mixing.observation import Observation
from megatron_acodm.mixing.policy import Policy, Setting
from megatron_acodm.mixing.rails import masked, rails, restricted
from megatron_acodm.mixing.scaling_law import ScalingLaws, fit_scaling_laws

_MIN_WEIGHT = 0.01
"""delta_min of the paper."""

_MAX_POINTS = 6000
"""Points of the loss curve that are kept: every tenth step of the paper's 60,000."""

_MIN_INTERVAL = 10
"""Steps between fits at least."""


class AdoPolicy(Policy):
    """Adaptive Data Optimization (Jiang et al. 2024, arXiv 2410.11820, algorithm 1).

    Now and then a law L_k(n) = epsilon_k + beta_k n^-alpha_k is fitted to each domain's losses.
    With mu the prior (the initial weights), in each step t:

        h_k <- gamma_1 weight_k(t) + (1 - gamma_1) h_k                (credit)
        rho_k ~ mu_k h_k^s (-dL_k/dn), at least delta_min             (preference)
        weight_k(t + 1) = gamma_2 rho_k + (1 - gamma_2) average_k
        average_k <- (1 - 1 / (t + 1)) average_k + rho_k / (t + 1)

    As in the authors' code (yidingjiang/ado), n counts the sequences of all domains: a domain
    learns from the others too, and laws stay comparable. Until the first fit the initial weights
    hold. Departures: the fit (see ``scaling_law``) takes means over a block of steps in place of a
    Savitzky-Golay filter and imputed losses, and does not keep epsilon_k above e^0.5, which is of
    the authors' tokenizer; warm-up and interval are shares of the run; delta_min is at most half of
    the uniform share; and h and its root are the paper's, where the authors' code averages realised
    counts and takes (h (1 - h))^s.
    """

    name: ClassVar[str] = "ado"

    def __init__(self, config: MixingConfig, setting: Setting) -> None:
        """Raises ValueError for bounds that leave no mixture."""
        self.setting = setting
        self.config = config.ado
        self.bounds, self._prior = rails(config, setting, _MIN_WEIGHT)
        self.initial_weights = self.bounds.project(self._prior)
        steps = setting.train_iters
        self._warmup = round(self.config.warmup_fraction * steps)
        self._interval = max(_MIN_INTERVAL, round(self.config.refit_fraction * steps))
        self._next_fit = self._warmup + self._interval
        self._sequences = 0  # n
        self._curve = _LossCurve(len(setting.domains), max(1, steps // _MAX_POINTS))
        self._laws: ScalingLaws | None = None
        self._credit = self._prior.copy()
        self._average = self._prior.copy()

    def decide(self, observation: Observation) -> np.ndarray:
        """Learn from one step's losses; weights [K] for the next undecided one."""
        step = observation.iteration
        self._sequences += int(observation.samples.sum())
        rate = self.config.credit_smoothing
        self._credit = rate * observation.weights + (1.0 - rate) * self._credit
        if step > self._warmup:
            self._curve.add(self._sequences, observation.loss)
        if step >= self._next_fit:
            self._laws = self._curve.fit()
            self._next_fit = step + self._interval
        weights = self.initial_weights
        if self._laws is not None:
            preference = self._preference(self._laws)
            share = self.config.preference_share
            weights = share * preference + (1.0 - share) * self._average
            self._average = self._average + (preference - self._average) / (step + 1)
        return masked(weights, self.bounds)

    def restrict(self, available: np.ndarray) -> None:
        """From now on only the available domains get weight."""
        self.bounds = restricted(self.bounds, available)

    @property
    def rewards(self) -> np.ndarray | None:
        """[K] nats that each domain's loss falls by as n grows by a factor e; None before a fit."""
        return None if self._laws is None else self._laws.speed(float(self._sequences))

    def state_dict(self) -> dict[str, Any]:
        """The loss curve, its laws, the averages, and when the warm-up ends."""
        laws = self._laws
        return {
            "warmup": self._warmup,
            "next_fit": self._next_fit,
            "sequences": self._sequences,
            "curve": self._curve.state_dict(),
            "laws": None
            if laws is None
            else torch.from_numpy(np.stack([laws.irreducible, laws.beta, laws.exponent])),
            "credit": torch.from_numpy(self._credit.copy()),
            "average": torch.from_numpy(self._average.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._warmup, self._next_fit = state["warmup"], state["next_fit"]
        self._sequences = state["sequences"]
        self._curve.load_state_dict(state["curve"])
        laws = state["laws"]
        self._laws = None if laws is None else ScalingLaws(*laws.numpy().copy())
        self._credit = state["credit"].numpy().copy()
        self._average = state["average"].numpy().copy()

    def _preference(self, laws: ScalingLaws) -> np.ndarray:
        """The preference rho [K], 0 for masked domains."""
        active = self.bounds.active
        speed = laws.speed(float(self._sequences))  # -dL/dn, but for 1/n, which all share
        known = active & np.isfinite(speed)
        neutral = speed[known].mean() if known.any() else 0.0
        speed = np.where(np.isfinite(speed), speed, neutral)
        preference = np.where(active, self._prior * self._credit**self.config.credit_exponent, 0.0)
        if (preference * speed).sum() > 0.0:
            preference = preference * speed
        if preference.sum() > 0.0:
            preference = preference / preference.sum()
        preference = np.where(active, np.maximum(preference, self.bounds.floor), 0.0)
        total = preference.sum()
        return preference / total if total > 0.0 else active / active.sum()


class _LossCurve:
    """Losses of K domains over n: means of blocks of steps, each over the steps that drew it."""

    def __init__(self, num_domains: int, block: int) -> None:
        self._block = block
        self._n: list[float] = []
        self._losses: list[np.ndarray] = []
        self._num_domains = num_domains
        self._start_block()

    def _start_block(self) -> None:
        self._steps, self._n_sum = 0, 0
        self._sum, self._count = np.zeros((2, self._num_domains))

    def add(self, n: int, loss: np.ndarray) -> None:
        """Take in the ``loss`` [K] of a step after which n sequences were seen; nan: not drawn."""
        usable = loss > 0.0  # False for nan
        self._steps += 1
        self._n_sum += n
        self._sum = self._sum + np.where(usable, loss, 0.0)
        self._count = self._count + usable
        if self._steps >= self._block:  # more where the run was made shorter
            self._n.append(self._n_sum / self._steps)
            measured = np.where(self._count > 0, self._sum / np.maximum(self._count, 1.0), np.nan)
            self._losses.append(measured)
            self._start_block()

    def fit(self) -> ScalingLaws | None:
        """The laws of all blocks so far; None where not one domain has enough of them."""
        if not self._n:
            return None
        laws = fit_scaling_laws(np.array(self._n), np.array(self._losses))
        return laws if np.isfinite(laws.beta).any() else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to continue bit for bit."""
        return {
            "n": torch.tensor(self._n, dtype=torch.float64),
            "losses": torch.from_numpy(np.array(self._losses).reshape(-1, self._num_domains)),
            "steps": self._steps,
            "n_sum": self._n_sum,
            "sum": torch.from_numpy(self._sum.copy()),
            "count": torch.from_numpy(self._count.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._n = state["n"].tolist()
        self._losses = list(state["losses"].numpy().copy())
        self._steps, self._n_sum = state["steps"], state["n_sum"]
        self._sum, self._count = state["sum"].numpy().copy(), state["count"].numpy().copy()
