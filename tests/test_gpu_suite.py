"""The GPU suite runs every step, hides no failure, and says at once when there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_acodm import ops

SUITE = Path(__file__).parents[1] / "tools" / "gpu_suite.sh"
STEPS = ["packages", "built", "operators", "step_time", "alignment", "corpus", "preprocess"]
STEPS += ["train", "trained"]


def run(*arguments: str | Path, python: str | Path = sys.executable) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": str(python)}
    command = ["bash", str(SUITE), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=500
    )


def results(folder: Path) -> dict[str, dict[str, Any]]:
    suite = json.loads((folder / "gpu_suite.json").read_text(encoding="utf-8"))
    return {step["step"]: step for step in suite["steps"]}


def stand_in(path: Path, instead: str) -> Path:
    """A python that is the real one for everything but the lines of ``instead``."""
    path.write_text(f'#!/bin/bash\n{instead}\nexec {sys.executable} "$@"\n', encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_without_a_cuda_device_it_ends_at_once_and_does_nothing(tmp_path: Path) -> None:
    done = run(tmp_path / "out")
    assert done.returncode == 2
    assert "finds no CUDA device" in done.stderr and "--device cpu" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["--device", "tpu", "out"], ["a", "b", "c"], ["--device"]]
)
def test_a_wrong_command_line_shows_the_right_one(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_a_folder_of_wheels_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run("--device", "cpu", tmp_path / "out", tmp_path / "wheels")
    assert done.returncode == 2
    assert f"WHEEL_DIR {tmp_path / 'wheels'} is not a folder" in done.stderr


def test_a_dry_run_on_the_cpu_goes_through_every_step(tmp_path: Path) -> None:
    done = run("--device", "cpu", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = results(tmp_path / "out")
    assert list(steps) == STEPS
    assert {step["result"] for step in steps.values()} == {"ok"}
    assert all(check["cases"] for check in steps["operators"]["figures"]["checks"][:9])
    assert len(steps["step_time"]["figures"]["candidates"]) >= 4
    assert steps["alignment"]["figures"]["shapes"]
    figures = steps["trained"]["figures"]
    assert figures["last_loss"] < figures["first_loss"]
    assert all(f"\n{name} " in done.stdout for name in STEPS)  # the table
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "gpu_suite.json",
        "gpu_suite.log",
    ]


def test_a_step_that_fails_is_shown_and_the_others_still_run(tmp_path: Path) -> None:
    instead = """case "$1" in
  tools/check_operators.py) echo "an operator is off"; exit 1 ;;
  tools/* | -m) exit 0 ;;  # takes long, and is not what this is about
esac"""
    done = run("--device", "cpu", tmp_path / "out", python=stand_in(tmp_path / "python", instead))
    assert done.returncode == 1
    steps = results(tmp_path / "out")
    assert list(steps) == STEPS
    assert steps["operators"]["result"] == "FAILED"
    assert steps["operators"]["log_tail"] == ["an operator is off"]
    assert "    an operator is off\n" in done.stdout
    assert steps["step_time"]["result"] == "ok"
    # Nothing was trained, which is noticed although the trainer did not complain.
    assert steps["trained"]["result"] == "FAILED"
    assert "metrics.jsonl" in "".join(steps["trained"]["log_tail"])


def test_a_missing_package_is_named_and_one_among_the_wheels_is_used(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "metered-1.0.dist-info"
    with zipfile.ZipFile(wheels / "metered-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("metered.py", "VALUE = 1\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: metered\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import sys\nsys.modules['zstandard'] = None\n", encoding="utf-8"
    )
    instead = f"""case "$1" in
  tools/check_operators.py) exec {sys.executable} -c 'import metered' ;;
  tools/* | -m) exit 0 ;;
esac
export PYTHONPATH="{broken}:$PYTHONPATH\""""
    done = run(
        "--device", "cpu", tmp_path / "out", wheels, python=stand_in(tmp_path / "python", instead)
    )
    assert done.returncode == 1
    steps = results(tmp_path / "out")
    message = "needed but missing: zstandard; put their wheels into WHEEL_DIR"
    assert steps["packages"]["log_tail"][-1] == message
    assert message in done.stdout
    assert steps["operators"]["result"] == "ok"  # it found the package of the wheel


def wrong_alignment(G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    W, sq_norm = ops.domain_alignment_reference(G)
    return W * (1 + 1e-4), sq_norm


def wrong_gram(G: torch.Tensor) -> torch.Tensor:
    H = ops.gram_reference(G)
    H[-1, -1] *= 1 + 1e-4
    return H


def wrong_sketch(row: torch.Tensor, grad: torch.Tensor, key: int) -> None:
    ops.add_sketch_reference_(row, grad, key ^ 1)


def wrong_growth(row: torch.Tensor, main_grad: torch.Tensor, seen: torch.Tensor) -> None:
    ops.accumulate_domain_grad_reference_(row, main_grad, seen)
    if row.numel() % 4:
        row[-1] += 1  # the part that no pack covers


@pytest.mark.parametrize(
    ("operator", "wrong", "check"),
    [
        ("domain_alignment", wrong_alignment, "alignment_and_gram_for_every_number_of_domains"),
        ("domain_alignment", wrong_alignment, "alignment_and_gram_of_any_view"),
        ("gram", wrong_gram, "alignment_and_gram_of_large_matrices"),
        ("add_sketch_", wrong_sketch, "sketches_are_the_reference_map"),
        ("accumulate_domain_grad_", wrong_growth, "growth_is_added_and_remembered"),
    ],
)
def test_an_operator_that_is_off_is_noticed(
    monkeypatch: pytest.MonkeyPatch, operator: str, wrong: Any, check: str
) -> None:
    spec = importlib.util.spec_from_file_location(
        "check_operators", SUITE.with_name("check_operators.py")
    )
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(ops, operator, wrong)
    assert tool.run(getattr(tool, check), torch.device("cpu"))["failure"] is not None
