"""The actor learns: toy training runs whose best mixture is known, played by the whole policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toy import SharedPeak, ToyEnvironment, block_gram, play

from megatron_acodm.config import AgentConfig, MixingConfig
from megatron_acodm.mixing import MixingController, build_policy
from megatron_acodm.mixing.reward import RewardTracker

STEPS = 300  # as short as the quickstart
DOMAINS, HELPFUL = 6, 3  # the first three pull together, every other pair slightly apart
FLOOR = 0.1 / DOMAINS
# The toy rewards interaction.
PAPER = AgentConfig(objective="batch", prior_strength=0.0, reward_smoothing=0.9)
BEST = np.array([(1 - 3 * FLOOR) / 3] * 3 + [FLOOR] * 3)


def six_domains(
    seed: int,
    steps: int = STEPS,
    sizes: Any = (1,) * DOMAINS,
    agent: AgentConfig = PAPER,
) -> MixingController:
    config = MixingConfig(agent=agent)
    policy = build_policy(config, list("abcdef"), np.array(sizes), 4, steps, seed)
    return MixingController(policy)


def environment(seed: int, steps: int = STEPS) -> ToyEnvironment:
    return ToyEnvironment(block_gram(DOMAINS, HELPFUL), seed, steps)


def gain(weights: np.ndarray) -> float:
    """Share of the possible rise in value above that of the uniform mixture."""
    value = environment(seed=0).value
    start = value(np.full(DOMAINS, 1 / DOMAINS))
    return (value(weights) - start) / (value(BEST) - start)


def settled(drawn: list[np.ndarray], end: int | None = None) -> np.ndarray:
    """Mean weights of the last 50 steps before ``end``."""
    return np.mean(drawn[:end][-50:], axis=0)


def test_the_best_mixture_is_what_these_tests_say() -> None:
    bounds = six_domains(seed=0).policy.bounds
    assert bounds.contains(BEST)
    rng = np.random.default_rng(0)
    for concentration in (0.2, 1.0, 5.0):
        for point in rng.dirichlet(np.full(DOMAINS, concentration), size=300):
            assert gain(bounds.project(point)) <= 1.0


@pytest.mark.parametrize("seed", range(4))
def test_weights_move_to_the_best_mixture_within_a_short_run(seed: int) -> None:
    controller = six_domains(seed)
    drawn = play(controller, environment(seed))
    assert controller.dropped_steps == controller.policy_failures == 0
    assert gain(drawn[0]) == pytest.approx(0.0, abs=1e-6)
    assert gain(settled(drawn)) > 0.8
    assert 0.5 * np.abs(settled(drawn) - BEST).sum() < 0.25  # total variation


@pytest.mark.parametrize("learner", ["actor", "critic"])
def test_nothing_is_learned_unless_both_networks_descend(
    learner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = six_domains(seed=0)
    network = getattr(controller.policy.agent, learner)  # type: ignore[attr-defined]
    monkeypatch.setattr(network, "descend", lambda gradients: None)
    assert abs(gain(settled(play(controller, environment(seed=0))))) < 0.1
    assert controller.policy_failures == 0


@pytest.mark.parametrize("seed", range(3))
def test_the_default_agent_leaves_its_prior_for_what_is_rewarded(seed: int) -> None:
    """Its prior is nearly uniform here: the domains' losses are."""
    controller = six_domains(seed, agent=AgentConfig())
    drawn = play(controller, environment(seed))
    assert controller.dropped_steps == controller.policy_failures == 0
    assert settled(drawn)[:HELPFUL].sum() > 0.85


@pytest.mark.parametrize("learner", ["actor", "critic"])
def test_the_default_agent_stays_at_its_prior_unless_both_networks_descend(
    learner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = six_domains(seed=0, agent=AgentConfig())
    network = getattr(controller.policy.agent, learner)  # type: ignore[attr-defined]
    monkeypatch.setattr(network, "descend", lambda gradients: None)
    drawn = play(controller, environment(seed=0))
    assert settled(drawn)[:HELPFUL].sum() == pytest.approx(0.5, abs=0.05)


def test_an_agent_rewarded_by_losses_draws_where_they_are_high_and_needs_no_gradient() -> None:
    controller = six_domains(seed=0, agent=replace(PAPER, reward="loss"))
    assert not controller.needs_alignment and not controller.needs_affinity
    toy, weights = environment(seed=0), controller.weights
    for iteration in range(1, STEPS + 1):
        seen = toy.step(iteration, weights)
        loss = seen.loss + np.array([1, 1, 0, 0, 0, 0])
        seen = replace(seen, loss=loss, alignment=None, grad_sq_norm=None, affinity=None)
        weights = controller.decide(seen)
    assert controller.dropped_steps == controller.policy_failures == 0
    assert weights[:2].sum() > 0.6  # uniform: 0.33
    assert controller.rewards is not None and np.ptp(controller.rewards) < 1.3


@pytest.mark.parametrize("lag", [0, 4])
def test_learning_survives_the_decision_lag(lag: int) -> None:
    assert gain(settled(play(six_domains(seed=0), environment(seed=0), lag))) > 0.7


def test_natural_weights_that_favour_the_wrong_domains_are_left() -> None:
    controller = six_domains(seed=0, sizes=(1, 1, 1, 5, 5, 5))
    drawn = play(controller, environment(seed=0))
    assert drawn[0][:HELPFUL].sum() == pytest.approx(3 / 18)
    assert settled(drawn)[:HELPFUL].sum() > 0.8


def test_what_is_learned_stays_learned() -> None:
    drawn = play(six_domains(seed=1, steps=1500), environment(seed=1, steps=1500))
    for end in range(500, 1501, 250):
        assert gain(settled(drawn, end)) > 0.8


def _distance_from_shared_peak(seed: int, steps: int = 600) -> float:
    """How far a run that only a reward shared by all domains can guide ends; it starts 0.53 off."""
    agent = replace(PAPER, reward_smoothing=0.0, exploration_std=0.05, exploration_fraction=1.0)
    config = MixingConfig(initial_weights="uniform", agent=agent)
    controller = MixingController(build_policy(config, list("abc"), np.ones(3), 4, steps, seed))
    drawn = play(controller, SharedPeak(seed, steps))
    return float(np.abs(settled(drawn) - SharedPeak.peak).sum())


@pytest.mark.parametrize("seed", range(3))
def test_a_rise_that_all_domains_share_is_a_reward(seed: int) -> None:
    assert _distance_from_shared_peak(seed) < 0.25


def test_rewards_standardised_across_domains_would_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    update = RewardTracker.update

    def across_domains(
        self: RewardTracker, alignment: np.ndarray, weights: np.ndarray
    ) -> torch.Tensor:
        centred = alignment - np.nanmean(alignment)
        return update(self, centred / (np.nanstd(alignment) + 1e-8), weights)

    monkeypatch.setattr(RewardTracker, "update", across_domains)
    assert np.mean([_distance_from_shared_peak(seed) for seed in range(3)]) > 0.4
