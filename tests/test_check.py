"""``--check``: what a launch would do, and all that is wrong with it, without training.

Against the stub of Megatron-LM's loop; ``test_launch.py`` checks a real checkout.
"""

from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_hosts import UNIFORM, Script, host, script

from megatron_acodm import AcodmConfig, launch
from megatron_acodm.config import MixingConfig
from megatron_acodm.megatron.hosts.check import Check, fewest_ranks
from megatron_acodm.megatron.hosts.megatron_lm import LaunchOptions
from megatron_acodm.megatron.hosts.preflight import Plan, Problems

__all__ = ["host", "script"]  # fixtures


class Checked:
    """Checks the script; keeps what was found."""

    def __init__(self, script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, "1" if name == "WORLD_SIZE" else "0")
        self._script, self._monkeypatch = script, monkeypatch
        self._file = folder / "script.py"
        self._file.write_text("import user_script\nuser_script.pretrain()\n", encoding="utf-8")
        self.problems: list[str] = []

    def __call__(self, options: LaunchOptions | None, **arguments: Any) -> Plan | None:
        body = functools.partial(self._script.pretrain, **arguments)
        module = SimpleNamespace(pretrain=body)
        self._monkeypatch.setitem(sys.modules, "user_script", module)  # type: ignore[arg-type]
        problems = Problems()
        check = Check(options, problems)
        check.run(self._file, 1)
        self.problems = problems.found
        return check.plan


@pytest.fixture
def checked(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checked:
    return Checked(script, tmp_path, monkeypatch)


def test_it_counts_and_draws_as_the_run_does(script: Script, checked: Checked) -> None:
    plan = checked(LaunchOptions(UNIFORM))
    assert plan is not None and checked.problems == []
    mixer = script(LaunchOptions(UNIFORM)).mixer
    assert mixer is not None
    decisions = mixer._decisions
    assert decisions is not None
    assert [domain.name for domain in plan.domains] == decisions.domains
    assert [(domain.sequences, domain.checksum) for domain in plan.domains] == decisions.data
    assert plan.decisions.samples_of_step(0).tolist() == decisions.samples_of_step(0).tolist()
    assert plan.decisions.fingerprint() == decisions.fingerprint()
    report = str(plan)
    assert (
        "4 steps of 8 sequences of 16 tokens, 512 tokens in all; it starts from scratch" in report
    )
    assert all(domain.name in report for domain in plan.domains)


def test_the_host_is_as_it_was_and_no_file_is_written(
    host: Any, checked: Checked, tmp_path: Path
) -> None:
    before, files = dict(vars(host)), set(tmp_path.rglob("*"))
    save = str(tmp_path / "new" / "c")
    assert checked(LaunchOptions(UNIFORM), save=save, tensorboard_dir=save) is not None
    assert dict(vars(host)) == before and set(tmp_path.rglob("*")) == files


def test_all_that_is_wrong_is_named_at_once(
    script: Script, checked: Checked, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    script.prefixes += [str(tmp_path / "missing"), str(tmp_path / "file")]
    plan = checked(
        LaunchOptions(UNIFORM, tmp_path / "file" / "run"),
        dataloader_type="cyclic", sft=True, tensor_model_parallel_size=2,
    )  # fmt: skip
    assert plan is None
    named = (
        *("--dataloader-type is 'cyclic'", "--sft is True", "is_distributed = True"),
        *("the run directory", "missing.idx does not exist", "file.idx does not exist"),
    )
    assert len(checked.problems) == len(named)
    for part, problem in zip(named, checked.problems, strict=True):
        assert part in problem


def test_data_is_held_against_the_configuration(script: Script, checked: Checked) -> None:
    unknown = AcodmConfig(mixing=MixingConfig(policy="static", weights={"Poems": 1.0}))
    assert checked(LaunchOptions(unknown)) is None
    assert "unknown: Poems" in checked.problems[0]
    checked(LaunchOptions(UNIFORM), data_parallel_size=3)
    assert "micro-batch-size x data-parallel size = 2 x 3" in checked.problems[0]
    checked(LaunchOptions(UNIFORM), train_iters=None)
    assert checked.problems == [
        "nothing says how long to train; give --train-iters or --train-samples"
    ]


def test_damaged_data_is_named(script: Script, checked: Checked, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(script.prefixes[0] + suffix, tmp_path / f"torn{suffix}")
    whole = (tmp_path / "torn.idx").read_bytes()
    (tmp_path / "torn.idx").write_bytes(whole[: len(whole) // 2])
    script.prefixes[0] = str(tmp_path / "torn")
    assert checked(LaunchOptions(UNIFORM)) is None
    (problem,) = checked.problems
    assert "torn.idx or .bin cannot be read" in problem


def test_hosts_and_data_are_checked_without_a_configuration(
    script: Script, checked: Checked
) -> None:
    script.prefixes[1] = "nowhere"
    assert checked(None, sft=True) is None
    assert [problem.split()[0] for problem in checked.problems] == ["--sft", "nowhere.idx"]


def test_what_the_host_refuses_is_told(checked: Checked) -> None:
    assert checked(LaunchOptions(UNIFORM), num_attention_heads=3) is None
    (problem,) = checked.problems
    assert "AssertionError: assert args.hidden_size % args.num_attention_heads == 0" in problem


def test_a_checkpoint_is_held_against_the_run(
    script: Script, checked: Checked, tmp_path: Path
) -> None:
    save = {"save": str(tmp_path / "c"), "load": str(tmp_path / "c")}
    plan = checked(LaunchOptions(UNIFORM), **save)
    assert plan is not None and "no checkpoint is announced" in plan.starts
    driver = script(LaunchOptions(UNIFORM, tmp_path / "run"), **save)
    checked(LaunchOptions(UNIFORM), **save)
    assert "nothing is left to train" in checked.problems[0]
    plan = checked(LaunchOptions(UNIFORM), **save, train_iters=6)
    assert plan is not None and checked.problems == []
    assert "after step 4" in plan.starts and "with its policy" in plan.starts
    assert driver.mixer is not None
    assert driver.mixer.decisions.ledger.digest == plan.decisions.ledger.digest
    checked(LaunchOptions(UNIFORM), **save, train_iters=6, seed=5)
    assert "seed: saved 1234, now 5" in checked.problems[0]
    policy = tmp_path / "c" / "iter_0000004" / "acodm" / "ledger.json"
    policy.write_text(policy.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    assert checked(LaunchOptions(UNIFORM), **save, train_iters=6) is None
    assert "ledger.json is damaged" in checked.problems[0]
    shutil.rmtree(policy.parent)
    plan = checked(LaunchOptions(UNIFORM), **save, train_iters=6)
    assert plan is not None and "which has no policy" in plan.starts
    shutil.rmtree(policy.parent.parent)
    checked(LaunchOptions(UNIFORM), **save, train_iters=6)
    assert "is announced, but not there" in checked.problems[0]


def test_the_layout_says_how_many_ranks_are_needed() -> None:
    words = ["--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size=2", "--lr", "1"]
    assert fewest_ranks(words) == 8
    size = "--tensor-model-parallel-size"
    assert fewest_ranks([size, "4", f"{size}=2"]) == 2  # the last one wins
    assert fewest_ranks([]) == 1


def test_the_flag_takes_a_number_or_none() -> None:
    parser = launch.build_parser()
    parse = parser.parse_args
    assert [parse(words).check for words in ([], ["--check"], ["--check", "64"])] == [None, 0, 64]


def test_a_script_that_does_not_train_is_told_so(checked: Checked) -> None:
    checked._file.write_text("print('nothing')\n", encoding="utf-8")
    assert checked(LaunchOptions(UNIFORM)) is None
    assert "ended without calling Megatron-LM's pretrain()" in checked.problems[0]
