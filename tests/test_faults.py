"""Training survives what goes wrong in it, says what happened, and keeps to a mixture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Corpus, Run, Train
from toy import ToyEnvironment, block_gram

from megatron_acodm.config import AgentConfig, MixingConfig
from megatron_acodm.mixing import MixingController, build_policy

NAN_LOSS, INF_GRADIENT, RAISING_AGENT, EXPLODED_CRITIC, RAISING_RECORD, NO_TOKENS = range(4, 20, 3)
STEPS = 21

_FAULTY_TRAINING = f"""
import torch
import torch.distributed as dist
from megatron_acodm import train as door

set_up = door._set_up

class InfGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, output):
        return output.clone()

    @staticmethod
    def backward(context, gradient):
        return torch.full_like(gradient, float("inf"))

def faulty_set_up(args):
    from megatron_acodm.megatron import losses as module

    trainer, honest_loss = set_up(args), module.loss_func
    masked = []

    def loss_func(mask, output, by_sequence=False):
        if trainer.iteration == {NAN_LOSS} and dist.get_rank() == 1:
            output = output * float("nan")
        if trainer.iteration == {INF_GRADIENT} and dist.get_rank() == 1:
            output = InfGradient.apply(output)
        if trainer.iteration == {NO_TOKENS}:
            first = trainer.run.samples_before(trainer.iteration - 1)
            domain = trainer.mixer.micro_batch_domains(first)[len(masked)][0]
            masked.append(domain)
            mask = mask * float(domain != 1)
        return honest_loss(mask, output, by_sequence)

    module.loss_func = loss_func
    if dist.get_rank() == 0:
        policy = trainer.mixer.controller.policy
        decide, diagnostics = policy.decide, policy.diagnostics

        def faulty_decide(observation):
            if observation.iteration == {RAISING_AGENT}:
                raise RuntimeError("injected into the decision")
            if observation.iteration == {EXPLODED_CRITIC}:
                with torch.no_grad():
                    for parameter in policy.agent.critic.network.parameters():
                        parameter.fill_(float("inf"))
            policy.iteration = observation.iteration
            return decide(observation)

        def faulty_diagnostics():
            if policy.iteration == {RAISING_RECORD}:
                raise LookupError("injected into the diagnostics")
            return diagnostics()

        policy.decide, policy.diagnostics = faulty_decide, faulty_diagnostics
    return trainer

door._set_up = faulty_set_up
door.main()
"""


@pytest.fixture(scope="module")
def faulty(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two data-parallel processes, and a fault in every third step."""
    folder = tmp_path_factory.mktemp("faulty")
    config = folder / "mix.yaml"
    config.write_text(
        "mixing: {initial_weights: uniform, agent: {replay_batch_size: 2, actor_lr: 0.001, "
        "exploration_fraction: 1.0}}\n",
        encoding="utf-8",
    )
    script = folder / "faulty_train.py"
    script.write_text(_FAULTY_TRAINING, encoding="utf-8")
    arguments = ("--train-iters", str(STEPS), "--eval-interval", "0", "--acodm-config", str(config))
    return train(*arguments, processes=2, directory=folder, script=script)


def _diagnostics(run: Run, step: int) -> dict[str, Any]:
    return run.steps[step - 1]["diagnostics"]


def _decided_by(run: Run, step: int) -> list[float]:
    """The weights that followed from a step: with a lag of 1, they draw the second one after it."""
    return [domain["weight"] for domain in run.steps[step + 1]["domains"].values()]


def test_training_reaches_its_last_step_on_a_mixture_whatever_was_injected(faulty: Run) -> None:
    assert faulty.code == 0, faulty.output
    assert [line["iteration"] for line in faulty.steps] == list(range(1, STEPS + 1))
    for line in faulty.steps:
        weights = [domain["weight"] for domain in line["domains"].values()]
        assert sum(weights) == pytest.approx(1.0) and min(weights) > 0.03  # a tenth of uniform
    assert faulty.steps[-1]["lm_loss"] < faulty.steps[0]["lm_loss"]


@pytest.mark.parametrize(
    ("step", "fault"),
    [(NAN_LOSS, r"loss of .* is nan"), (INF_GRADIENT, r"alignment of .* is (nan|-?inf)")],
    ids=["NaN loss on one rank", "Inf gradient on one rank"],
)
def test_a_step_that_is_not_finite_on_one_rank_is_dropped_by_all(
    faulty: Run, step: int, fault: str
) -> None:
    before, at = _diagnostics(faulty, step - 1), _diagnostics(faulty, step)
    assert at["dropped_steps"] == before["dropped_steps"] + 1
    assert at["replay_size"] == before["replay_size"]
    assert _diagnostics(faulty, step + 1)["replay_size"] == before["replay_size"]
    assert _diagnostics(faulty, step + 2)["replay_size"] == before["replay_size"] + 1
    assert _decided_by(faulty, step) == _decided_by(faulty, step - 1)
    assert _said(faulty, rf"WARNING: step {step} is dropped from mixing: {fault}")
    assert _said(faulty, rf"step {step}: the gradient norm is (nan|inf); the update was skipped")


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        (RAISING_AGENT, "RuntimeError: injected into the decision"),
        (EXPLODED_CRITIC, "FloatingPointError: the Critic has run away"),
    ],
    ids=["exception inside the agent", "exploding critic"],
)
def test_a_failing_agent_leaves_the_last_good_weights_and_recovers(
    faulty: Run, step: int, fault: str
) -> None:
    before, at = _diagnostics(faulty, step - 1), _diagnostics(faulty, step)
    assert at["policy_failures"] == before["policy_failures"] + 1
    assert _diagnostics(faulty, step + 1)["policy_failures"] == at["policy_failures"]
    assert _decided_by(faulty, step) == _decided_by(faulty, step - 1)
    assert _decided_by(faulty, step + 1) != _decided_by(faulty, step)
    assert _said(faulty, rf"ERROR: POLICY acodm FAILED at step {step}: {fault}")
    assert _said(faulty, "Training continues on the last good weights")


def test_a_failure_outside_of_the_decision_costs_only_what_was_asked_for(faulty: Run) -> None:
    assert "replay_size" not in _diagnostics(faulty, RAISING_RECORD)
    assert _diagnostics(faulty, RAISING_RECORD)["policy_failures"] == 3
    assert _decided_by(faulty, RAISING_RECORD) != _decided_by(faulty, RAISING_RECORD - 1)


def test_a_share_without_a_token_is_not_divided_by(faulty: Run) -> None:
    name = list(faulty.steps[0]["domains"])[1]
    before, at, after = (
        step["domains"][name] for step in faulty.steps[NO_TOKENS - 2 : NO_TOKENS + 1]
    )
    assert at["samples"] > 0 and at["loss"] is None
    assert at["reward"] == before["reward"] != after["reward"]
    figures = [_diagnostics(faulty, step) for step in (NO_TOKENS - 1, NO_TOKENS)]
    assert figures[1]["dropped_steps"] == figures[0]["dropped_steps"]
    assert figures[1]["replay_size"] == figures[0]["replay_size"] + 1
    assert _decided_by(faulty, NO_TOKENS) != _decided_by(faulty, NO_TOKENS - 1)


def test_the_run_ends_with_what_its_guard_rails_did(faulty: Run) -> None:
    end = faulty.output[faulty.output.index("mixing took") :]
    assert "note: 2 steps dropped from mixing, as a loss or gradient was not finite: steps " in end
    assert f"steps {NAN_LOSS}, {INF_GRADIENT}." in end
    assert (
        "note: The policy failed 3 times, and training went on with the last good weights: " in end
    )
    assert f"steps {RAISING_AGENT}, {EXPLODED_CRITIC}, {RAISING_RECORD}." in end


def test_a_domain_that_never_appears_is_no_fault_of_a_run(
    train: Train, corpus: Corpus, tmp_path: Path
) -> None:
    config = tmp_path / "mix.yaml"
    config.write_text(
        "mixing: {min_weight: 0.0001, agent: {replay_batch_size: 2, exploration_fraction: 0.0}}\n"
        "blending: {minimum_quota: 0}\n",
        encoding="utf-8",
    )
    prefixes = sorted(
        path.with_suffix("") for path in corpus.manifest.parent.glob("*_text_document.bin")
    )
    blend = [part for weight, path in zip((1e-4, 1, 1), prefixes, strict=True)
             for part in (str(weight), str(path))]  # fmt: skip
    arguments = ("--train-iters", "8", "--eval-interval", "0", "--acodm-config", str(config))
    run = train(*arguments, "--tokenizer-type", "ByteLevelTokenizer", data=tuple(blend))
    assert run.code == 0, run.output
    assert len(run.steps) == 8
    for line in run.steps:
        rare, *others = line["domains"].values()
        assert rare["samples"] == 0 and rare["loss"] is None and rare["reward"] is None
        assert 0 < rare["weight"] < 0.02
        assert all(domain["reward"] is not None for domain in others)
        figures = line["diagnostics"]
        assert figures["dropped_steps"] == figures["policy_failures"] == 0
    assert run.steps[-1]["diagnostics"]["replay_size"] == 7  # every step teaches


def _warm_controller(gamma: float = 0.5) -> tuple[MixingController, ToyEnvironment]:
    config = MixingConfig(agent=AgentConfig(replay_batch_size=4, gamma=gamma))
    policy = build_policy(config, ["a", "b", "c"], np.ones(3), 4, 100, seed=5)
    controller, environment = MixingController(policy), ToyEnvironment(block_gram(3, 2), 1, 100)
    for iteration in range(1, 11):
        controller.decide(environment.step(iteration, controller.weights))
    return controller, environment


@pytest.mark.parametrize("method", ["decide", "interrupt", "diagnostics", "rewards"])
def test_wherever_the_agent_raises_the_controller_answers(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    controller, environment = _warm_controller()

    def fail(*_: Any) -> Any:
        raise RuntimeError(f"injected into {method}")

    value = property(fail) if method == "rewards" else fail
    with monkeypatch.context() as patch:
        patch.setattr(type(controller.policy), method, value)
        if method == "interrupt":  # called for a step that is dropped
            patch.setattr(controller, "_fault", lambda observation: "injected")
        weights = controller.decide(environment.step(11, controller.weights))
        assert weights.sum() == pytest.approx(1.0)
        assert (controller.rewards is None) == (method == "rewards")
        assert controller.diagnostics()["policy_failures"] == 1
    assert f"FAILED at step 11: RuntimeError: injected into {method}" in caplog.text
    controller.decide(environment.step(12, controller.weights))
    assert controller.diagnostics()["policy_failures"] == 1
    assert controller.rewards is not None


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("scale", [10.0, 1e2, 1e4, 1e8, 1e15, float("inf"), float("nan")])
def test_a_critic_that_runs_away_is_put_back_to_its_target_and_learns_on(
    scale: float, gamma: float
) -> None:
    controller, environment = _warm_controller(gamma)
    critic = controller.policy.agent.critic  # type: ignore[attr-defined]
    head = critic.network.net[-1].weight.data
    head.copy_(scale * torch.randn(head.shape, generator=torch.Generator().manual_seed(0)))
    before = controller.weights.copy()
    controller.decide(environment.step(11, controller.weights))
    assert controller.policy_failures == 1
    assert controller.weights.tolist() == before.tolist()
    for left, right in zip(critic.network.parameters(), critic.target.parameters(), strict=True):
        assert left.isfinite().all() and left.equal(right)
    for iteration in range(12, 20):
        controller.decide(environment.step(iteration, controller.weights))
    assert controller.policy_failures == 1
    assert controller.diagnostics()["critic_loss"] < 1e2
    assert controller.weights.tolist() != before.tolist()
    assert np.abs(controller.weights - before).max() < 0.1


def test_a_critic_whose_target_has_run_away_too_begins_anew() -> None:
    controller, environment = _warm_controller()
    critic = controller.policy.agent.critic  # type: ignore[attr-defined]
    for network in (critic.network, critic.target):
        network.net[-1].bias.data.fill_(1e3)
    for iteration in range(11, 30):
        controller.decide(environment.step(iteration, controller.weights))
    assert controller.policy_failures == 1
    assert controller.diagnostics()["critic_loss"] < 1e2


def _said(run: Run, pattern: str) -> bool:
    return re.search(pattern, run.output) is not None
