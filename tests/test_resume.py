"""A resumed run continues bit for bit, and refuses to continue as another run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Run, Train

COMMON = ("--train-iters", "8", "--eval-interval", "0", "--acodm-policy", "acodm")


@pytest.fixture(scope="module")
def interrupted(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run that stops after 4 of 8 steps, with its checkpoint."""
    saved = tmp_path_factory.mktemp("checkpoints")
    run = train(*COMMON, "--save", str(saved), "--exit-interval", "4")
    assert run.code == 0, run.output
    return run, saved


@pytest.fixture(scope="module")
def uninterrupted(train: Train) -> Run:
    run = train(*COMMON)
    assert run.code == 0, run.output
    return run


def _continue(
    train: Train, interrupted: tuple[Run, Path], tmp_path: Path, *arguments: str, processes: int = 1
) -> Run:
    run, saved = interrupted
    directory = tmp_path / "run"
    shutil.copytree(run.directory, directory)
    return train(
        *COMMON, "--load", str(saved), *arguments, directory=directory, processes=processes
    )


def test_resume_continues_bit_for_bit(
    train: Train, interrupted: tuple[Run, Path], uninterrupted: Run, tmp_path: Path
) -> None:
    resumed = _continue(train, interrupted, tmp_path)
    assert resumed.code == 0, resumed.output
    assert len(resumed.steps) == 8
    for whole, parts in zip(uninterrupted.steps, resumed.steps, strict=True):
        for key in ("iteration", "consumed_samples", "lm_loss", "grad_norm", "domains"):
            assert parts[key] == whole[key]


def test_resume_at_another_data_parallel_size_draws_the_same_samples(
    train: Train, interrupted: tuple[Run, Path], uninterrupted: Run, tmp_path: Path
) -> None:
    resumed = _continue(train, interrupted, tmp_path, processes=2)
    assert resumed.code == 0, resumed.output
    for whole, parts in zip(uninterrupted.steps, resumed.steps, strict=True):
        assert parts["lm_loss"] == pytest.approx(whole["lm_loss"], rel=1e-4)
        for name, domain in whole["domains"].items():
            assert parts["domains"][name]["samples"] == domain["samples"]


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (("--seed", "99"), "seed: saved 1234, now 99"),
        (("--acodm-decision-lag", "0"), "decision lag: saved 1, now 0"),
    ],
)
def test_resume_as_another_run_is_refused_with_the_difference(
    train: Train,
    interrupted: tuple[Run, Path],
    tmp_path: Path,
    arguments: tuple[str, ...],
    difference: str,
) -> None:
    resumed = _continue(train, interrupted, tmp_path, *arguments)
    assert resumed.code != 0
    assert difference in resumed.output


def test_a_damaged_sidecar_is_refused(
    train: Train, interrupted: tuple[Run, Path], tmp_path: Path
) -> None:
    run, saved = interrupted
    copy = tmp_path / "checkpoints"
    shutil.copytree(saved, copy)
    (ledger,) = copy.glob("iter_*/acodm/ledger.safetensors")
    content = bytearray(ledger.read_bytes())
    content[-3] ^= 1
    ledger.write_bytes(content)
    resumed = _continue(train, (run, copy), tmp_path)
    assert resumed.code != 0
    assert "ledger" in resumed.output
    assert "Traceback" not in resumed.output
