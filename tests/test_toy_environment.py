"""The actor learns: toy training runs whose best mixture is known, played by the whole policy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from megatron_acodm.config import AgentConfig, MixingConfig
from megatron_acodm.mixing import MixingController, Observation, build_controller
from megatron_acodm.mixing.reward import RewardTracker

STEPS = 300  # as short as the quickstart
GRANULES = 16  # micro-batches a step

# Gram matrix of six domains' gradients: the last three help each other and none of the others.
GRAM = np.full((6, 6), -0.1)
GRAM[3:, 3:] = 1.0
INTERACTION = GRAM - np.diag(np.diag(GRAM))
FLOOR = 0.1 / 6
BEST = np.array([FLOOR] * 3 + [(1 - 3 * FLOOR) / 3] * 3)


def gram_alignment(share: np.ndarray) -> np.ndarray:
    """w [6] of a batch with realised ``share`` [6]: the off-diagonal part of G G^T a."""
    return INTERACTION @ share


def energy(weights: np.ndarray) -> float:
    """What the policy is to maximise: sum over i != j of a_i a_j H_ij."""
    return float(weights @ INTERACTION @ weights)


def gain(weights: np.ndarray) -> float:
    """Share of the possible rise in interaction energy above uniform."""
    start = energy(np.full(6, 1 / 6))
    return (energy(weights) - start) / (energy(BEST) - start)


def draw(weights: np.ndarray, carry: np.ndarray) -> np.ndarray:
    """Micro-batches of each domain, by largest remainder; the remainder is carried over."""
    quota = weights * GRANULES + carry
    counts = np.maximum(np.floor(quota), 0).astype(np.int64)
    for i in np.argsort(counts - quota)[: GRANULES - counts.sum()]:
        counts[i] += 1
    carry[:] = quota - counts
    return counts


def train(
    controller: MixingController,
    alignment: Callable[[np.ndarray], np.ndarray],
    seed: int,
    steps: int = STEPS,
    lag: int = 1,
    noise: float = 0.3,
) -> np.ndarray:
    """Weights [steps, K] of a run that looks like training.

    Losses fall, gradients shrink tenfold in the first steps, measurements are noisy, domains
    without a micro-batch are not measured, decisions take effect ``lag`` steps late.
    """
    rng = np.random.default_rng(seed)
    num_domains = len(controller.initial_weights)
    stages = [controller.initial_weights] * (1 + lag)
    carry = np.zeros(num_domains)
    for step in range(1, steps + 1):
        weights = stages[step - 1]
        counts = draw(weights, carry)
        undrawn = np.where(counts > 0, 0.0, np.nan)
        spread = rng.normal(size=(2, num_domains)) / np.sqrt(np.maximum(counts, 1))
        scale = 1 + 10 * np.exp(-step / 20)
        observation = Observation(
            iteration=step,
            progress=step / steps,
            weights=weights,
            samples=4 * counts,
            loss=2 + 4 * np.exp(-step / 100) + 0.1 * spread[0] + undrawn,
            alignment=scale * (alignment(counts / GRANULES) + noise * spread[1]) + undrawn,
            grad_sq_norm=scale**2 + undrawn,
            weight_norm=np.full(3, 0.02 + 1e-5 * step),
            weight_delta_norm=1e-4 * scale * rng.uniform(0.9, 1.1, size=3),
        )
        stages.append(controller.decide(observation))
    assert controller.dropped_steps == controller.policy_failures == 0
    return np.array(stages[:steps])


def controller_of_six(
    seed: int, sizes: np.ndarray | None = None, steps: int = STEPS, **agent: float
) -> MixingController:
    config = MixingConfig(agent=AgentConfig(**agent))  # type: ignore[arg-type]
    sizes = np.full(6, 1000) if sizes is None else sizes
    return build_controller(config, list("abcdef"), sizes, 3, steps, seed)


def test_the_best_mixture_is_what_the_tests_say() -> None:
    controller = controller_of_six(seed=0)
    bounds = controller.policy.bounds
    assert bounds.contains(BEST)
    rng = np.random.default_rng(0)
    for concentration in (0.2, 1.0, 5.0):
        for point in rng.dirichlet(np.full(6, concentration), size=300):
            assert energy(bounds.project(point)) <= energy(BEST)


@pytest.mark.parametrize("seed", range(4))
def test_weights_move_to_the_best_mixture_within_a_short_run(seed: int) -> None:
    weights = train(controller_of_six(seed), gram_alignment, seed)
    assert gain(weights[0]) == pytest.approx(0.0, abs=1e-6)
    settled = weights[-50:].mean(axis=0)
    assert gain(settled) > 0.8
    assert 0.5 * np.abs(settled - BEST).sum() < 0.25  # total variation


@pytest.mark.parametrize("learner", ["actor", "critic"])
def test_nothing_is_learned_unless_both_optimizers_step(
    learner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = controller_of_six(seed=0)
    optimizer = getattr(controller.policy.agent, learner).optimizer  # type: ignore[attr-defined]
    monkeypatch.setattr(optimizer, "step", lambda: None)
    weights = train(controller, gram_alignment, seed=0)
    assert abs(gain(weights[-50:].mean(axis=0))) < 0.1


@pytest.mark.parametrize("lag", [0, 4])
def test_learning_survives_the_decision_lag(lag: int) -> None:
    weights = train(controller_of_six(seed=0), gram_alignment, seed=0, lag=lag)
    assert gain(weights[-50:].mean(axis=0)) > 0.7


def test_natural_weights_that_favour_the_wrong_domains_are_left() -> None:
    sizes = np.array([1000, 1000, 1000, 200, 200, 200])
    weights = train(controller_of_six(seed=0, sizes=sizes), gram_alignment, seed=0)
    assert weights[0] == pytest.approx(sizes / sizes.sum())
    assert weights[-50:, 3:].sum(axis=1).mean() > 0.8


def test_what_is_learned_stays_learned() -> None:
    weights = train(controller_of_six(seed=1, steps=1500), gram_alignment, seed=1, steps=1500)
    for end in range(500, 1501, 250):
        assert gain(weights[end - 50 : end].mean(axis=0)) > 0.8


PEAK = np.array([0.6, 0.3, 0.1])


def distance_from_shared_peak(seed: int, steps: int = 600) -> float:
    """Play a run in which all domains align alike, best at ``PEAK``: how far off it ends.

    Differences between domains are pure noise here. The start is 0.53 off.
    """
    agent = AgentConfig(reward_smoothing=0.0, exploration_std=0.05, exploration_fraction=1.0)
    config = MixingConfig(initial_weights="uniform", agent=agent)
    controller = build_controller(config, list("abc"), np.ones(3), 3, steps, seed)

    def alignment(share: np.ndarray) -> np.ndarray:
        return np.full(3, 1 - 4 * ((share - PEAK) ** 2).sum())

    weights = train(controller, alignment, seed, steps, noise=0.05)
    return float(np.abs(weights[-50:].mean(axis=0) - PEAK).sum())


@pytest.mark.parametrize("seed", range(3))
def test_a_rise_that_all_domains_share_is_a_reward(seed: int) -> None:
    assert distance_from_shared_peak(seed) < 0.25


def test_rewards_standardised_across_domains_would_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    update = RewardTracker.update

    def across_domains(
        self: RewardTracker, alignment: np.ndarray, weights: np.ndarray
    ) -> torch.Tensor:
        centred = alignment - np.nanmean(alignment)
        return update(self, centred / (np.nanstd(alignment) + 1e-8), weights)

    monkeypatch.setattr(RewardTracker, "update", across_domains)
    assert np.mean([distance_from_shared_peak(seed) for seed in range(3)]) > 0.4
