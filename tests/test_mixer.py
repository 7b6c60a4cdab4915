"""A run's mixer at the edges: used-up data, other data on a resume, weights of zero."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host import forward_backward, micro_batches, tiny_model

import megatron_acodm
from megatron_acodm import AcodmConfig, Mixer, RunShape, load_sidecar, save_sidecar
from megatron_acodm.config import AgentConfig, AlignmentConfig, BlendingConfig, MixingConfig
from megatron_acodm.megatron.measurement import StepMeasurement
from megatron_acodm.megatron.model import TrainingModel

ALIGNMENT = AlignmentConfig(depths=(1.0,), num_probes=2)
LEARNING = AgentConfig(
    hidden_size=16, replay_batch_size=2, exploration_fraction=1.0, exploration_std=0.2
)
BATCHES = micro_batches(8, seed=3)


@pytest.fixture(scope="module")
def model() -> TrainingModel:
    return tiny_model()


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    megatron_acodm.unpatch()


def _mixer(
    model: TrainingModel,
    sizes: dict[str, int],
    *,
    policy: str = "acodm",
    given: dict[str, float] | None = None,
    weights: list[float] | None = None,
    batch: int = 16,
    steps: int = 40,
    checksums: list[int] | None = None,
    **blending: Any,
) -> Mixer:
    megatron_acodm.unpatch()
    config = AcodmConfig(
        mixing=MixingConfig(policy=policy, weights=given, agent=LEARNING),
        blending=BlendingConfig(**blending),
        alignment=ALIGNMENT,
    )
    mixer = megatron_acodm.patch(config, RunShape(steps, batch, 2))
    assert mixer is not None
    checksums = checksums or [0] * len(sizes)
    mixer.bind(list(sizes), list(sizes.values()), weights, [None], checksums)
    mixer.attach(model.chunks)
    return mixer


def _train(mixer: Mixer, model: TrainingModel, done: int = 0, until: int = 40) -> int:
    """Take steps, with a gradient that depends on the iteration alone; return the last."""
    iteration, consumed = done, mixer.run.samples_before(done)
    while iteration < until and (count := mixer.num_samples(consumed)):
        iteration += 1
        batches = [BATCHES[(iteration + i) % len(BATCHES)] for i in range(count // 2)]
        with mixer.step(iteration, consumed):
            forward_backward(model, batches)
        consumed += count
    return iteration


def _save(mixer: Mixer, folder: Path, iteration: int) -> Path:
    save_sidecar(mixer, folder, iteration)
    return folder


def _weights(mixer: Mixer, iteration: int) -> np.ndarray:
    return mixer.ledger.weights_at(mixer.run.samples_before(iteration - 1))


def test_a_weight_of_zero_in_the_hosts_blend_stays_zero_under_the_agent(
    model: TrainingModel,
) -> None:
    mixer = _mixer(model, {"a": 100, "b": 100, "c": 100}, weights=[0.0, 0.5, 0.5])
    _train(mixer, model, until=4)
    assert mixer.ledger.drawn[0] == 0
    assert (_weights(mixer, 5)[1:] > 0.1).all()


@pytest.mark.parametrize("policy", ["acodm", "uniform"])
def test_a_repetition_that_is_an_error_is_never_evaded(model: TrainingModel, policy: str) -> None:
    sizes = {"small": 21, "web": 3000, "code": 3000}  # an odd number: a sequence is left over
    mixer = _mixer(model, sizes, policy=policy, repetition="error", minimum_quota=1)
    last = _train(mixer, model)
    assert last < 40
    assert "small (21 sequences) would be gone through more than 1 times" in str(mixer.exhausted)
    assert mixer.ledger.drawn[0] <= 20
    for iteration in range(1, last + 1):
        assert _weights(mixer, iteration)[0] > 0


def test_a_run_that_ended_starts_again_with_every_domain_once_its_cap_is_gone(
    model: TrainingModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"a": 30, "b": 30, "c": 90}
    mixer = _mixer(model, sizes, repetition="cap 1")
    last = _train(mixer, model)
    assert mixer.exhausted is not None
    assert "FAILED" not in caplog.text
    assert (_weights(mixer, last) == 0).any()
    saved = _save(mixer, tmp_path, last)
    same = _mixer(model, sizes, repetition="cap 1")
    assert load_sidecar(same, saved, last)
    assert _train(same, model, done=last) == last
    longer = _mixer(model, sizes, repetition="repeat")
    assert load_sidecar(longer, saved, last)
    assert _train(longer, model, done=last, until=last + 4) == last + 4
    for iteration in range(last + 1, last + 5):
        assert (_weights(longer, iteration) > 0).all()


def test_new_data_of_a_domain_that_was_used_up_is_drawn_from_the_first_step_on(
    model: TrainingModel, tmp_path: Path
) -> None:
    mixer = _mixer(model, {"a": 30, "b": 30, "c": 90}, repetition="cap 1")
    last = _train(mixer, model)
    saved = _save(mixer, tmp_path, last)
    new = {"a": 5000, "b": 5000, "c": 90}
    more = _mixer(model, new, repetition="cap 1", checksums=[1, 2, 0])
    with pytest.raises(
        ValueError, match="'a': saved with 30 sequences, now has 5000.*(.|\n)*adopt"
    ):
        load_sidecar(more, saved, last)
    assert load_sidecar(more, saved, last, adopt=True)
    before = more.ledger.drawn_before(mixer.run.samples_before(last))
    assert before.tolist() == [0, 0, mixer.ledger.drawn_before(mixer.run.samples_before(last))[2]]
    assert _train(more, model, done=last, until=last + 3) == last + 3
    assert (more.ledger.counts(mixer.run.samples_before(last), 16)[:2] > 0).all()
    # What was adopted can be adopted again.
    saved = _save(more, tmp_path / "again", last + 3)
    third = _mixer(model, {**new, "d": 40}, repetition="cap 1", checksums=[1, 2, 0, 3])
    assert load_sidecar(third, saved, last + 3, adopt=True)
    at = more.run.samples_before(last + 3)
    assert third.ledger.drawn_before(at).tolist() == [*more.ledger.drawn_before(at), 0]


@pytest.mark.parametrize("repetition", ["error", "cap 1"])
@pytest.mark.parametrize("back", [0, 1, 2, 3])
def test_a_run_near_the_end_of_its_data_is_resumed_as_if_never_interrupted(
    model: TrainingModel, tmp_path: Path, repetition: str, back: int
) -> None:
    settings: dict[str, Any] = {"repetition": repetition, "decision_lag": 3, "minimum_quota": 0}
    sizes = {"small": 24, "web": 100, "code": 90}
    whole = _mixer(model, sizes, **settings)
    last = _train(whole, model)
    assert 4 < last < 40
    first = _mixer(model, sizes, **settings)
    _train(first, model, until=last - back)
    saved = _save(first, tmp_path, last - back)
    rest = _mixer(model, sizes, **settings)
    load_sidecar(rest, saved, last - back)
    assert _train(rest, model, done=last - back) == last
    at = np.arange(whole.run.samples_before(last))
    for ours, reference in zip(rest.ledger.locate(at), whole.ledger.locate(at), strict=True):
        np.testing.assert_array_equal(ours, reference)


def test_a_run_that_its_data_just_suffices_for_is_not_refused_for_what_lies_behind_its_end(
    model: TrainingModel,
) -> None:
    sizes = {"a": 16, "b": 16}
    mixer = _mixer(model, sizes, policy="uniform", steps=2, repetition="cap 1", decision_lag=5)
    assert _train(mixer, model, until=2) == 2
    with pytest.raises(ValueError, match="not enough data for the first step"):
        _mixer(model, {"a": 5, "b": 5}, policy="uniform", repetition="cap 1")


def test_a_domain_smaller_than_a_granule_is_named_under_a_cap(
    model: TrainingModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _mixer(model, {"web": 100, "tiny": 1}, policy="uniform", repetition="cap 1")
    assert "tiny: fewer sequences than a granule of 2" in caplog.text


def test_static_weights_are_adopted_along_with_the_domains(
    model: TrainingModel, tmp_path: Path
) -> None:
    mixer = _mixer(model, {"a": 50, "b": 50}, policy="static", given={"a": 1, "b": 1})
    _train(mixer, model, until=3)
    saved = _save(mixer, tmp_path, 3)
    other = _mixer(model, {"a": 50, "c": 50}, policy="static", given={"a": 1, "c": 3})
    with pytest.raises(ValueError, match="'b': saved, but missing now(.|\n)*mixing.weights: saved"):
        load_sidecar(other, saved, 3)
    assert load_sidecar(other, saved, 3, adopt=True)
    assert _weights(other, 4).tolist() == [0.25, 0.75]
    assert other.ledger.drawn_before(48).tolist() == [mixer.ledger.drawn_before(48)[0], 0]


def test_weights_of_the_blend_count_by_their_shares(model: TrainingModel, tmp_path: Path) -> None:
    sizes = {"a": 50, "b": 50}
    mixer = _mixer(model, sizes, weights=[9.0, 1.0])
    _train(mixer, model, until=1)
    _save(mixer, tmp_path, 1)
    assert load_sidecar(_mixer(model, sizes, weights=[0.9, 0.1]), tmp_path, 1)
    for other in ([1.0, 9.0], None):
        with pytest.raises(ValueError, match="blend weights: saved(.|\n)*--acodm-adopt"):
            load_sidecar(_mixer(model, sizes, weights=other), tmp_path, 1)
    assert load_sidecar(_mixer(model, sizes, weights=[1.0, 9.0]), tmp_path, 1, adopt=True)


def test_the_order_in_which_weights_are_given_does_not_matter(
    model: TrainingModel, tmp_path: Path
) -> None:
    sizes = {"a": 50, "b": 50}
    mixer = _mixer(model, sizes, policy="static", given={"a": 1, "b": 3})
    _train(mixer, model, until=1)
    _save(mixer, tmp_path, 1)
    assert load_sidecar(_mixer(model, sizes, policy="static", given={"b": 6, "a": 2}), tmp_path, 1)


def test_a_checkpoint_without_our_folder_goes_on_with_a_fresh_policy(
    model: TrainingModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mixer = _mixer(model, {"a": 50, "b": 50})
    with caplog.at_level(logging.WARNING):
        assert not load_sidecar(mixer, tmp_path, 10)
    assert "the policy starts afresh" in caplog.text
    assert mixer.ledger.drawn_before(160).tolist() == [0, 0]
    assert _train(mixer, model, done=10, until=12) == 12


def test_a_folder_of_another_format_is_refused(model: TrainingModel, tmp_path: Path) -> None:
    mixer = _mixer(model, {"a": 50, "b": 50})
    _train(mixer, model, until=1)
    _save(mixer, tmp_path, 1)
    file = tmp_path / "acodm" / "acodm.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["format"]  # as the first version wrote it
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="has format None.*resume with the version that saved it"):
        load_sidecar(mixer, tmp_path, 1)


def test_the_advice_to_adopt_is_given_for_domains_only(
    model: TrainingModel, tmp_path: Path
) -> None:
    mixer = _mixer(model, {"a": 50, "b": 50})
    _train(mixer, model, until=1)
    _save(mixer, tmp_path, 1)
    with pytest.raises(ValueError, match="decision lag: saved 1, now 0") as caught:
        load_sidecar(_mixer(model, {"a": 50, "b": 50}, decision_lag=0), tmp_path, 1)
    assert "--acodm-adopt" not in str(caught.value)
    with pytest.raises(ValueError, match="order of the domains(.|\n)*--acodm-adopt"):
        load_sidecar(_mixer(model, {"b": 50, "a": 50}), tmp_path, 1)


def _hold_decisions(mixer: Mixer, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Keep the policy from deciding until the event is set."""
    assert mixer.controller is not None
    go_on, decide = threading.Event(), mixer.controller.policy.decide

    def held(observation: Any) -> np.ndarray:
        assert go_on.wait(timeout=60), "the step waited for the decision"
        return decide(observation)

    monkeypatch.setattr(mixer.controller.policy, "decide", held)
    return go_on


def test_the_next_step_runs_while_a_decision_is_made(
    model: TrainingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"a": 100, "b": 100, "c": 100}
    free = _mixer(model, sizes)
    _train(free, model, until=4)
    expected = [_weights(free, iteration) for iteration in range(1, 7)]
    mixer = _mixer(model, sizes)
    go_on = _hold_decisions(mixer, monkeypatch)
    _train(mixer, model, until=1)
    with mixer.step(2, 16):
        forward_backward(model, [BATCHES[(2 + i) % len(BATCHES)] for i in range(8)])
        assert not go_on.is_set()
        go_on.set()
    _train(mixer, model, done=2, until=4)
    for iteration, weights in enumerate(expected, start=1):
        np.testing.assert_array_equal(_weights(mixer, iteration), weights)
    assert len({tuple(weights) for weights in expected}) > 2


def test_who_asks_from_outside_gets_what_the_last_step_decided(model: TrainingModel) -> None:
    mixer = _mixer(model, {"a": 100, "b": 100, "c": 100})
    for iteration in (1, 2, 3):
        _train(mixer, model, done=iteration - 1, until=iteration)
        assert mixer.ledger.num_samples == 16 * (iteration + 2)  # with a lag of 1


@pytest.mark.parametrize("lag", [0, 1])
def test_without_a_lag_the_step_ends_with_its_decision(
    model: TrainingModel, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    mixer = _mixer(model, {"a": 100, "b": 100, "c": 100}, decision_lag=lag)
    go_on = _hold_decisions(mixer, monkeypatch)
    waited = []

    def settle(self: Mixer, original: Any = Mixer._settle) -> None:
        if self._pending is not None:
            waited.append(self._pending)
            go_on.set()  # who waits lets it go
        original(self)

    monkeypatch.setattr(Mixer, "_settle", settle)
    with mixer.step(1, 0) as step:
        forward_backward(model, BATCHES)
    assert bool(waited) == step.is_decided == (lag == 0)


def test_a_domain_whose_tokens_are_all_masked_counts_as_not_drawn(
    model: TrainingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = _mixer(model, {"a": 100, "b": 100, "c": 100})
    add_losses = StepMeasurement._add_losses

    def without_domain_0(self: StepMeasurement) -> None:
        add_losses(self)
        self.estimator.extra.view(3, 3)[:, 0] = 0.0

    monkeypatch.setattr(StepMeasurement, "_add_losses", without_domain_0)
    assert _train(mixer, model, until=4) == 4
    assert mixer.controller is not None
    assert mixer.controller.dropped_steps == mixer.controller.policy_failures == 0


EXIT_WITH_A_PENDING_TASK = """
import sys, threading, time
import torch
from megatron_acodm.megatron.background import Background

released = threading.Event()
background = Background(torch.device("cpu"), released.set)
if sys.argv[1] == "busy":
    ones = torch.ones(200, 200)
    background.submit(lambda: [ones @ ones for _ in range(3000)])
else:  # as in a broadcast that another rank never joins
    background.submit(lambda: released.wait(600))
time.sleep(0.1)
raise RuntimeError("the user's own error")
"""


@pytest.mark.parametrize("task", ["busy", "stuck"])
def test_a_process_that_ends_during_a_decision_ends_with_its_own_error(task: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT_WITH_A_PENDING_TASK, task],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("RuntimeError: the user's own error\n")


def test_a_step_has_no_report_before_its_end(model: TrainingModel) -> None:
    mixer = _mixer(model, {"a": 100, "b": 100, "c": 100})
    with mixer.step(1, 0) as step:
        with pytest.raises(RuntimeError, match="the step is not over"):
            step.report()
        forward_backward(model, BATCHES)
    assert step.report().samples.sum() == 16
