"""The record of a run survives kills and resumption, and is JSON whatever the numbers are."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_acodm.metrics import (
    MetricsWriter,
    RunInfo,
    domain_metrics,
    mean_perplexities,
    read_metrics,
    read_run_info,
    write_run_info,
)

NAMES = ["Books", "C/C++ Code"]


def write_steps(writer: MetricsWriter, first: int, last: int, loss: float = 2.0) -> None:
    for iteration in range(first, last + 1):
        writer.step(
            iteration,
            consumed_samples=8 * iteration,
            lm_loss=loss,
            step_time_s=0.5,
            mixing_time_s=0.01,
            domains=domain_metrics(
                NAMES, [0.25, 0.75], [2, 6], [2.5, 1.5], [0.1, -0.1], [0.5, 2.0]
            ),
        )


def open_writer(path: Path, resume_from: int | None = None) -> MetricsWriter:
    return MetricsWriter(path, tensorboard=False, resume_from=resume_from)


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (path / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_step_and_a_validation_are_a_line_each_with_the_agreed_names(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.validation(
            0, {"Books": 9.0, "C/C++ Code": 8.0}, {"Books": 0.1, "C/C++ Code": 0.3, "Law": 0.6}
        )
        write_steps(writer, 1, 1)
    validation, step = lines(tmp_path)
    assert validation == {
        "iteration": 0,
        "validation": {"Books": 9.0, "C/C++ Code": 8.0},
        "perplexity": {"Books": math.exp(9.0), "C/C++ Code": math.exp(8.0)},
        "mean_perplexity": {
            "unweighted": (math.exp(9.0) + math.exp(8.0)) / 2,
            "natural": pytest.approx(0.25 * math.exp(9.0) + 0.75 * math.exp(8.0)),
        },
    }
    assert step == {
        "iteration": 1,
        "consumed_samples": 8,
        "lm_loss": 2.0,
        "step_time_s": 0.5,
        "mixing_time_s": 0.01,
        "domains": {
            "Books": {"weight": 0.25, "samples": 2, "loss": 2.5, "reward": 0.1, "epochs": 0.5},
            "C/C++ Code": {
                "weight": 0.75,
                "samples": 6,
                "loss": 1.5,
                "reward": -0.1,
                "epochs": 2.0,
            },
        },
    }


def test_perplexity_is_averaged_over_the_domains_alike_and_by_natural_weight() -> None:
    losses = {"a": 1.0, "b": 2.0, "held out": 3.0}
    means = mean_perplexities(losses, {"a": 0.6, "b": 0.2, "never validated": 0.2})
    assert means["unweighted"] == pytest.approx((math.e + math.e**2 + math.e**3) / 3)
    assert means["natural"] == pytest.approx(0.75 * math.e + 0.25 * math.e**2)
    assert mean_perplexities({"c": 1.0}, {"a": 1.0}) == {"unweighted": pytest.approx(math.e)}
    assert mean_perplexities({"c": 1e4}, {})["unweighted"] == math.inf


def test_numbers_that_are_not_finite_become_null_and_arrays_become_lists(tmp_path: Path) -> None:
    domains = domain_metrics(
        NAMES, np.array([0.0, 1.0]), np.array([0, 8]), np.array([np.nan, 1.5]), None
    )
    with open_writer(tmp_path) as writer:
        writer.step(
            1,
            consumed_samples=8,
            lm_loss=math.inf,
            step_time_s=0.5,
            mixing_time_s=0.0,
            domains=domains,
            grad_norm=torch.tensor(2.0),
            diagnostics={"q_loss": np.float32("nan"), "shares": np.array([0.5, np.inf])},
        )
    (step,) = lines(tmp_path)
    assert step["lm_loss"] is None
    assert step["domains"]["Books"] == {
        "weight": 0.0,
        "samples": 0,
        "loss": None,
        "reward": None,
        "epochs": None,
    }
    assert step["grad_norm"] == 2.0
    assert step["diagnostics"] == {"q_loss": None, "shares": [0.5, None]}


def test_resuming_drops_later_lines_and_the_torn_one_and_goes_on(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.validation(0, {"Books": 9.0}, {})
        write_steps(writer, 1, 3, loss=3.0)
        writer.validation(3, {"Books": 8.0}, {})
        write_steps(writer, 4, 6, loss=3.0)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"iteration": 7, "lm_lo')
    with open_writer(tmp_path, resume_from=3) as writer:
        write_steps(writer, 4, 5, loss=1.0)
    steps, validations = read_metrics(tmp_path)
    assert [step["iteration"] for step in steps] == [1, 2, 3, 4, 5]
    assert [step["lm_loss"] for step in steps] == [3.0, 3.0, 3.0, 1.0, 1.0]
    assert [line["iteration"] for line in validations] == [0, 3]


def test_no_iteration_is_ever_recorded_twice(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        write_steps(writer, 1, 2)
        writer.validation(2, {"Books": 8.0}, {})
    with open_writer(tmp_path, resume_from=2) as writer:
        writer.validation(2, {"Books": 8.0}, {})  # as a resumed run may, before its first step
        with pytest.raises(ValueError, match=r"step 2 is already recorded.*resume_from"):
            write_steps(writer, 2, 2)
    assert [line["iteration"] for line in lines(tmp_path)] == [1, 2, 2]
    assert sum("validation" in line for line in lines(tmp_path)) == 1


def test_a_run_that_starts_over_keeps_the_earlier_record_beside_its_own(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        write_steps(writer, 1, 3)
    earlier = (tmp_path / "metrics.jsonl").read_bytes()
    with open_writer(tmp_path) as writer:
        write_steps(writer, 1, 1)
    assert [line["iteration"] for line in lines(tmp_path)] == [1]
    assert (tmp_path / "metrics.jsonl.previous").read_bytes() == earlier


def test_a_killed_writer_loses_no_finished_line(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
        "from test_metrics import open_writer, write_steps\n"
        "from pathlib import Path\n"
        f"write_steps(open_writer(Path({str(tmp_path)!r})), 1, 50)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], env=os.environ, check=False)
    assert process.returncode == -signal.SIGKILL
    steps, _ = read_metrics(tmp_path)
    assert [step["iteration"] for step in steps] == list(range(1, 51))


def test_a_torn_last_line_is_passed_over_when_reading(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        write_steps(writer, 1, 2)
    data = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(data[:-10])
    steps, _ = read_metrics(tmp_path)
    assert [step["iteration"] for step in steps] == [1]


@pytest.mark.parametrize("damage", [b'{"iteration": 2, "lm', b"[1, 2]", b"{}", b"\xff\xfe", b""])
def test_damage_before_the_last_line_is_an_error_with_its_number(
    tmp_path: Path, damage: bytes
) -> None:
    with open_writer(tmp_path) as writer:
        write_steps(writer, 1, 3)
    content = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    content[1] = damage
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(content))
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match="line 2 is damaged"):
        open_writer(tmp_path, resume_from=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join(content)


def test_tensorboard_gets_every_scalar_by_quantity_and_domain(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    with MetricsWriter(tmp_path) as writer:
        write_steps(writer, 1, 3, loss=3.0)
        writer.validation(3, {"Books": 8.0}, {})
    with MetricsWriter(tmp_path, resume_from=1) as writer:
        write_steps(writer, 2, 2, loss=1.0)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/lm_loss")] == [(1, 3.0), (2, 1.0)]
    assert [e.value for e in events.Scalars("weight/C/C++ Code")] == [0.75, 0.75]
    assert {"loss/Books", "reward/Books", "samples/Books"} <= set(events.Tags()["scalars"])


def test_run_info_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    info = RunInfo(
        domains=NAMES,
        sequence_length=256,
        global_batch_size=8,
        train_iters=100,
        policy="acodm",
        config={"model": {"num_layers": 4}, "mixing": {"max_weight": 1.0}},
    )
    write_run_info(tmp_path / "run", info)
    assert read_run_info(tmp_path / "run") == info
    assert info.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "torch" in info.versions
    assert info.hardware


@pytest.mark.parametrize("content", [None, "", '{"domains": []}', '{"unknown": 1}', "[]"])
def test_a_missing_or_damaged_run_file_is_one_clear_error(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.json"):
        read_run_info(tmp_path)
