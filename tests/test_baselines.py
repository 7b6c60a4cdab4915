"""Policies from other papers: they compute what the papers say, and keep every rail."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Train
from toy import ToyEnvironment, block_gram, play

from megatron_acodm.arguments import acodm_config, build_parser
from megatron_acodm.config import AcodmConfig, AdoConfig, MixingConfig, OdmConfig, PikeConfig
from megatron_acodm.mixing import (
    MixingController,
    Observation,
    build_policy,
    load_state,
    save_state,
)
from megatron_acodm.mixing.odm import exploration_rate
from megatron_acodm.mixing.policy import Policy
from megatron_acodm.mixing.scaling_law import fit_scaling_laws
from megatron_acodm.weights_file import read_weights

ONLINE = ["ado", "odm", "pike"]
EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "weights"


def _policy(name: str, sizes: Any = (1, 1), steps: int = 100, **settings: Any) -> Policy:
    config = MixingConfig(policy=name, **settings)
    names = [chr(ord("a") + i) for i in range(len(sizes))]
    return build_policy(config, names, np.array(sizes), num_probes=4, train_iters=steps, seed=1)


def _seen(iteration: int, weights: Any, loss: Any = None, **changes: Any) -> Observation:
    """What a step with these weights showed; nothing of gradients unless it is given."""
    count = len(weights)
    values: dict[str, Any] = {
        "iteration": iteration,
        "progress": iteration / 100,
        "weights": np.array(weights, dtype=np.float64),
        "samples": np.full(count, 8),
        "available": np.ones(count, dtype=bool),
        "loss": np.full(count, 2.0) if loss is None else np.array(loss, dtype=np.float64),
        "alignment": None,
        "grad_sq_norm": None,
        "affinity": None,
        "weight_norm": None,
        "weight_delta_norm": None,
    }
    return Observation(**{**values, **changes})


def _gradients(
    iteration: int, sq_norm: Any, samples: Any, weights: Any = None, variance: Any = 0.0
) -> Observation:
    """The same with domains' squared gradient norms, and variances between their sequences."""
    sq_norm, samples = np.array(sq_norm, dtype=np.float64), np.array(samples)
    weights = np.full(len(sq_norm), 1 / len(sq_norm)) if weights is None else weights
    return _seen(
        iteration,
        weights,
        grad_sq_norm=sq_norm + variance / np.maximum(samples, 1),
        affinity=np.diag(sq_norm) + np.where(np.isnan(sq_norm), np.nan, 0.0)[:, None],
        alignment=0 * sq_norm,
        samples=samples,
    )


# All of them --------------------------------------------------------------------------------------


def _toy(seed: int = 0) -> ToyEnvironment:
    gram = block_gram(3, helpful=2)
    gram[1, 1] = 4.0  # whose norm PiKE is to find
    return ToyEnvironment(gram, seed, steps=120)


@pytest.mark.parametrize("name", ONLINE)
def test_every_decision_is_a_mixture_within_the_bounds(name: str) -> None:
    policy = _policy(name, (6, 3, 1), 120, min_weight=0.2, max_weight=0.55)
    controller = MixingController(policy)
    drawn = play(controller, _toy())
    assert controller.dropped_steps == controller.policy_failures == 0
    for weights in drawn:
        assert weights.sum() == pytest.approx(1.0)
        assert weights.min() >= 0.2 - 1e-9 and weights.max() <= 0.55 + 1e-9
    assert np.abs(drawn[-1] - drawn[0]).max() > 1e-3  # it decides something


@pytest.mark.parametrize("name", ONLINE)
def test_the_floor_fits_many_domains_and_the_lowest_share(name: str) -> None:
    many = _policy(name, np.ones(200))
    assert many.bounds.floor.max() <= 0.5 / 200
    config, names = MixingConfig(policy=name), ["a", "b"]
    policy = build_policy(config, names, np.array([9, 1]), 4, 100, seed=1, lowest_share=0.25)
    assert policy.bounds.floor.tolist() == [0.25, 0.25]
    assert policy.initial_weights.tolist() == [0.75, 0.25]


def _brisk(name: str) -> MixingController:
    """One that decides early in a run so long that ``ado`` keeps means of two steps."""
    settings = {
        "odm": OdmConfig(warmup_fraction=0.001),
        "ado": AdoConfig(warmup_fraction=0.001, refit_fraction=0.002),
        "pike": PikeConfig(update_fraction=0.001),
    }
    return MixingController(_policy(name, (6, 3, 1), 12_000, **settings))


@pytest.mark.parametrize("name", ONLINE)
def test_a_saved_policy_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, environment = _brisk(name), _toy()
    for iteration in range(1, 78):  # up to between two updates, or two means
        whole.decide(environment.step(iteration, whole.weights))
    save_state(tmp_path / "policy", whole.state_dict())
    restored = _brisk(name)
    restored.load_state_dict(load_state(tmp_path / "policy"))
    assert restored.rewards is not None
    for iteration in range(78, 121):
        seen = environment.step(iteration, whole.weights)
        available = np.array([True, iteration < 100, True])
        seen = replace(seen, available=available)
        assert restored.decide(seen).tolist() == whole.decide(seen).tolist()
    assert str(restored.rewards) == str(whole.rewards)
    assert restored.diagnostics() == whole.diagnostics()


@pytest.mark.parametrize("name", ONLINE)
def test_a_policy_restored_after_a_domain_was_used_up_continues_bit_for_bit(name: str) -> None:
    whole = MixingController(_policy(name, (6, 3, 1), 120))
    environment, available = _toy(), np.array([True, False, True])
    for iteration in range(1, 60):
        seen = environment.step(iteration, whole.weights)
        whole.decide(replace(seen, available=available) if iteration > 50 else seen)
    restored = MixingController(_policy(name, (6, 3, 1), 120))
    restored.load_state_dict(whole.state_dict())
    for iteration in range(60, 90):
        seen = replace(environment.step(iteration, whole.weights), available=available)
        assert restored.decide(seen).tolist() == whole.decide(seen).tolist()


@pytest.mark.parametrize("max_weight", [1.0, 0.4])
@pytest.mark.parametrize("name", ONLINE)
def test_a_used_up_domain_is_masked_for_good(name: str, max_weight: float) -> None:
    controller = MixingController(_policy(name, (6, 3, 1), 120, max_weight=max_weight))
    environment = _toy()
    for iteration in range(1, 121):
        available = np.array([True, iteration < 40, iteration < 80])
        seen = replace(environment.step(iteration, controller.weights), available=available)
        weights = controller.decide(seen)
        assert weights.sum() == pytest.approx(1.0)
        assert (weights[available] > 0).all() and (weights[~available] == 0).all()
    assert controller.policy_failures == 0


@pytest.mark.parametrize("name", ONLINE)
def test_a_domain_that_never_appears_is_no_fault(name: str) -> None:
    controller = MixingController(_policy(name, (6, 3, 1), 120))
    environment = _toy()
    absent = np.array([0.0, 0.0, np.nan])
    for iteration in range(1, 121):
        seen = environment.step(iteration, np.array([0.6, 0.4, 0.0]))
        assert seen.alignment is not None and seen.grad_sq_norm is not None
        assert seen.affinity is not None
        seen = replace(
            seen,
            weights=np.array([0.6, 0.3, 0.1]),  # a tenth of a micro-batch was due
            loss=seen.loss + absent,
            alignment=seen.alignment + absent,
            grad_sq_norm=seen.grad_sq_norm + absent,
            affinity=seen.affinity + absent[:, None],
        )
        weights = controller.decide(seen)
        assert np.isfinite(weights).all() and weights[2] > 0
    assert controller.dropped_steps == controller.policy_failures == 0
    assert np.isnan(controller.rewards[2])  # type: ignore[index]


@pytest.mark.parametrize("name", ONLINE)
def test_one_domain_gets_everything(name: str) -> None:
    controller = MixingController(_policy(name, (5,)))
    for iteration in range(1, 60):
        assert controller.decide(_gradients(iteration, [1.0], [8])).tolist() == [1.0]
    assert controller.policy_failures == 0


@pytest.mark.parametrize("name", ["ado", "odm"])
def test_losses_alone_are_enough(name: str) -> None:
    policy = _policy(name)
    assert not policy.needs_alignment
    controller = MixingController(policy)
    for iteration in range(1, 101):
        controller.decide(_seen(iteration, controller.weights, [2 + 9 / iteration, 3.0]))
    assert controller.dropped_steps == controller.policy_failures == 0
    assert controller.weights[0] != controller.weights[1]


# ODM ----------------------------------------------------------------------------------------------


def test_odm_explores_ever_less() -> None:
    assert exploration_rate(4, 1) == 0.25  # sqrt(ln 4 / 4) is more
    assert exploration_rate(4, 100) == pytest.approx(math.sqrt(math.log(4) / 400))
    assert exploration_rate(1, 7) == 0.0


def test_odm_computes_the_weights_of_the_published_code() -> None:
    policy = _policy("odm", odm=OdmConfig(smoothing=0.5, warmup_fraction=0.0))
    policy.decide(_seen(99, [0.5, 0.5], [3.0, 1.0]))
    weights = policy.decide(_seen(100, [0.8, 0.2], [2.0, math.nan]))
    rewards = np.array([0.25 * math.exp(3) + 0.5 * math.exp(2), 0.5 * math.exp(1)])
    assert policy.rewards.tolist() == pytest.approx(rewards.tolist())  # type: ignore[union-attr]
    epsilon = math.sqrt(math.log(2) / (2 * 101))
    expected = (1 - 2 * epsilon) * rewards / rewards.sum() + epsilon
    assert weights.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_odm_computes_the_weights_of_the_paper() -> None:
    settings = OdmConfig(rule="paper", smoothing=0.9, warmup_fraction=0.0)
    policy = _policy("odm", odm=settings)
    policy.decide(_seen(99, [0.5, 0.5], [4.0, 1.0]))
    weights = policy.decide(_seen(100, [0.8, 0.2], [4.0, math.nan]))
    # R_a = 0.9 * 0.1 * 4 / 0.5 + 0.1 * 4 / 0.8; b, not drawn, keeps 0.1 * 1 / 0.5
    rewards = np.array([0.72 + 0.5, 0.2])
    assert policy.rewards.tolist() == pytest.approx(rewards.tolist())  # type: ignore[union-attr]
    before, now = (math.sqrt(math.log(2) / (2 * t)) for t in (100, 101))
    likelihood = np.exp(before * rewards)
    expected = (1 - 2 * now) * likelihood / likelihood.sum() + now
    assert weights.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_odm_learns_nothing_while_it_warms_up() -> None:
    policy = _policy("odm", (3, 1), odm=OdmConfig(warmup_fraction=0.5))
    for iteration in range(1, 51):
        weights = policy.decide(_seen(iteration, [0.75, 0.25], [9.0, 1.0]))
        assert weights.tolist() == [0.75, 0.25]
    assert np.isnan(policy.rewards).all()  # type: ignore[arg-type]
    assert policy.decide(_seen(51, [0.75, 0.25], [9.0, 1.0])).tolist() != [0.75, 0.25]


@pytest.mark.parametrize("name", ["odm", "ado"])
def test_a_run_made_longer_does_not_warm_up_again(name: str) -> None:
    settings = {"odm": OdmConfig(warmup_fraction=0.1), "ado": AdoConfig(warmup_fraction=0.1)}
    policy = _policy(name, (3, 1), **{name: settings[name]})  # type: ignore[arg-type]
    for iteration in range(1, 61):
        decided = policy.decide(_seen(iteration, [0.75, 0.25], [9.0 / iteration, 1.0]))
    assert decided.tolist() != [0.75, 0.25]
    longer = _policy(name, (3, 1), steps=10_000, **{name: settings[name]})  # type: ignore[arg-type]
    longer.load_state_dict(policy.state_dict())
    seen = _seen(61, [0.75, 0.25], [9.0 / 61, 1.0])
    assert longer.decide(seen).tolist() == policy.decide(seen).tolist() != [0.75, 0.25]


def test_a_run_made_shorter_goes_on_with_ados_curve() -> None:
    def steps_of_the_curve(policy: Policy, first: int, last: int) -> int:
        for iteration in range(first, last):
            policy.decide(_seen(iteration, [0.5, 0.5], [9.0 / iteration, 1.0]))
        return len(policy.state_dict()["curve"]["n"])

    policy = _policy("ado", steps=60_000, ado=AdoConfig(warmup_fraction=0.0))
    steps_of_the_curve(policy, 1, 10)  # of a block of 10
    shorter = _policy("ado", steps=48_000, ado=AdoConfig(warmup_fraction=0.0))  # blocks of 8
    shorter.load_state_dict(policy.state_dict())
    assert steps_of_the_curve(shorter, 10, 27) == 3


def _odm_history(rule: str) -> list[np.ndarray]:
    controller = MixingController(_policy("odm", (1, 1, 1), 2000, odm=OdmConfig(rule=rule)))
    losses = [4.0, 2.0, 2.0]
    return [controller.decide(_seen(t, controller.weights, losses)) for t in range(1, 2001)]


@pytest.mark.parametrize("rule", ["code", "paper"])
def test_odm_draws_more_of_a_higher_loss(rule: str) -> None:
    weights = _odm_history(rule)[199]
    assert weights[0] > 1.1 * weights[1] and weights[1] == pytest.approx(weights[2])


def test_odm_nears_perplexities_by_the_code_and_uniform_by_the_paper() -> None:
    perplexity = np.exp([4.0, 2.0, 2.0])
    by_code, by_paper = _odm_history("code"), _odm_history("paper")
    expected = perplexity[0] / perplexity.sum()
    assert abs(by_code[-1][0] - expected) < abs(by_code[199][0] - expected) / 2 < 0.05
    assert 1 / 3 < by_paper[-1][0] < by_paper[199][0]


@pytest.mark.parametrize("rule", ["code", "paper"])
def test_the_number_of_draws_of_a_step_is_no_reward(rule: str) -> None:
    settings = OdmConfig(rule=rule, warmup_fraction=0.0)
    few, many = (_policy("odm", odm=settings) for _ in range(2))
    seen = _seen(50, [0.5, 0.5], [3.0, 2.0])
    more = replace(seen, samples=16 * seen.samples)
    assert few.decide(seen).tolist() == many.decide(more).tolist()


# ADO ----------------------------------------------------------------------------------------------


def test_laws_without_noise_are_found_exactly() -> None:
    n = np.linspace(1e4, 1e6, 200)
    losses = np.stack([2 + 3 * n**-0.5, 1 + 4 * n**-0.25, np.full(200, 1.5)], axis=1)
    losses[::3, 0] = np.nan
    laws = fit_scaling_laws(n, losses)
    assert laws.irreducible[:2].tolist() == pytest.approx([2, 1], rel=1e-6)
    assert laws.beta[:2].tolist() == pytest.approx([3, 4], rel=1e-5)
    assert laws.exponent[:2].tolist() == pytest.approx([0.5, 0.25])
    speed = [0.5 * 3 * 1e6**-0.5, 0.25 * 4 * 1e6**-0.25, 0.0]
    assert laws.speed(1e6).tolist() == pytest.approx(speed, abs=1e-9)


def test_noise_and_outliers_hardly_move_the_speed() -> None:
    rng = np.random.default_rng(0)
    n = np.linspace(1e4, 1e6, 1000)
    losses = (1.5 + 12 * n**-0.3)[:, None] + 0.05 * rng.normal(size=(1000, 3))
    losses[::50] += 3.0
    truth = 0.3 * 12 * 1e6**-0.3
    assert fit_scaling_laws(n, losses).speed(1e6).tolist() == pytest.approx([truth] * 3, rel=0.15)


def test_a_loss_that_rises_teaches_nothing_and_too_few_points_are_unknown() -> None:
    n = np.linspace(1e3, 1e4, 30)
    losses = np.stack([1 + n / 1e4, np.where(n < 3e3, 2.0, np.nan)], axis=1)
    speed = fit_scaling_laws(n, losses).speed(1e4)
    assert speed[0] == 0.0 and np.isnan(speed[1])


def _ado_losses(n: float) -> list[float]:
    return [2 + 3 * n**-0.5, 1 + 4 * n**-0.25]


def test_ado_computes_the_papers_weights() -> None:
    settings = AdoConfig(warmup_fraction=0.0, refit_fraction=0.5)
    policy = _policy("ado", (3, 1), ado=settings)
    drawn_with = [0.6, 0.4]
    for iteration in range(1, 50):
        weights = policy.decide(_seen(iteration, drawn_with, _ado_losses(16 * iteration)))
        assert weights.tolist() == pytest.approx([0.75, 0.25])  # no law yet
    prior = average = np.array([0.75, 0.25])
    credit = prior.copy()
    for _ in range(50):
        credit = 0.1 * np.array(drawn_with) + 0.9 * credit
    for iteration in (50, 51):  # the law of step 50 holds until step 100
        n = 16 * iteration
        slope = np.array([0.5 * 3 * n**-0.5, 0.25 * 4 * n**-0.25])
        preference = prior * np.sqrt(credit) * slope
        preference /= preference.sum()
        weights = policy.decide(_seen(iteration, drawn_with, _ado_losses(n)))
        expected = 0.1 * preference + 0.9 * average
        assert weights.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
        average = (1 - 1 / (iteration + 1)) * average + preference / (iteration + 1)
        credit = 0.1 * np.array(drawn_with) + 0.9 * credit


def test_ado_leaves_a_domain_that_stopped_learning() -> None:
    controller = MixingController(_policy("ado", (1, 1, 1), 600))
    for iteration in range(1, 601):
        n = 16.0 * iteration
        losses = [1 + 4 * n**-0.25, 1 + 4 * n**-0.25, 1.9]
        controller.decide(_seen(iteration, controller.weights, losses))
    assert controller.weights[2] < 0.05
    assert controller.weights[0] == pytest.approx(controller.weights[1])
    assert controller.weights[2] >= 0.01 - 1e-12  # delta_min


def test_ado_prefers_a_flat_domain_by_delta_min_and_an_unseen_one_as_the_mean() -> None:
    settings = AdoConfig(warmup_fraction=0.0, refit_fraction=0.2, credit_exponent=0.0)
    policy = _policy("ado", (1, 1, 2), ado=settings)
    prior = np.array([0.25, 0.25, 0.5])
    for iteration in range(1, 21):
        n = 24 * iteration
        weights = policy.decide(_seen(iteration, prior, [1 + 4 * n**-0.25, 2.0, math.nan]))
    preference = prior * np.array([1.0, 0.0, 0.5])  # speeds but for a factor
    preference = np.maximum(preference / preference.sum(), 0.01)
    preference /= preference.sum()
    expected = 0.1 * preference + 0.9 * prior
    assert weights.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


# PiKE ---------------------------------------------------------------------------------------------


def test_noise_that_leaves_nothing_of_the_gradient_is_no_negative_statistic() -> None:
    policy = _policy("pike", pike=PikeConfig(norm_rate=1.0, variance_rate=2.0))
    for iteration in range(1, 11):
        seen = _gradients(iteration, [2.0, -1.0], [8, 8], variance=np.array([-9.0, 8.0]))
        policy.decide(seen)
    assert policy.rewards.tolist() == pytest.approx([2.0, -2.0])  # type: ignore[union-attr]


def test_pike_computes_the_papers_weights() -> None:
    rates = PikeConfig(norm_rate=0.3, variance_rate=0.2)
    policy = _policy("pike", (3, 1), pike=rates)
    truth, variance = np.array([6.0, 2.0]), np.array([8.0, 24.0])
    for iteration in range(1, 11):
        samples = np.array([4, 8]) if iteration % 2 else np.array([8, 4])
        weights = policy.decide(_gradients(iteration, truth, samples, variance=variance))
        if iteration < 10:
            assert weights.tolist() == [0.75, 0.25]
    gain = 0.3 * truth / 4.0 - 0.2 / 2 * variance / 16.0
    expected = np.array([0.75, 0.25]) * np.exp(gain)
    assert weights.tolist() == pytest.approx((expected / expected.sum()).tolist())
    assert policy.rewards.tolist() == pytest.approx(gain.tolist())  # type: ignore[union-attr]


def test_an_update_forgets_the_steps_before_the_last_one() -> None:
    policy = _policy("pike", pike=PikeConfig(norm_rate=1.0, variance_rate=0.0))
    for iteration in range(1, 21):
        sq_norm = [9.0, 1.0] if iteration <= 10 else [1.0, 3.0]
        policy.decide(_gradients(iteration, sq_norm, [8, 8]))
    assert policy.rewards.tolist() == pytest.approx([0.5, 1.5])  # type: ignore[union-attr]


def test_a_domain_that_pike_did_not_see_gains_as_much_as_the_mean() -> None:
    policy = _policy("pike", (2, 1, 1), pike=PikeConfig(norm_rate=1.0, variance_rate=0.0))
    for iteration in range(1, 11):
        weights = policy.decide(_gradients(iteration, [3.0, 1.0, math.nan], [8, 8, 0]))
    expected = np.array([0.5, 0.25, 0.25]) * np.exp([1.5, 0.5, 1.0])
    assert weights.tolist() == pytest.approx((expected / expected.sum()).tolist())


def test_pike_draws_less_of_a_noisy_domain_and_more_of_a_large_gradient() -> None:
    rng = np.random.default_rng(0)
    controller = MixingController(_policy("pike", (1, 1, 1), 500))
    truth, variance = np.array([2.0, 1.0, 1.0]), np.array([8.0, 8.0, 64.0])
    for iteration in range(1, 501):
        samples = rng.integers(6, 11, size=3)
        noisy_truth, noisy_variance = rng.gamma(4, 1 / 4, size=(2, 3)) * [truth, variance]
        seen = _gradients(iteration, noisy_truth, samples, controller.weights, noisy_variance)
        controller.decide(seen)
    large, plain, noisy = controller.weights
    assert large > plain > noisy
    assert noisy == pytest.approx(0.1 / 3)  # where it can still come back from


def test_units_of_the_gradient_do_not_matter_to_pike() -> None:
    small, large = _policy("pike", (1, 2, 1)), _policy("pike", (1, 2, 1))
    rng = np.random.default_rng(1)
    for iteration in range(1, 41):
        sq_norm, variance = rng.uniform(1, 2, (2, 3))
        samples = rng.integers(2, 9, size=3)
        left = small.decide(_gradients(iteration, sq_norm, samples, variance=variance))
        scaled = _gradients(iteration, 1e6 * sq_norm, samples, variance=1e6 * variance)
        right = large.decide(scaled)
    assert left.tolist() == pytest.approx(right.tolist())


# Weights from a file ------------------------------------------------------------------------------

FORMS = {
    "plain.json": '{"a": 0.7, "b": 0.3}',
    "tabs.json": '{\n\t"a": 7e-1,\n\t"b": 0.3\n}',
    "plain.yaml": "a: 7e-1\nb: 0.3\n",
    "doremi.json": '{"train_domain_weights": {"a": 0.7, "b": 0.3}, "eval_domain_weights": {}}',
    "doge.json": '{"dataset": "x", "train_domains": "a,b", "train_dw": "0.7,0.3,0", "seed": 4}',
    "regmix.yaml": "train:\n  a: 0.7\n  b: 0.3\nvalid:\n  c: 1.0\nmodel_name: tiny\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_weights_are_read_in_every_published_form(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(FORMS[name], encoding="utf-8")
    policy = _policy("static", weights_file=str(path))
    assert policy.initial_weights.tolist() == pytest.approx([0.7, 0.3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 0.7\nc: 0.3\n", "from .*w.yaml must name every domain once; unknown: c; missing: b"),
        ("a: 0.7\nb: many\n", "w.yaml: the weight of b is 'many'; it must be a number"),
        ("a: 0.7\nb: true\n", "the weight of b is True"),
        ("a: 0.7\na: 0.3\n", "a comes more than once"),
        ("a: [", "w.yaml: "),
        ("- 0.7\n", "it holds no weights"),
        ("train_domains: a,b\ntrain_dw: 0.7,0.2,0.1\n", "3 numbers for the 2 names"),
        ("a: 0.7\nb: .nan\n", "mixing.weights.b is nan"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        _policy("static", weights_file=str(path))


def test_a_missing_file_and_a_second_source_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    with pytest.raises(ValueError, match="cannot read the weights .*w.json"):
        MixingConfig(policy="static", weights_file=str(path))
    path.write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(ValueError, match="weights_file is for policy 'static', not 'odm'"):
        MixingConfig(policy="odm", weights_file=str(path))
    with pytest.raises(ValueError, match="differ from those of .*; give one of them"):
        MixingConfig(policy="static", weights={"a": 2.0}, weights_file=str(path))


def test_the_flag_comes_before_the_config_and_the_weights_are_recorded(tmp_path: Path) -> None:
    config, file = tmp_path / "mix.yaml", tmp_path / "w.json"
    config.write_text("mixing: {policy: static, weights: {a: 1, b: 1}}", encoding="utf-8")
    file.write_text('{"a": 3, "b": 1}', encoding="utf-8")
    sizes = ["--num-layers", "1", "--hidden-size", "8", "--num-attention-heads", "1"]
    sizes += ["--train-iters", "1", "--data-path", "x", "--run-dir", "y"]
    sizes += ["--seq-length", "8", "--micro-batch-size", "1", "--global-batch-size", "1"]
    args = build_parser().parse_args(
        [*sizes, "--acodm-config", str(config), "--acodm-weights", str(file)]
    )
    result = acodm_config(args)
    assert result is not None
    assert result.mixing.weights == {"a": 3.0, "b": 1.0}
    assert AcodmConfig.from_dict(json.loads(json.dumps(result.to_dict()))).mixing == result.mixing


PILE = list(read_weights(EXAMPLES / "doremi_pile.json"))
COPYRIGHTED = {"Books3", "BookCorpus2", "OpenSubtitles", "YoutubeSubtitles", "OpenWebText2"}


@pytest.mark.parametrize(
    ("file", "domains", "pile_cc", "exporter"),
    [
        ("doremi_pile.json", PILE, 0.6057, 0.0063),
        ("regmix_pile.yaml", [x for x in PILE if x not in COPYRIGHTED], 0.8701, 0.0012),
    ],
)
def test_published_weights_of_the_pile_load_as_they_are(
    file: str, domains: list[str], pile_cc: float, exporter: float
) -> None:
    config = MixingConfig(policy="static", weights_file=str(EXAMPLES / file))
    weights = build_policy(config, domains, np.ones(len(domains)), 4, 100, 0).initial_weights
    assert weights[domains.index("Pile-CC")] == pytest.approx(pile_cc, rel=1e-3)
    assert weights[domains.index("NIH ExPorter")] == pytest.approx(exporter, rel=3e-2)
    with pytest.raises(ValueError, match=r"missing: Extra .0 leaves a domain out"):
        build_policy(config, [*domains, "Extra"], np.ones(len(domains) + 1), 4, 100, 0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"A b": 1.0, "a_b": 1.0, "c": 1.0}, "has domain 'A b' twice, also as 'a_b'"),
        ({"a_b": 1.0, "a-B": 1.0, "c": 1.0}, "has domain 'A b' twice, also as 'a-B'"),
        ({"ab": 1.0, "c": 1.0}, "unknown: ab; missing: A b"),
        ({"a b": 1.0, "c++": 1.0}, r"unknown: c\+\+; missing: c"),
    ],
)
def test_a_spelling_means_one_domain(weights: dict[str, float], message: str) -> None:
    config = MixingConfig(policy="static", weights=weights)
    with pytest.raises(ValueError, match=message):
        build_policy(config, ["A b", "c"], np.ones(2), 4, 100, 0)


def test_domains_that_are_spelled_alike_are_told_apart_by_their_exact_names() -> None:
    config = MixingConfig(policy="static", weights={"a b": 3.0, "A_B": 1.0})
    policy = build_policy(config, ["a b", "A_B"], np.ones(2), 4, 100, 0)
    assert policy.initial_weights.tolist() == [0.75, 0.25]


# A real run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "needs_gradients"),
    [
        ("policy: odm, odm: {warmup_fraction: 0}", False),
        ("policy: pike", True),
        ("policy: acodm, agent: {reward: loss, replay_batch_size: 2}", False),
    ],
)
def test_a_real_run_follows_the_policy_and_measures_what_it_needs(
    train: Train, tmp_path: Path, policy: str, needs_gradients: bool
) -> None:
    config = tmp_path / "mix.yaml"
    config.write_text(f"mixing: {{initial_weights: uniform, {policy}}}", encoding="utf-8")
    run = train(
        *("--train-iters", "14", "--eval-interval", "0", "--acodm-config", str(config)),
        *("--num-layers", "2", "--seq-length", "32"),
    )
    assert run.code == 0, run.output
    weights = [[d["weight"] for d in step["domains"].values()] for step in run.steps]
    assert np.ptp(weights[0]) < 1e-12 < np.ptp(weights[-1])
    assert all(step["diagnostics"]["policy_failures"] == 0 for step in run.steps)
    rewards = [d["reward"] for d in run.steps[-1]["domains"].values()]
    assert all(reward is not None and math.isfinite(reward) for reward in rewards)
    assert (run.steps[0]["alignment_bytes"] > 1000) == needs_gradients
