"""The step-time benchmark times each way of mixing on one model, and leaves Megatron as it was."""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import random
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from host import start_megatron

import megatron_acodm
from megatron_acodm.config import ESTIMATORS

TOOL = Path(__file__).parents[1] / "tools" / "benchmark_step_time.py"
NAMES = ["the static blend", "static under the mixer"]
LEARNING = [f"acodm, {estimator}" for estimator in ESTIMATORS]
NAMES += [*LEARNING, "frozen", "odm", "ado", "pike, sketch"]
TINY = [
    *("--shape", "pythia-14m", "--num-layers", "4", "--seq-length", "16", "--vocab-size", "256"),
    *("--micro-batch-size", "2", "--micro-batches", "6", "--domains", "3", "--rounds", "6"),
]


@functools.cache
def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_step_time", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool()


@pytest.fixture
def setting(tool: ModuleType) -> Iterator[Any]:
    """A trainer and its candidates in this process."""
    start_megatron()
    _, args = tool.parse_arguments(TINY)
    yield tool.Trainer(args, torch.device("cpu")), tool.build_candidates(args, 3)
    megatron_acodm.unpatch()
    gc.enable()


def test_candidates_take_turns_on_one_model_and_each_goes_on_with_its_own_run(
    tool: ModuleType, setting: Any
) -> None:
    trainer, candidates = setting
    assert [candidate.name for candidate in candidates] == NAMES
    weight = next(trainer.model.chunks[0].parameters())
    for turn in (1, 2):
        for candidate in candidates:
            before = weight.detach().clone()
            assert trainer.measure(candidate) == candidate.step_s[-1] > 0
            assert not torch.equal(before, weight)
            if candidate.mixer is not None:
                statistics = candidate.report.statistics
                assert candidate.iteration == 2 * turn
                assert candidate.mixer.ledger.num_samples == (2 * turn + 2) * 12  # decided ahead
                assert np.isfinite(statistics.loss[statistics.tokens > 0]).all()
                assert statistics.tokens.sum() == 12 * 16


def test_the_agent_learns_in_every_timed_step(setting: Any) -> None:
    trainer, candidates = setting
    for candidate in candidates:
        if candidate.name not in LEARNING:
            continue
        losses = set()
        for _ in range(2):
            trainer.measure(candidate)
            losses.add(candidate.report.diagnostics["critic_loss"])
        assert len(losses) == 2


def test_a_policy_that_takes_no_part_ends_the_benchmark(setting: Any) -> None:
    trainer, candidates = setting
    learner = next(candidate for candidate in candidates if candidate.name in LEARNING)
    learner.mixer.controller.policy.agent.update = None  # fails, and the run would go on
    with pytest.raises(RuntimeError, match="took no part in a step"):
        trainer.measure(learner)


def test_megatron_and_the_model_are_as_before_after_a_candidates_step(
    tool: ModuleType, setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.pipeline_parallel import schedules

    trainer, candidates = setting
    estimators = []
    take_report = tool.take_report

    def take_report_and_note_the_estimator(candidate: Any, step: Any) -> None:
        take_report(candidate, step)
        estimators.append(weakref.ref(candidate.mixer.measurement.estimator))

    monkeypatch.setattr(tool, "take_report", take_report_and_note_the_estimator)
    gc.disable()
    original, finalize = schedules.forward_step, trainer.model.config.finalize_model_grads_func
    for candidate in candidates:
        trainer.measure(candidate)
        assert schedules.forward_step is original
        assert trainer.model.config.finalize_model_grads_func is finalize
        for module in trainer.model.chunks[0].modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
        for parameter in trainer.model.chunks[0].parameters():
            assert not parameter._backward_hooks
    # Or one candidate's memory would count as another's.
    assert [estimator() for estimator in estimators] == [None] * (len(NAMES) - 1)


def test_the_interval_encloses_the_median_as_often_as_it_says(tool: ModuleType) -> None:
    assert tool.median_interval([3, 1, 2, 6, 5, 4]) == (1, 6)
    assert tool.median_interval(range(1, 16)) == (4, 12)  # tables of the sign test
    assert tool.median_interval(range(1, 31)) == (10, 21)
    with pytest.raises(ValueError, match="5 values leave no 95% interval"):
        tool.median_interval(range(5))
    draw = random.Random(1)
    hits = 0
    for _ in range(2000):
        low, high = tool.median_interval([draw.expovariate(1.0) for _ in range(15)])
        hits += low <= np.log(2) <= high
    assert 0.94 < hits / 2000 < 0.99


def test_a_verdict_needs_the_whole_interval(tool: ModuleType) -> None:
    def verdict_of(*over: float) -> Any:
        static = tool.Candidate(
            "the static blend", None, dict, 0, [1.0] * 8, [], None, {"peak_bytes": 0}
        )
        steps = [1.0, 1.0] + [1.0 + part for part in over]
        waits = [(0.002, 0.001)] * 8
        own = tool.Candidate(
            "acodm, sketch", object(), dict, 0, steps, waits, None, {"peak_bytes": 5}
        )
        row = tool.summarize([static, own], "pythia-70m", "cpu")[1]
        assert row["over_static"] == pytest.approx(np.median(over))
        assert (row["measuring_s"], row["ends_s"]) == pytest.approx((0.001, 0.001))
        assert row["extra_peak_bytes"] == 5
        return row["verdict"]

    assert verdict_of(*[0.01] * 6) == "met"
    assert verdict_of(*[0.02] * 6) == "missed"
    assert verdict_of(*[0.01] * 5, 0.02) == "within noise"


def test_memory_is_counted_once_a_storage(tool: ModuleType) -> None:
    whole = torch.zeros(100)

    class Owner:
        def __init__(self) -> None:
            self.parts = [whole[:10], whole[10:], (whole,)]
            self.layer = torch.nn.Linear(3, 2)
            self.itself = {"key": self}

    assert tool.tensor_bytes(Owner()) == 4 * (100 + 3 * 2 + 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", "5"), "--rounds is 5; a 95% interval needs 6 or more"),
        (("--device", "cuda"), "finds no CUDA device; use --device cpu"),
        (("--micro-batches", "0"), "--global-batch-size is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(
    tool: ModuleType,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as error:
        tool.parse_arguments([*TINY, *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_a_table_and_writes_the_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(TOOL), *TINY, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text(encoding="utf-8"))
    rows = {row["candidate"]: row for row in figures["candidates"]}
    assert list(rows) == NAMES
    assert all(name in done.stdout for name in NAMES)
    for row in rows.values():
        assert len(row["steps_s"]) == 6 and row["median_step_s"] > 0
    for name in NAMES[1:]:
        low, high = rows[name]["over_static_95"]
        assert low <= rows[name]["over_static"] <= high
        assert 0 < rows[name]["measuring_s"] < rows[name]["mixing_s"] < rows[name]["median_step_s"]
    numbers = 3 * 2 * 4 * 128**2  # K rows of the fc2 weights of two layers
    assert rows["acodm, exact"]["estimator_bytes"] > 4 * numbers
    assert rows["acodm, exact"]["reduced_bytes"] > 4 * numbers
    assert rows["acodm, sketch"]["reduced_bytes"] < 4 * numbers
    assert rows["static under the mixer"]["reduced_bytes"] < 1000
    assert rows["frozen"]["reduced_bytes"] < 1000 < rows["pike, sketch"]["reduced_bytes"]


def test_only_the_candidates_asked_for_are_timed(tool: ModuleType) -> None:
    start_megatron()
    options, args = tool.parse_arguments([*TINY, "--candidates", "frozen"])
    candidates = tool.build_candidates(args, 3, options.candidates)
    assert [candidate.name for candidate in candidates] == ["the static blend", "frozen"]
    with pytest.raises(ValueError, match="no candidate 'doge'; they are static under the mixer"):
        tool.build_candidates(args, 3, ["doge"])
