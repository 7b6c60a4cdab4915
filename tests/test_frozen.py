"""Proxy mode: a policy learned in one run drives another, and nothing else passes for one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import ToyEnvironment, block_gram, play

from megatron_acodm.config import AgentConfig, MixingConfig
from megatron_acodm.mixing import MixingController, Observation, build_policy, save_state
from megatron_acodm.mixing.acodm import AcodmPolicy
from megatron_acodm.mixing.frozen import FrozenPolicy
from megatron_acodm.mixing.transfer import load_policy, save_policy

DOMAINS = list("abcdef")  # the first three pull together
STEPS = 300


def _learned(steps: int = STEPS) -> AcodmPolicy:
    agent = AgentConfig(objective="batch", prior_strength=0.0, reward_smoothing=0.9)
    config = MixingConfig(agent=agent)
    policy = build_policy(config, DOMAINS, np.ones(6), 4, steps, seed=0)
    play(MixingController(policy), ToyEnvironment(block_gram(6, 3), 0, steps))
    assert isinstance(policy, AcodmPolicy)
    return policy


@pytest.fixture(scope="module")
def learned() -> AcodmPolicy:
    return _learned()


@pytest.fixture(scope="module")
def file(learned: AcodmPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "proxy"
    save_policy(path, learned.exported({"steps": STEPS}))
    return path


def _frozen(
    file: Path, domains: Sequence[str] = DOMAINS, sizes: Any = (1,) * 6, steps: int = STEPS
) -> FrozenPolicy:
    config = MixingConfig(policy="frozen", policy_file=str(file))
    policy = build_policy(config, list(domains), np.array(sizes), 4, steps, seed=3)
    assert isinstance(policy, FrozenPolicy)
    return policy


@pytest.mark.parametrize(
    ("rails", "message"),
    [({"min_weight": 0.5}, "lower min_weight"), ({"max_weight": 0.01}, "raise max_weight")],
)
def test_rails_that_leave_no_mixture_are_refused(
    file: Path, rails: dict[str, float], message: str
) -> None:
    config = MixingConfig(policy="frozen", policy_file=str(file), **rails)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        build_policy(config, DOMAINS, np.ones(6), 4, STEPS, seed=3)


class LargerModel(ToyEnvironment):
    """The same domains in a run without gradients, of other losses, weights and length."""

    def step(self, iteration: int, weights: np.ndarray) -> Observation:
        seen = super().step(iteration, weights)
        assert seen.weight_norm is not None and seen.weight_delta_norm is not None
        return replace(
            seen,
            loss=0.6 * seen.loss - 0.3,
            alignment=None,
            grad_sq_norm=None,
            affinity=None,
            weight_norm=5 * seen.weight_norm,
            weight_delta_norm=0.1 * seen.weight_delta_norm,
        )


def test_a_policy_drives_a_run_of_another_scale_without_any_gradient(file: Path) -> None:
    policy = _frozen(file, steps=800)
    assert not policy.needs_alignment
    controller = MixingController(policy)
    drawn = play(controller, LargerModel(block_gram(6, 3), seed=9, steps=800))
    assert controller.dropped_steps == controller.policy_failures == 0
    assert np.mean(drawn[400:], axis=0)[:3].sum() > 0.85  # uniform: 0.5
    assert policy.bounds.contains(drawn[-1])


def test_domains_are_matched_by_name(file: Path) -> None:
    order = [5, 0, 3, 1, 4, 2]
    policy = _frozen(file, [DOMAINS[i] for i in order])
    plain = _frozen(file)
    np.testing.assert_allclose(policy.initial_weights, plain.initial_weights[order])
    environment = LargerModel(block_gram(6, 3), seed=9, steps=20)
    weights = plain.initial_weights
    for iteration in range(1, 21):
        seen = environment.step(iteration, weights)
        weights = plain.decide(seen)
        np.testing.assert_allclose(policy.decide(seen.in_order(np.array(order))), weights[order])


def test_a_domain_without_data_gets_nothing(file: Path) -> None:
    policy = _frozen(file, sizes=(1, 0, 1, 1, 1, 1))
    environment = LargerModel(block_gram(6, 3), seed=9, steps=30)
    for iteration in range(1, 21):
        weights = policy.decide(environment.step(iteration, policy.initial_weights))
        assert weights[1] == 0 and weights.sum() == pytest.approx(1.0)
    policy.restrict(np.array([True, False, False, True, True, True]))
    weights = policy.decide(environment.step(21, weights))
    assert weights[1] == weights[2] == 0 and weights.sum() == pytest.approx(1.0)
    assert policy.bounds.contains(weights)


def test_a_frozen_run_continues_bit_for_bit_and_with_the_same_policy_only(
    file: Path, tmp_path: Path
) -> None:
    environment = LargerModel(block_gram(6, 3), seed=9, steps=60)
    seen = [environment.step(i, np.full(6, 1 / 6)) for i in range(1, 61)]
    whole, first = _frozen(file), _frozen(file)
    expected = [whole.decide(observation) for observation in seen]
    for observation in seen[:30]:
        first.decide(observation)
    second = _frozen(file)
    second.load_state_dict(first.state_dict())
    for observation, weights in zip(seen[30:], expected[30:], strict=True):
        np.testing.assert_array_equal(second.decide(observation), weights)
    other = tmp_path / "other"
    save_policy(other, _learned(steps=60).exported({}))
    with pytest.raises(ValueError, match="another policy than mixing.policy_file"):
        _frozen(other).load_state_dict(first.state_dict())


def test_what_is_saved_is_safetensors_and_json_with_its_origin(
    learned: AcodmPolicy, file: Path
) -> None:
    assert sorted(path.suffix for path in file.parent.iterdir()) == [".json", ".safetensors"]
    text = json.dumps(json.loads(file.with_suffix(".json").read_text()))
    assert '"steps": 300' in text and "own running moments" in text
    for name in (file, file.with_suffix(".json"), file.with_suffix(".safetensors")):
        saved = load_policy(name)
        assert saved.domains == DOMAINS and saved.provenance == {"steps": 300}
    bound = learned.bounds.floor.max()
    assert saved.min_weight == bound


def test_what_used_up_domains_did_to_the_rails_is_not_saved(tmp_path: Path) -> None:
    config = MixingConfig(max_weight=0.3)
    policy = build_policy(config, DOMAINS, np.ones(6), 4, STEPS, seed=0)
    assert isinstance(policy, AcodmPolicy)
    policy.restrict(np.arange(6) < 2)
    assert policy.bounds.ceiling.max() == 0.5
    save_policy(tmp_path / "p", policy.exported({}))
    assert _frozen(tmp_path / "p").bounds.ceiling.max() == 0.3
    narrower = MixingConfig(
        policy="frozen", policy_file=str(tmp_path / "p"), min_weight=0.1, max_weight=0.2
    )
    bounds = build_policy(narrower, DOMAINS, np.ones(6), 4, STEPS, seed=0).bounds
    assert bounds.floor.max() == 0.1 and bounds.ceiling.max() == 0.2


def test_other_domains_are_refused_with_the_difference(file: Path) -> None:
    with pytest.raises(ValueError, match="only there: f; only in this run: g"):
        _frozen(file, list("abcdeg"))
    config = MixingConfig(policy="frozen", policy_file=str(file))
    with pytest.raises(ValueError, match="alignment.num_probes 2; set it to 4"):
        build_policy(config, DOMAINS, np.ones(6), 2, STEPS, seed=3)


def test_damaged_missing_and_foreign_files_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a policy: give mixing.policy_file"):
        build_policy(MixingConfig(policy="frozen"), DOMAINS, np.ones(6), 4, STEPS, seed=3)
    with pytest.raises(ValueError, match="policy_file is for policy 'frozen', not 'acodm'"):
        MixingConfig(policy_file="x")
    with pytest.raises(ValueError, match="cannot read the saved state"):
        _frozen(tmp_path / "absent")
    copy = tmp_path / "copy"
    for suffix in (".json", ".safetensors"):
        copy.with_suffix(suffix).write_bytes(file.with_suffix(suffix).read_bytes())
    blob = bytearray(copy.with_suffix(".safetensors").read_bytes())
    blob[-5] ^= 1
    copy.with_suffix(".safetensors").write_bytes(blob)
    with pytest.raises(ValueError, match="was altered"):
        _frozen(copy)
    save_state(copy, {"weights": [1.0]})
    with pytest.raises(ValueError, match="is no policy saved with --acodm-save-policy"):
        _frozen(copy)
    content = vars(load_policy(file))
    save_state(copy, {"kind": "megatron_acodm policy", "schema": "losses; 0"} | content)
    with pytest.raises(ValueError, match="is shown 'losses; 0'; this version shows 'samples"):
        _frozen(copy)


def test_a_frozen_run_leaves_the_hosts_random_numbers_alone(file: Path) -> None:
    """Else rank 0, which alone builds the policy, would begin with other weights than the rest."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    play(MixingController(_frozen(file)), LargerModel(block_gram(6, 3), 1, 10))
    assert torch.equal(torch.rand(4), expected)
