"""What ends training from outside: signals, lost ranks, full disks, files that are not there."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_MODEL, Corpus, Run, Train
from running import Running, mount, remount

STEPS = 400  # more than any run here comes to
MESSAGE = r"(?m)^error: rank \d+: .*$"

Start = Callable[..., Running]


@pytest.fixture
def start(corpus: Corpus, learning: str, tmp_path: Path) -> Iterator[Start]:
    """Start the trainer on two ranks, checkpoints every 3 steps in ``tmp_path/c``."""
    runs: list[Running] = []

    def run(*arguments: str, restarts: int = 0) -> Running:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command += ["--max-restarts", str(restarts), "-m", "megatron_acodm.train", *TINY_MODEL]
        command += ["--data-path", str(corpus.manifest), "--acodm-config", learning]
        command += ["--run-dir", str(tmp_path / "run"), "--eval-interval", "0"]
        command += ["--save", str(tmp_path / "c"), "--load", str(tmp_path / "c")]
        command += ["--save-interval", "3", "--train-iters", str(STEPS), *arguments]
        log = tmp_path / f"log{len(runs)}.txt"
        runs.append(Running(command, tmp_path / "run", log, {}))
        return runs[-1]

    yield run
    for running in runs:
        running.close()


def _announced(folder: Path) -> int:
    return int((folder / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8"))


def _undisturbed(train: Train, learning: str, steps: int) -> list[dict[str, Any]]:
    run = train(
        *("--train-iters", str(STEPS), "--eval-interval", "0", "--acodm-config", learning),
        *("--exit-interval", str(steps), "--save", str(Path(learning).parent / f"c{steps}")),
        processes=2,
    )
    assert run.code == 0, run.output
    timed = ("step_time_s", "mixing_time_s", "timing")
    return [{k: v for k, v in line.items() if k not in timed} for line in run.steps]


@pytest.mark.parametrize("to", ["torchrun", "one rank", "every process"])
def test_sigterm_saves_and_ends_after_the_same_step_on_every_rank(
    start: Start, train: Train, learning: str, tmp_path: Path, to: str
) -> None:
    running = start("--num-workers", "2", "--save-interval", "3")
    running.wait_for_step(5)  # so that the helpers of a save are there
    if to == "torchrun":  # which sends it to trainers and loading workers alike
        running.tell()
        running.wait()
    elif to == "every process":  # which ends torchrun with an error; it waits for the trainers
        running.tell_every_process()
        running.wait()
    else:
        running.trainer(1).terminate()
        assert running.wait() == 0, running.output
    last = _announced(tmp_path / "c")
    assert f"SIGTERM came: training ends after step {last}" in running.output
    assert running.steps[-1]["iteration"] == last
    assert "error: rank" not in running.output and "DataLoader" not in running.output
    again = start("--num-workers", "2", "--exit-interval", str(last + 2))
    assert again.wait() == 0, again.output
    steps = [line["iteration"] for line in again.steps]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] > last
    assert again.steps == _undisturbed(train, learning, steps[-1])


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_the_others_with_one_message(
    start: Start, tmp_path: Path, lost: int
) -> None:
    running = start()
    running.wait_for_step(5)
    running.trainer(lost).kill()
    assert running.wait(60) != 0
    assert f"rank      : {lost} " in running.output and "SIGKILL" in running.output  # torchrun's
    messages = re.findall(MESSAGE, running.output)
    assert len(messages) == 1, running.output
    (message,) = messages
    assert message.startswith(f"error: rank {1 - lost}: another rank is gone, or did not answer")
    assert re.search(r"goes on after step (\d+)", message), message
    again = start("--exit-interval", str(_announced(tmp_path / "c") + 3))
    assert again.wait() == 0, again.output


def test_a_rank_that_torchrun_ends_meanwhile_still_says_what_failed(
    train: Train, tmp_path: Path
) -> None:
    """torchrun's SIGTERM may come at any moment after another rank is lost; here, the worst."""
    script = tmp_path / "lost.py"
    script.write_text(
        """
import os
import signal
from megatron_acodm import train as door
from megatron_acodm.megatron import failures
from megatron_acodm.megatron.trainer import Trainer

step, lost_rank = Trainer._step, failures.lost_rank

def lose_a_rank(self, *arguments):
    step(self, *arguments)
    if self.iteration == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

def after_sigterm(error):
    os.kill(os.getpid(), signal.SIGTERM)
    return lost_rank(error)

Trainer._step, failures.lost_rank = lose_a_rank, after_sigterm
door.main()
""",
        encoding="utf-8",
    )
    save = ("--save", str(tmp_path / "c"), "--eval-interval", "0")
    run = train("--train-iters", "9", *save, processes=2, script=script)
    assert run.code != 0
    assert len(re.findall(MESSAGE, run.output)) == 1, run.output


def test_a_rank_that_hangs_is_given_up_after_the_time_out(start: Start) -> None:
    running = start("--distributed-timeout-minutes", "0.3", "--save-interval", "1000")
    running.wait_for_step(4)
    running.trainer(1).send_signal(signal.SIGSTOP)
    running.wait_for_output("another rank is gone, or did not answer within 0.3 minutes", 120)
    running.trainer(1).kill()  # torchrun would, 30 s later
    assert running.wait(60) != 0


def test_a_lost_rank_is_restarted_by_torchrun_and_nothing_differs(
    start: Start, train: Train, learning: str
) -> None:
    running = start("--exit-interval", "40", restarts=1)
    running.wait_for_step(8)
    running.trainer(1).kill()
    assert running.wait() == 0, running.output
    assert "resuming after step" in running.output
    assert running.steps == _undisturbed(train, learning, 40)


def test_a_full_disk_in_a_save_leaves_the_last_checkpoint(
    corpus: Corpus, train: Train, learning: str, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder))
    try:
        save = ("--save", str(folder / "c"), "--load", str(folder / "c"), "--save-interval", "2")
        common = ("--acodm-config", learning, "--eval-interval", "0", *save)
        first = train("--train-iters", "40", "--exit-interval", "2", *common, processes=2)
        assert first.code == 0, first.output
        used = shutil.disk_usage(folder).used  # by one checkpoint; half of another has room
        remount(folder, used * 3 // 2)
        again = {"processes": 2, "directory": first.directory}
        run = train("--train-iters", "40", *common, **again)
        assert run.code != 0
        (message,) = re.findall(MESSAGE, run.output)
        assert f"checkpoint of step 4 could not be written to {folder / 'c'}" in message
        assert "MB are free there" in message and "goes on after step 2" in message
        remount(folder, 100_000_000)
        last = train("--train-iters", "6", *common, **again)
        assert last.code == 0, last.output
        assert "resuming after step 2" in last.output
        assert [line["iteration"] for line in last.steps] == [1, 2, 3, 4, 5, 6]
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_cache_that_cannot_be_written_is_named(train: Train, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    mount("-t", "tmpfs", "-o", "ro", "tmpfs", str(cache))
    try:
        run = train("--train-iters", "2", "--data-cache-path", str(cache), processes=2)
    finally:
        subprocess.run(["umount", str(cache)], check=True)
    _refused(run, rf"{cache}.*--data-cache-path")


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_dataset_that_has_vanished_is_named_at_the_resume(
    train: Train, corpus: Corpus, tmp_path: Path, ending: str
) -> None:
    shutil.copytree(corpus.manifest.parent, tmp_path / "data")
    data = (str(tmp_path / "data" / "manifest.json"),)
    save = ("--save", str(tmp_path / "c"), "--load", str(tmp_path / "c"), "--eval-interval", "0")
    first = train("--train-iters", "4", "--exit-interval", "2", *save, data=data)
    assert first.code == 0, first.output
    (file, *_) = sorted((tmp_path / "data").glob(f"*{ending}"))
    file.rename(f"{file}.elsewhere")
    _refused(train("--train-iters", "4", *save, data=data, processes=2), str(file))
    Path(f"{file}.elsewhere").rename(file)
    again = train("--train-iters", "4", *save, data=data, directory=first.directory)
    assert again.code == 0 and [x["iteration"] for x in again.steps] == [1, 2, 3, 4], again.output


def test_a_damaged_policy_is_named_and_the_checkpoint_before_loads(
    train: Train, tmp_path: Path
) -> None:
    save = ("--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2")
    run = train("--train-iters", "4", "--eval-interval", "0", *save)
    assert run.code == 0, run.output
    (file,) = (tmp_path / "iter_0000004" / "acodm").glob("policy*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    more = ("--train-iters", "6", "--eval-interval", "0", *save)
    _refused(train(*more, processes=2), rf"{tmp_path}/iter_0000004/acodm/policy.*was altered")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2", encoding="utf-8")
    again = train(*more, directory=run.directory)
    assert again.code == 0 and "resuming after step 2" in again.output, again.output


def _refused(run: Run, pattern: str) -> None:
    """One message for all ranks, and no traceback of a trainer."""
    assert run.code != 0
    (message,) = re.findall(MESSAGE, run.output)
    assert re.search(pattern, message), message
    assert "Traceback" not in run.output.split("torch/distributed/elastic")[0], run.output
