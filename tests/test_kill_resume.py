"""A campaign of kills passes on this product, and would not pass if a resumed run differed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Corpus, Train

from megatron_acodm.blending import Ledger
from megatron_acodm.mixing.serialization import load_state, save_state

TOOL = REPOSITORY / "tools" / "kill_resume.py"
STEPS = 8  # of the run that is altered below: it saves and validates after steps 4 and 8

spec = importlib.util.spec_from_file_location("kill_resume", TOOL)
assert spec is not None
assert spec.loader is not None
kill_resume = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kill_resume)

Line = dict[str, Any]


def test_runs_that_are_killed_and_resumed_equal_an_undisturbed_one(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data-path", str(corpus.manifest), "--run-dir", str(tmp_path / "runs")]
    command += ["--kills", "2", "--steps", "12", "--processes", "1", "2"]
    command += ["--json", str(tmp_path / "report.json"), "--", "--num-workers", "1"]
    status = kill_resume.main(command)
    output = capsys.readouterr().out
    assert status == 0, output
    assert "no difference" in output
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["error"] is None
    same, changes = report["kills"]
    assert (same["layout"], same["processes"]) == ("same", "1 -> 1")
    assert (changes["layout"], changes["processes"]) == ("changes", "1 -> 2")
    assert not (tmp_path / "runs").exists()


def test_a_run_that_fails_ends_the_campaign_with_its_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, runs = str(tmp_path / "nothing.json"), tmp_path / "runs"
    command = ["--data-path", missing, "--run-dir", str(runs), "--processes", "1"]
    assert kill_resume.main(command) == 1
    assert "nothing.json" in capsys.readouterr().out
    assert (runs / "undisturbed" / "launch-01.log").is_file()


@pytest.fixture(scope="module")
def finished(train: Train, learning: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a real run that has ended."""
    folder = kill_resume.Folder(tmp_path_factory.mktemp("finished"))
    arguments = ["--train-iters", str(STEPS), "--save-interval", "4", "--eval-interval", "4"]
    arguments += ["--acodm-config", learning, "--save", str(folder.checkpoints)]
    run = train(*arguments, directory=folder.run)
    assert run.code == 0, run.output
    return folder


@pytest.fixture
def copy(finished: Any, tmp_path: Path) -> Any:
    """A copy of the run's folder, to be altered."""
    shutil.copytree(finished.root, tmp_path / "copy")
    return kill_resume.Folder(tmp_path / "copy")


def rewrite(folder: Any, change: Callable[[list[Line]], list[Line]]) -> None:
    lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    text = "".join(json.dumps(line) + "\n" for line in change(lines))
    folder.metrics.write_text(text, encoding="utf-8")


def alter(kind: str, iteration: int, change: Callable[[Line], None]) -> Callable[..., list[Line]]:
    """Change the line of a step (it has an ``lm_loss``) or of a ``validation``."""

    def apply(lines: list[Line]) -> list[Line]:
        for line in lines:
            if line["iteration"] == iteration and kind in line:
                change(line)
        return lines

    return apply


def scale(factor: float, *path: str) -> Callable[[Line], None]:
    """Multiply a value; the first domain's for the domain ``*``."""

    def apply(line: Line) -> None:
        for key in path[:-1]:
            line = line[key] if key != "*" else next(iter(line.values()))
        key = path[-1] if path[-1] != "*" else next(iter(line))
        line[key] *= factor

    return apply


def difference(reference: Any, other: Any, exact: bool, finished: bool = True) -> str | None:
    """What the comparison says about two folders; None if nothing."""
    facts = [kill_resume.facts(folder, finished) for folder in (reference, other)]
    try:
        kill_resume.compare(*facts, exact=exact, finished=finished)
    except kill_resume.Difference as found:
        return str(found)
    return None


def test_times_are_no_difference(finished: Any, copy: Any) -> None:
    rewrite(copy, alter("lm_loss", 3, scale(2.0, "step_time_s")))
    assert difference(finished, copy, exact=True) is None


def test_the_first_difference_is_named_with_both_values(finished: Any, copy: Any) -> None:
    rewrite(copy, alter("lm_loss", 6, scale(2.0, "grad_norm")))
    rewrite(copy, alter("lm_loss", 3, scale(1.0 + 1e-12, "lm_loss")))
    before, after = (folder.records()["step"][2]["lm_loss"] for folder in (finished, copy))
    assert before != after
    expected = f"step 3, lm_loss: {before} undisturbed, {after} resumed"
    assert difference(finished, copy, exact=True) == expected


@pytest.mark.parametrize(
    ("kind", "path", "harmless", "harmful"),
    [
        ("lm_loss", ("lm_loss",), 1 + 1e-6, 1 + 1e-3),
        ("lm_loss", ("grad_norm",), 1 + 1e-5, 1 + 1e-2),
        ("lm_loss", ("domains", "*", "weight"), 1 + 1e-5, 1 + 1e-2),
        ("lm_loss", ("domains", "*", "reward"), 1 + 1e-5, 1 + 1e-2),
        ("lm_loss", ("domains", "*", "samples"), 1, 2),
        ("validation", ("validation", "*"), 1 + 1e-6, 1 + 1e-3),
    ],
)
def test_another_layout_may_round_differently_and_no_more(
    finished: Any, copy: Any, kind: str, path: tuple[str, ...], harmless: float, harmful: float
) -> None:
    rewrite(copy, alter(kind, 4, scale(harmless, *path)))
    assert difference(finished, copy, exact=False) is None
    rewrite(copy, alter(kind, 4, scale(harmful, *path)))
    found = difference(finished, copy, exact=False)
    assert found is not None
    assert found.startswith(f"step 4, {path[0]}")


@pytest.mark.parametrize("exact", [True, False])
def test_a_missing_or_repeated_line_is_a_difference(finished: Any, copy: Any, exact: bool) -> None:
    original = copy.metrics.read_text(encoding="utf-8")
    rewrite(copy, lambda lines: lines[:-1])
    assert difference(finished, copy, exact) is not None
    assert difference(finished, copy, exact, finished=False) is None  # it may still come
    copy.metrics.write_text(original, encoding="utf-8")
    rewrite(copy, lambda lines: [*lines[:4], lines[3], *lines[4:]])
    assert difference(finished, copy, exact, finished=False) is not None


@pytest.mark.parametrize("exact", [True, False])
def test_a_sample_out_of_order_is_a_difference(finished: Any, copy: Any, exact: bool) -> None:
    saved = copy.checkpoints / f"iter_{STEPS:07d}" / "acodm" / "ledger"
    settings = load_state(saved)["fingerprint"]
    names = ("sizes", "granule_size", "seed", "names")
    other = Ledger(*(settings[name] for name in names))
    other.append([1.0, 0.0, 0.0], 16 * (STEPS + 2))
    save_state(saved, other.state_dict())
    found = difference(finished, copy, exact)
    assert found is not None
    assert found.startswith("step 1, sample.")


def test_model_and_policy_are_compared_to_the_last_bit_in_the_same_layout(finished: Any) -> None:
    facts = kill_resume.facts(finished, finished=True)
    names = {key[1] for key in facts}
    assert {"model", "policy", "ledger", "sample", "lm_loss", "validation"} <= names
    for part in ("model", "policy"):
        key = next(k for k, v in facts.items() if k[1] == part and hasattr(v, "dtype"))
        changed = {**facts, key: facts[key] + 1e-3}
        with pytest.raises(kill_resume.Difference, match=f"step {STEPS}, {part}"):
            kill_resume.compare(facts, changed, exact=True, finished=True)
        kill_resume.compare(facts, changed, exact=False, finished=True)


def test_the_phase_at_death_is_read_from_the_files(copy: Any) -> None:
    launched = time.time() - 3600
    last = copy.checkpoints / f"iter_{STEPS:07d}"
    tracker = copy.checkpoints / kill_resume.TRACKER

    def phase() -> str:
        return str(kill_resume.phase_at_death(copy, launched))

    assert phase() == "exit"
    tracker.write_text("4")  # the folder has its name, the tracker does not say so yet
    assert phase() == "save"
    last.rename(last.with_name(last.name + ".partial"))
    assert phase() == "save"
    shutil.rmtree(last.with_name(last.name + ".partial"))
    assert phase() == "unknown"
    rewrite(copy, lambda lines: lines[:-1])  # the validation after the last step
    assert phase() == "validation"
    rewrite(copy, lambda lines: lines[:-1])
    assert phase() == "step"
    rewrite(copy, lambda lines: [])
    assert phase() == "validation"  # the one before the first step
    os.utime(copy.run / "run.json", (launched - 60, launched - 60))
    assert phase() == "start"
