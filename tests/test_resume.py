"""A resumed run continues bit for bit, and refuses to continue as another run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run, Train

# Sketches of other shards have other errors: exact, so that another layout decides the same.
COMMON = ("--train-iters", "8", "--eval-interval", "0", "--acodm-estimator", "exact")
OTHER_LAYOUTS = {
    "data parallel": (),
    "tensor parallel": ("--tensor-model-parallel-size", "2"),
    "pipeline parallel": ("--pipeline-model-parallel-size", "2"),
}


@pytest.fixture(scope="module")
def interrupted(
    train: Train, learning: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Path]:
    """A run that stops after 4 of 8 steps, with its checkpoint."""
    saved = tmp_path_factory.mktemp("checkpoints")
    arguments = (*COMMON, "--acodm-config", learning)
    run = train(*arguments, "--save", str(saved), "--exit-interval", "4")
    assert run.code == 0, run.output
    return run, saved


@pytest.fixture(scope="module")
def uninterrupted(train: Train, learning: str) -> Run:
    run = train(*COMMON, "--acodm-config", learning)
    assert run.code == 0, run.output
    return run


@pytest.fixture
def resume(
    train: Train, learning: str, interrupted: tuple[Run, Path], tmp_path: Path
) -> Callable[..., Run]:
    """Continue the interrupted run, in a copy of its directory."""

    def run(*arguments: str, processes: int = 1, load: Path | None = None) -> Run:
        directory = tmp_path / "run"
        shutil.copytree(interrupted[0].directory, directory)
        return train(
            *(*COMMON, "--acodm-config", learning, "--load", str(load or interrupted[1])),
            *arguments,
            directory=directory,
            processes=processes,
        )

    return run


def test_resume_continues_bit_for_bit(resume: Callable[..., Run], uninterrupted: Run) -> None:
    resumed = resume("--num-workers", "2")
    assert resumed.code == 0, resumed.output
    assert len(resumed.steps) == 8
    weights = [[d["weight"] for d in step["domains"].values()] for step in resumed.steps]
    assert weights[6] != weights[7]  # the agent is deciding
    for whole, parts in zip(uninterrupted.steps, resumed.steps, strict=True):
        for key in ("iteration", "consumed_samples", "lm_loss", "grad_norm", "domains"):
            assert parts[key] == whole[key]
        assert parts["diagnostics"] == whole["diagnostics"]


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_resume_in_another_layout_draws_the_same_samples(
    resume: Callable[..., Run], uninterrupted: Run, layout: str
) -> None:
    resumed = resume(*OTHER_LAYOUTS[layout], processes=2)
    assert resumed.code == 0, resumed.output
    steps = list(zip(uninterrupted.steps, resumed.steps, strict=True))
    if layout != "data parallel":  # a rank holds another part of the model
        assert "averages of the domains' gradients start afresh" in resumed.output
        steps = steps[:6]  # two were decided when it was saved; their rewards may differ
        for _, parts in steps[4:]:
            for domain in parts["domains"].values():
                del domain["reward"]
    for whole, parts in steps:
        assert parts["lm_loss"] == pytest.approx(whole["lm_loss"], rel=1e-4)
        for name, domain in whole["domains"].items():
            assert parts["domains"][name]["samples"] == domain["samples"]
            for key in {"weight", "reward"} & parts["domains"][name].keys():
                assert parts["domains"][name][key] == pytest.approx(domain[key], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (("--seed", "99"), "seed: saved 1234, now 99"),
        (("--global-batch-size", "8"), "global batch size: saved 16, now 8"),
        (("--acodm-policy", "none"), "policy: saved acodm, now none"),
        (("--acodm-decision-lag", "0"), "decision lag: saved 1, now 0"),
        (("--acodm-kind", "fc1"), "alignment: saved .*fc2.*, now .*fc1"),
        (("--acodm-objective", "loss"), "objective: saved perplexity, now loss"),
        (("--acodm-initial-weights", "natural"), "initial weights: saved uniform, now natural"),
        (("--hidden-size", "64"), "does not fit this model"),
    ],
)
def test_resume_as_another_run_is_refused_with_the_difference(
    resume: Callable[..., Run], arguments: tuple[str, ...], difference: str
) -> None:
    resumed = resume(*arguments)
    assert resumed.code != 0
    assert re.search(difference, resumed.output), resumed.output
    assert "Traceback" not in resumed.output


def test_rewards_of_another_kind_are_not_averaged_with_the_saved_ones(
    resume: Callable[..., Run], learning: str, tmp_path: Path
) -> None:
    text = Path(learning).read_text(encoding="utf-8")
    other = tmp_path / "losses.yaml"
    other.write_text(text.replace("agent: {", "agent: {reward: loss, "), encoding="utf-8")
    resumed = resume("--acodm-config", str(other))
    assert resumed.code != 0
    assert "reward: saved alignment, now loss" in resumed.output, resumed.output


def test_a_static_blend_is_not_resumed_in_another_order(train: Train, tmp_path: Path) -> None:
    arguments = ("--eval-interval", "0", "--acodm-policy", "none")
    saved = ("--save", str(tmp_path / "saved"), "--exit-interval", "2")
    assert train(*arguments, "--train-iters", "4", *saved).code == 0
    longer = train(*arguments, "--train-iters", "6", "--load", str(tmp_path / "saved"))
    assert longer.code != 0
    assert "train iters: saved 4, now 6" in longer.output


@pytest.mark.parametrize("part", ["ledger", "policy", "gradients_00000"])
def test_a_damaged_sidecar_is_refused(
    resume: Callable[..., Run], interrupted: tuple[Run, Path], tmp_path: Path, part: str
) -> None:
    copy = tmp_path / "checkpoints"
    shutil.copytree(interrupted[1], copy)
    (file,) = copy.glob(f"iter_*/acodm/{part}.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    resumed = resume(load=copy)
    assert resumed.code != 0
    assert part in resumed.output
    assert "Traceback" not in resumed.output


def test_a_checkpoint_caught_while_it_was_replaced_still_loads(
    resume: Callable[..., Run], interrupted: tuple[Run, Path], uninterrupted: Run, tmp_path: Path
) -> None:
    copy = tmp_path / "checkpoints"
    shutil.copytree(interrupted[1], copy)
    (folder,) = copy.glob("iter_*")
    folder.rename(folder.with_name(folder.name + ".old"))
    resumed = resume(load=copy)
    assert resumed.code == 0, resumed.output
    assert resumed.steps[-1]["lm_loss"] == uninterrupted.steps[-1]["lm_loss"]
