"""Policies, their guard rails, what they see and how they are rewarded."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from toy import ToyEnvironment, block_gram, play

from megatron_acodm.config import POLICIES as CONFIGURABLE
from megatron_acodm.config import AgentConfig, MixingConfig
from megatron_acodm.mixing import (
    POLICIES,
    MixingController,
    Observation,
    build_policy,
    load_state,
    save_state,
)
from megatron_acodm.mixing.policy import Policy
from megatron_acodm.mixing.reward import RewardTracker
from megatron_acodm.mixing.simplex import Bounds
from megatron_acodm.mixing.state import StateEncoder

DOMAINS = ["a", "b", "c"]
SIZES = np.array([60, 30, 10])


def _policy(name: str = "acodm", train_iters: int = 100, **settings_: Any) -> Policy:
    agent = settings_.pop("agent", AgentConfig(replay_batch_size=4))
    config = MixingConfig(policy=name, agent=agent, **settings_)
    return build_policy(config, DOMAINS, SIZES, num_probes=4, train_iters=train_iters, seed=5)


def _observation(iteration: int = 1, **changes: Any) -> Observation:
    rng = np.random.default_rng(iteration)
    values: dict[str, Any] = {
        "iteration": iteration,
        "progress": iteration / 100,
        "weights": np.array([0.5, 0.3, 0.2]),
        "samples": np.array([8, 5, 3]),
        "available": np.ones(3, dtype=bool),
        "loss": rng.uniform(2, 3, 3),
        "alignment": rng.normal(size=3),
        "grad_sq_norm": rng.uniform(1, 2, 3),
        "affinity": rng.normal(size=(3, 3)),
        "weight_norm": np.full(4, 0.02),
        "weight_delta_norm": rng.uniform(1e-4, 2e-4, 4),
    }
    return Observation(**{**values, **changes})


# Policies -----------------------------------------------------------------------------------------


def test_the_config_knows_the_registered_policies() -> None:
    assert set(CONFIGURABLE) == set(POLICIES)


def test_uniform_and_natural_weights() -> None:
    assert _policy("uniform").decide(_observation()).tolist() == pytest.approx([1 / 3] * 3)
    assert _policy("static").decide(_observation()).tolist() == pytest.approx([0.6, 0.3, 0.1])


def test_given_weights_are_normalised_and_matched_by_name() -> None:
    policy = _policy("static", weights={"c": 2, "a": 1, "b": 1})
    assert policy.decide(_observation()).tolist() == pytest.approx([0.25, 0.25, 0.5])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "b": 1, "x": 1}, "unknown: x; missing: c"),
        ({"a": 1, "b": 1, "c": -1}, "mixing.weights.c is -1"),
        ({"a": 0, "b": 0, "c": 0}, "all 0"),
    ],
)
def test_given_weights_that_do_not_fit_are_refused(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _policy("static", weights=weights)


def test_the_agent_needs_two_domains() -> None:
    with pytest.raises(ValueError, match="1 domain with data; it mixes at least 2"):
        build_policy(MixingConfig(), ["only"], np.array([5]), 4, 100, seed=1)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"frozen"}))  # see test_frozen.py
def test_a_domain_without_data_is_never_drawn(name: str) -> None:
    policy = build_policy(
        MixingConfig(policy=name, agent=AgentConfig(replay_batch_size=4, exploration_fraction=1.0)),
        DOMAINS,
        np.array([60, 0, 40]),
        num_probes=4,
        train_iters=100,
        seed=5,
    )
    absent = np.array([0.0, np.nan, 0.0])
    for iteration in range(1, 20):
        seen = _observation(iteration, samples=np.array([8, 0, 8]))
        assert seen.alignment is not None
        seen = replace(seen, loss=seen.loss + absent, alignment=seen.alignment + absent)
        weights = policy.decide(seen)
        assert weights[1] == 0 and weights.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("max_weight", [1.0, 0.4])
def test_a_used_up_domain_is_masked_out_of_the_mixture_for_good(max_weight: float) -> None:
    controller = MixingController(_policy("acodm", max_weight=max_weight))
    for iteration in range(1, 20):
        available = np.array([True, iteration < 8, iteration < 14])
        weights = controller.decide(_observation(iteration, available=available))
        assert weights.sum() == pytest.approx(1.0)
        assert (weights[available] > 0.03).all() and (weights[~available] == 0).all()
    assert controller.policy_failures == 0
    controller.decide(_observation(20, available=np.zeros(3, dtype=bool)))  # nothing is left
    assert controller.policy_failures == 0


def test_a_restored_agent_masks_what_the_uninterrupted_one_does() -> None:
    whole = MixingController(_policy("acodm", max_weight=0.45))
    available = np.array([True, False, True])
    for iteration in range(1, 8):
        whole.decide(_observation(iteration))
    whole.decide(_observation(8, available=available))
    restored = MixingController(_policy("acodm", max_weight=0.45))
    restored.load_state_dict(whole.state_dict())
    for iteration in range(9, 14):
        seen = _observation(iteration, available=available)
        np.testing.assert_array_equal(restored.decide(seen), whole.decide(seen))


def test_a_run_is_resumed_with_its_last_weights_unless_they_leave_a_domain_out() -> None:
    controller = MixingController(_policy("acodm"))
    controller.weights = np.array([0.5, 0.3, 0.2])
    assert controller.weights_to_resume_with().tolist() == [0.5, 0.3, 0.2]
    controller.weights = np.array([0.5, 0.0, 0.5])
    np.testing.assert_array_equal(
        controller.weights_to_resume_with(), controller.policy.initial_weights
    )


def test_the_first_mixture_is_the_configured_one_above_the_floor() -> None:
    natural = _policy("acodm").initial_weights
    assert natural.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.02)
    assert _policy("acodm", initial_weights="uniform").initial_weights.tolist() == pytest.approx(
        [1 / 3] * 3
    )


def test_every_decision_stays_within_the_configured_bounds() -> None:
    policy = _policy("acodm", min_weight=0.15, max_weight=0.5)
    for iteration in range(1, 60):
        weights = policy.decide(_observation(iteration))
        assert weights.sum() == pytest.approx(1.0, abs=1e-9)
        assert weights.min() >= 0.15 - 1e-9 and weights.max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min_weight": 0.4}, "adds up to 1.2, more than 1; lower min_weight to at most 0.333"),
        ({"max_weight": 0.2}, "adds up to 0.6, less than 1; raise max_weight to at least 0.333"),
    ],
)
def test_bounds_that_leave_no_mixture_are_refused(bounds: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _policy("acodm", **bounds)


# Projection ---------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    point=arrays(np.float64, st.integers(1, 12), elements=st.floats(-3, 3)),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
    data=st.data(),
)
def test_the_projection_is_the_nearest_mixture(
    point: np.ndarray, low: float, high: float, data: st.DataObject
) -> None:
    count = len(point)
    bounds = Bounds.build(np.ones(count, bool), low / count, 1 / count + high * (1 - 1 / count))
    nearest = bounds.project(point)
    assert bounds.contains(nearest, tolerance=1e-9)
    other = bounds.project(
        data.draw(arrays(np.float64, count, elements=st.floats(-3, 3), fill=st.nothing()))
    )
    # Obtuse angle at the projection: no other mixture is nearer.
    assert (point - nearest) @ (other - nearest) <= 1e-8


def test_masked_domains_get_nothing() -> None:
    bounds = Bounds.build(np.array([True, False, True]), 0.1, 0.8)
    assert bounds.project(np.array([0.2, 5.0, 0.9])).tolist() == pytest.approx([0.2, 0.0, 0.8])


def test_a_point_that_is_not_finite_has_no_projection() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Bounds.build(np.ones(2, bool), 0.0, 1.0).project(np.array([np.nan, 0.5]))


# State --------------------------------------------------------------------------------------------


def test_the_state_holds_shares_losses_their_slope_probes_and_progress() -> None:
    encoder = StateEncoder(3, 4)
    encoder.observe(_observation(1, loss=np.array([3.0, 2.0, 1.0])))
    state = encoder.observe(_observation(2, loss=np.array([2.5, np.nan, 1.5])))
    assert len(state) == encoder.size == 3 * 3 + 2 * 4 + 1
    assert state[:3].tolist() == pytest.approx([0.5, 5 / 16, 3 / 16])
    assert state[3:6].tolist() == pytest.approx([2.5, 2.0, 1.5])  # b keeps its loss
    assert state[6:9].tolist() == pytest.approx([-0.5, 0.0, 0.5])
    assert state[-1].item() == pytest.approx(2 * 0.02 - 1)


def test_the_slope_of_a_domain_that_was_away_is_per_step() -> None:
    encoder = StateEncoder(3, 4)
    absent = np.array([np.nan, 2.0, 1.0])
    encoder.observe(_observation(1, loss=np.array([3.0, 2.0, 1.0])))
    encoder.observe(_observation(2, loss=absent))
    encoder.observe(_observation(3, loss=absent))
    state = encoder.observe(_observation(4, loss=np.array([2.4, 2.0, 1.0])))
    assert state[6].item() == pytest.approx(-0.6 / 3)


def test_standardised_states_do_not_depend_on_the_scale_of_losses_and_weights() -> None:
    small, large = StateEncoder(3, 4), StateEncoder(3, 4)
    for iteration in range(1, 30):
        seen = _observation(iteration)
        scaled = replace(seen, loss=7 * seen.loss, weight_delta_norm=100 * seen.weight_delta_norm)
        left = small.standardize(small.observe(seen))
        right = large.standardize(large.observe(scaled))
    torch.testing.assert_close(left, right, atol=1e-3, rtol=1e-3)
    assert left.abs().max() <= 5


def test_states_are_finite_even_when_nothing_was_measured() -> None:
    encoder = StateEncoder(3, 4)
    unknown = np.full(3, np.nan)
    state = encoder.observe(
        _observation(1, loss=unknown, samples=np.zeros(3, int), weight_norm=np.full(4, np.nan))
    )
    assert torch.isfinite(state).all()
    assert torch.isfinite(encoder.standardize(state)).all()


# Reward -------------------------------------------------------------------------------------------


def test_rewards_are_moving_averages_that_absent_domains_keep() -> None:
    tracker = RewardTracker(2, smoothing=0.9)
    weights = np.array([0.5, 0.5])
    tracker.update(np.array([1.0, np.nan]), weights)
    assert tracker.rewards[0] == 1.0 and np.isnan(tracker.rewards[1])
    tracker.update(np.array([2.0, 4.0]), weights)
    tracker.update(np.array([np.nan, 0.0]), weights)
    assert tracker.rewards.tolist() == pytest.approx([1.1, 3.6])
    assert tracker.scalar == pytest.approx(0.5 * 1.1 + 0.5 * 3.6)


def test_a_domain_that_was_not_drawn_forgets_as_fast_as_the_others() -> None:
    tracker = RewardTracker(2, smoothing=0.9)
    weights = np.array([0.5, 0.5])
    for step in range(12):
        alignment = 100.0 if step == 0 else 1.0
        tracker.update(np.array([alignment, alignment if step in (0, 11) else np.nan]), weights)
    assert tracker.rewards[1] == pytest.approx(tracker.rewards[0])
    assert tracker.rewards[0] == pytest.approx(1 + 99 * 0.9**11)
    resumed = RewardTracker(2, smoothing=0.9)
    tracker.update(np.array([1.0, np.nan]), weights)
    resumed.load_state_dict(tracker.state_dict())
    for own in (tracker, resumed):
        own.update(np.array([1.0, 5.0]), weights)
    assert resumed.rewards.tolist() == tracker.rewards.tolist()


def test_a_step_in_which_all_domains_align_better_earns_more() -> None:
    """Standardising across the domains of a step would give every step the same reward."""
    tracker = RewardTracker(2, smoothing=0.0)
    rng = np.random.default_rng(0)
    weights = np.array([0.7, 0.3])
    for _ in range(50):
        tracker.update(rng.normal(size=2), weights)
    poor = tracker.standardize(tracker.update(np.array([-1.0, -0.5]), weights))
    rich = tracker.standardize(tracker.update(np.array([1.0, 1.5]), weights))
    assert weights @ rich.numpy() > weights @ poor.numpy() + 1


# Guard rails --------------------------------------------------------------------------------------


def _warm_controller() -> MixingController:
    controller = MixingController(_policy())
    for iteration in range(1, 11):
        controller.decide(_observation(iteration))
    return controller


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"loss": np.array([2.0, np.nan, 2.0])}, "loss of b is nan"),
        ({"loss": np.array([2.0, np.inf, 2.0])}, "loss of b is inf"),
        ({"alignment": np.array([0.1, 0.1, np.inf])}, "alignment of c is inf"),
        ({"alignment": np.array([0.1, 1e300, 0.1])}, "alignment of b is 1e"),
        ({"alignment": None}, "no alignment was measured"),
    ],
)
def test_a_step_that_is_not_finite_is_dropped_and_said(
    caplog: pytest.LogCaptureFixture, fault: dict[str, Any], message: str
) -> None:
    controller = _warm_controller()
    before, replayed = controller.weights.copy(), controller.diagnostics()["replay_size"]
    with caplog.at_level(logging.WARNING):
        weights = controller.decide(_observation(11, **fault))
    assert weights.tolist() == before.tolist()
    assert message in caplog.text
    controller.decide(_observation(12))  # no transition spans the lost step
    assert controller.diagnostics()["replay_size"] == replayed
    controller.decide(_observation(13))
    assert controller.diagnostics()["replay_size"] == replayed + 1
    assert controller.diagnostics()["dropped_steps"] == 1


def test_a_domain_that_never_appears_is_no_fault() -> None:
    controller = MixingController(_policy())
    absent = {"samples": np.array([8, 8, 0])}
    for iteration in range(1, 31):
        seen = _observation(iteration, **absent)
        seen = replace(
            seen,
            loss=np.append(seen.loss[:2], np.nan),
            alignment=np.append(seen.alignment[:2], np.nan),  # type: ignore[index]
            affinity=np.where(np.arange(3)[:, None] < 2, seen.affinity, np.nan),
        )
        weights = controller.decide(seen)
        assert np.isfinite(weights).all() and weights[2] > 0
    assert controller.diagnostics()["dropped_steps"] == 0
    assert controller.policy_failures == 0
    assert np.isnan(controller.rewards[2])  # type: ignore[index]


def test_an_exception_in_the_agent_leaves_the_last_good_weights(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = _warm_controller()
    before = controller.weights.copy()
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(type(controller.policy.agent), "update", lambda *_: 1 / 0)  # type: ignore[attr-defined]
        weights = controller.decide(_observation(11))
    assert weights.tolist() == before.tolist()
    assert "ZeroDivisionError" in caplog.text and "last good weights" in caplog.text
    assert controller.decide(_observation(12)).tolist() != before.tolist()  # it recovers
    assert controller.diagnostics()["policy_failures"] == 1


def test_repeated_failures_are_logged_ever_more_rarely(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = _warm_controller()
    monkeypatch.setattr(controller.policy, "decide", lambda observation: 1 / 0)
    with caplog.at_level(logging.ERROR):
        for iteration in range(11, 111):
            controller.decide(_observation(iteration))
    assert controller.diagnostics()["policy_failures"] == 100
    assert len(caplog.records) == 7  # failures 1, 2, 4, ..., 64
    assert [record.exc_info is not None for record in caplog.records] == [True] + 6 * [False]


def test_an_exploding_critic_is_a_reported_failure_not_a_crash() -> None:
    controller = _warm_controller()
    with torch.no_grad():
        for parameter in controller.policy.agent.critic.network.parameters():  # type: ignore[attr-defined]
            parameter.fill_(float("inf"))
    before = controller.weights.copy()
    assert controller.decide(_observation(11)).tolist() == before.tolist()
    assert controller.policy_failures == 1


@pytest.mark.parametrize("bad", [[0.5, 0.5], [0.9, 0.2, 0.2], [np.nan, 0.5, 0.5], [1.5, -0.5, 0.0]])
def test_weights_that_are_no_mixture_are_refused(
    monkeypatch: pytest.MonkeyPatch, bad: list[float]
) -> None:
    controller = _warm_controller()
    before = controller.weights.copy()
    monkeypatch.setattr(controller.policy, "decide", lambda observation: np.array(bad))
    assert controller.decide(_observation(11)).tolist() == before.tolist()
    assert controller.policy_failures == 1


# Saving -------------------------------------------------------------------------------------------


def test_a_saved_controller_continues_bit_for_bit(tmp_path: Path) -> None:
    environment = ToyEnvironment(block_gram(3, helpful=2), seed=1, steps=60)
    controller = MixingController(_policy())
    play(controller, environment)
    save_state(tmp_path / "policy", controller.state_dict())
    restored = MixingController(_policy())
    restored.load_state_dict(load_state(tmp_path / "policy"))
    for iteration in range(61, 90):
        observation = _observation(iteration)
        assert restored.decide(observation).tolist() == controller.decide(observation).tolist()
    assert str(restored.diagnostics()) == str(controller.diagnostics())


_CONTINUE = """
import sys
from test_mixing import _observation, _policy
from megatron_acodm.mixing import MixingController, load_state

controller = MixingController(_policy())
controller.load_state_dict(load_state(sys.argv[1]))
for iteration in range(11, 21):
    print([weight.hex() for weight in controller.decide(_observation(iteration)).tolist()])
"""


def test_a_new_process_continues_bit_for_bit(tmp_path: Path) -> None:
    controller = _warm_controller()
    save_state(tmp_path / "policy", controller.state_dict())
    output = subprocess.run(
        [sys.executable, "-c", _CONTINUE, str(tmp_path / "policy")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = [
        str([weight.hex() for weight in controller.decide(_observation(iteration)).tolist()])
        for iteration in range(11, 21)
    ]
    assert output.splitlines() == expected


def test_a_state_of_any_leaves_survives_the_disk(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "numbers": [1, 2.5, float("inf"), True, None, "text", {"deep": [torch.tensor(7)]}],
        "views": {"left": shared[:3], "right": shared.view(2, 3).T, "none": torch.zeros(0, 4)},
        "bytes": torch.Generator().get_state(),
    }
    save_state(tmp_path / "state", state)
    assert str(load_state(tmp_path / "state")) == str(state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.safetensors"]


@pytest.mark.parametrize("leaf", [(1, 2), np.zeros(2), {"a/b": 1}, {1: 2}])
def test_what_a_state_cannot_hold_is_refused_with_its_place(tmp_path: Path, leaf: Any) -> None:
    with pytest.raises(ValueError, match="state/outer/0"):
        save_state(tmp_path / "state", {"outer": [leaf]})


def test_files_of_two_saves_do_not_mix(tmp_path: Path) -> None:
    controller = _warm_controller()
    save_state(tmp_path / "old", controller.state_dict())
    controller.decide(_observation(11))
    save_state(tmp_path / "new", controller.state_dict())
    (tmp_path / "new.json").replace(tmp_path / "old.json")  # a crash between the two files
    with pytest.raises(ValueError, match="does not belong to"):
        load_state(tmp_path / "old")


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_damaged_file_is_refused(tmp_path: Path, suffix: str) -> None:
    save_state(tmp_path / "policy", _warm_controller().state_dict())
    path = tmp_path / f"policy{suffix}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="policy"):
        load_state(tmp_path / "policy")
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="policy"):
        load_state(tmp_path / "policy")
    path.unlink()
    with pytest.raises(ValueError, match="policy"):
        load_state(tmp_path / "policy")


def test_state_of_another_policy_domains_or_shape_is_refused() -> None:
    state = _warm_controller().state_dict()
    with pytest.raises(ValueError, match="'acodm'.*'uniform'"):
        MixingController(_policy("uniform")).load_state_dict(state)
    other = build_policy(MixingConfig(), ["a", "b", "x"], SIZES, 4, 100, seed=5)
    with pytest.raises(ValueError, match="only saved: c; only in this run: x"):
        MixingController(other).load_state_dict(state)
    wide = MixingController(_policy(agent=AgentConfig(hidden_size=64)))
    with pytest.raises(ValueError, match="hidden_size"):
        wide.load_state_dict(state)


def test_the_agent_leaves_the_hosts_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    _warm_controller()
    assert torch.equal(torch.rand(4), expected)


def test_the_agent_seeds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded"))
    _warm_controller()


def test_exploration_that_is_over_does_not_begin_again_in_a_longer_run() -> None:
    agent = AgentConfig(replay_batch_size=100, exploration_fraction=0.05, exploration_std=0.1)
    policy, longer = _policy(agent=agent), _policy(agent=agent)
    for iteration in range(1, 10):
        policy.decide(_observation(iteration))
    longer.load_state_dict(policy.state_dict())
    before = policy.state_dict()
    actors = pytest.approx(policy.decide(_observation(10)), abs=1e-3)  # which progress moves little
    assert longer.decide(_observation(10, progress=10 / 1000)) == actors
    longer.load_state_dict(before | {"explores": True})
    assert longer.decide(_observation(10, progress=10 / 1000)) != actors


@pytest.mark.parametrize("count", [22, 100, 1000])
def test_exploration_leaves_most_of_the_mixture_however_many_domains(count: int) -> None:
    policy = build_policy(
        MixingConfig(), list(map(str, range(count))), np.ones(count), 4, 1000, seed=1
    )
    ones = np.ones(count)
    observation = Observation(
        1, 0.001, ones / count, ones.astype(int), ones > 0, ones, ones, ones,
        np.ones((count, count)), np.ones(4), np.ones(4),
    )  # fmt: skip
    moved = [np.abs(policy.decide(observation) - 1 / count).sum() / 2 for _ in range(20)]
    assert 0.1 < np.mean(moved) < 0.25
