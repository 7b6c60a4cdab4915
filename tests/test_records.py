"""What is written down of a run is there when the run breaks off."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from host import start_megatron

from megatron_acodm import RunShape
from megatron_acodm.megatron.records import FinishedStep, Recorder


@pytest.fixture
def records(tmp_path: Path) -> Recorder:
    start_megatron()
    args: Any = SimpleNamespace(
        run_dir=str(tmp_path), wandb_project=None, seq_length=8, global_batch_size=4,
        train_iters=9, log_interval=1,
    )  # fmt: skip
    return Recorder(args, RunShape(9, 4, 2), None, ["a"], {"a": 1.0}, 0)


def _lines(folder: Path) -> list[int]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["iteration"] for line in text.splitlines()]


def _finished(iteration: int, mixing: Any = None) -> FinishedStep:
    return FinishedStep(iteration, 4, 2.0, 1.0, 1e-3, 0.5, {}, mixing)


def test_a_step_without_mixing_is_recorded_at_once(records: Recorder, tmp_path: Path) -> None:
    records.step(_finished(1))
    assert _lines(tmp_path) == [1]
    records.validation(1, {"a": 2.0}, 0.1)
    records.step(_finished(2))
    records.close()
    assert _lines(tmp_path) == [1, 1, 2]


@pytest.mark.parametrize("is_decided", [True, False])
def test_the_last_step_of_a_run_that_breaks_off_is_recorded_if_it_is_known(
    records: Recorder, tmp_path: Path, is_decided: bool
) -> None:
    asked: list[None] = []
    future: Future[Any] = Future()
    step = SimpleNamespace(
        is_decided=is_decided, mixing_seconds=0.1, report=lambda: asked.append(None) or future
    )
    records.step(_finished(1, step))
    assert not (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    records.close()  # without a mixer the report is not looked at
    assert _lines(tmp_path) == ([1] if is_decided else [])
