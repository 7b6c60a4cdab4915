"""Kills training runs at random moments, resumes them, and compares them with one left alone.

Each trains with ``megatron_acodm.train`` in real processes, which are all killed at once (SIGKILL)
during the start, a step, a validation or a save; then the same command is given again. Every second
run changes the number of data-parallel ranks at each resume. One that keeps its layout must equal
the undisturbed run bit for bit: metrics, samples, model, optimizer and policy. One that changes it
must draw the same samples, with the rest within ``TOLERANCE``. The first difference, or a run that
fails to resume, ends the campaign with exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_acodm.blending import Ledger
from megatron_acodm.help_format import HelpFormatter
from megatron_acodm.megatron.checkpoint import TRACKER
from megatron_acodm.metrics import METRICS_FILE, RUN_FILE, read_metrics, read_run_info
from megatron_acodm.mixing.serialization import load_state

TINY_RUN = [
    *("--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4"),
    *("--seq-length", "64", "--micro-batch-size", "2", "--global-batch-size", "16"),
    *("--save-interval", "5", "--eval-interval", "7", "--lr", "1e-3"),
]
# The agent acts, learns and explores from the third step on.
LEARNING = """\
mixing:
  policy: acodm
  initial_weights: uniform
  agent: {replay_batch_size: 2, exploration_fraction: 1.0, actor_lr: 0.01, reward_smoothing: 0.5}
"""
# Relative, at another data-parallel size, where sums have another order. 0 is exact; what is not
# named here is compared only between runs of one layout.
TOLERANCE = {
    **dict.fromkeys(("line", "iteration", "consumed_samples", "samples", "sample"), 0.0),
    **dict.fromkeys(("lm_loss", "loss", "validation"), 1e-4),
    **dict.fromkeys(("grad_norm", "weight", "reward"), 1e-3),
}
TIMINGS = ("step_time_s", "mixing_time_s", "timing")
KILLS_PER_RUN = 5
SILENCE_S = 600.0  # without news, a run hangs
DEATH_S = 30.0  # killed processes may take as long to be gone
Facts = dict[tuple[Any, ...], Any]  # what a run did, by (iteration, name, part of it, ...)


class Difference(Exception):
    """The first departure of an interrupted run from the undisturbed one."""

    def __init__(self, iteration: int, name: str, undisturbed: Any, resumed: Any) -> None:
        super().__init__(f"step {iteration}, {name}: {undisturbed} undisturbed, {resumed} resumed")


def written(path: Path) -> float:
    """When a file or folder was last written (Unix time); 0 if it is not there."""
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


class Folder:
    """The directory of one run: its record, its checkpoints, and the output of each launch."""

    def __init__(self, root: Path) -> None:
        self.root, self.run, self.checkpoints = root, root / "run", root / "checkpoints"
        self.metrics = self.run / METRICS_FILE

    def records(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of each ``step`` and of each ``validation``."""
        steps, validations = read_metrics(self.run) if self.metrics.exists() else ([], [])
        return {"step": steps, "validation": validations}

    def last(self, kind: str) -> int:
        """The last iteration on record of a ``step`` or ``validation``; -1 if there is none."""
        return max((line["iteration"] for line in self.records()[kind]), default=-1)

    def announced(self) -> int:
        """The iteration of the checkpoint that a resume starts from; 0 if there is none."""
        tracker = self.checkpoints / TRACKER
        return int(tracker.read_text(encoding="utf-8")) if tracker.exists() else 0

    def unfinished_saves(self, since: float) -> list[int]:
        """Iterations whose checkpoint was begun after ``since`` (Unix time) and is not whole."""
        begun = self.checkpoints.glob("iter_*.partial")  # iter_0000005.partial: 5
        return [int(path.stem[5:]) for path in begun if written(path) > since]

    def followed_by(self, step: int) -> list[str]:
        """Which of ``validation`` and ``save`` come after a step, by the run's own account."""
        info = read_run_info(self.run)
        arguments, steps = info.config["arguments"], info.train_iters
        every = {"validation": arguments["eval_interval"]}
        every["save"] = arguments["save_interval"] or steps
        return [kind for kind, n in every.items() if n and (step % n == 0 or step == steps)]


def phase_at_death(folder: Folder, launched: float) -> str:
    """The phase in which a launch (of that Unix time) died, as far as its files can tell."""
    if written(folder.run / RUN_FILE) < launched:
        return "start"
    announced, step = folder.announced(), max(folder.last("step"), 0)
    whole = [path for path in folder.checkpoints.glob("iter_*") if path.suffix != ".partial"]
    being_announced = any(path.suffix or int(path.stem[5:]) > announced for path in whole)
    if being_announced or folder.unfinished_saves(launched):
        return "save"
    due = folder.followed_by(step)
    if "validation" in due and folder.last("validation") < step:
        return "validation"
    if "save" in due and announced < step:
        return "unknown"  # after the step or its validation, before the save's folder is there
    return "exit" if announced == read_run_info(folder.run).train_iters else "step"


def facts(folder: Folder, finished: bool) -> Facts:
    """What a run has recorded, timings aside; of a finished one its samples and state, too."""
    found: Facts = {}
    for kind, lines in folder.records().items():
        for number, line in enumerate(lines):
            kept = {key: value for key, value in line.items() if key not in TIMINGS}
            found |= _leaves((line["iteration"],), kept)
            found[line["iteration"], "line", kind] = number  # one of each, in order
    if not finished:
        return found
    last = folder.announced()
    checkpoint = folder.checkpoints / f"iter_{last:07d}"
    dcp_to_torch_save(checkpoint, folder.root / "model.pt")
    model = torch.load(folder.root / "model.pt", weights_only=False)
    saved, policy = (load_state(checkpoint / "acodm" / name) for name in ("ledger", "policy"))
    found |= _leaves((last,), {"model": model, "ledger": saved, "policy": policy})
    settings = {key: value for key, value in saved["fingerprint"].items() if key != "scheme"}
    ledger = Ledger(**settings)
    ledger.load_state_dict(saved)
    batch = read_run_info(folder.run).global_batch_size
    domains, positions = ledger.locate(np.arange(last * batch))
    epochs, sequences = ledger.epoch_and_index(domains, positions)
    for index, sample in enumerate(zip(domains, epochs, sequences, strict=True)):
        found[index // batch + 1, "sample", index] = tuple(map(int, sample))
    return found


def _leaves(path: tuple[Any, ...], value: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves((*path, key), item)
    else:
        yield path, value


def compare(undisturbed: Facts, resumed: Facts, exact: bool, finished: bool) -> None:
    """Raise Difference for the first fact that differs; an unfinished run may lack some."""
    keys = undisturbed.keys() | resumed.keys() if finished else resumed.keys()
    for key in sorted(keys, key=lambda key: (key[0], *map(str, key[1:]))):
        tolerance = 0.0 if exact else TOLERANCE.get(key[-1] if key[1] == "domains" else key[1])
        values = (undisturbed.get(key, "nothing"), resumed.get(key, "nothing"))
        if tolerance is not None and not _agree(*values, tolerance):
            raise Difference(key[0], ".".join(map(str, key[1:])), *values)


def _agree(expected: Any, found: Any, tolerance: float) -> bool:
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        return torch.equal(expected, found)
    if tolerance and all(isinstance(value, (int, float)) for value in (expected, found)):
        return bool(abs(expected - found) <= tolerance * abs(expected))
    return bool(expected == found) or str(expected) == str(found) == "nan"


class Launch:
    """One start of a run: torchrun, its trainers and their workers; on exit, none is left."""

    def __init__(self, folder: Folder, arguments: Sequence[str], processes: int) -> None:
        folder.root.mkdir(parents=True, exist_ok=True)
        self.folder, self.resumed_from = folder, folder.announced()
        self.log = folder.root / f"launch-{len(list(folder.root.glob('*.log'))) + 1:02d}.log"
        self._metrics_before = written(folder.metrics)
        self._seen: set[tuple[str, int]] = set()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), *self.program(arguments)]
        command += ["--save", str(folder.checkpoints), "--load", str(folder.checkpoints)]
        # Takes what killed processes leave, and marks them; a short path, as sockets need.
        self._temporary = tempfile.TemporaryDirectory(prefix="kill-")
        marked = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": self._temporary.name}
        self.launched, self.started = time.time(), time.monotonic()
        with open(self.log, "wb") as log:
            self._torchrun = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=marked
            )

    def program(self, arguments: Sequence[str]) -> list[str]:
        """What torchrun runs."""
        return ["-m", "megatron_acodm.train", *arguments, "--run-dir", str(self.folder.run)]

    def close(self) -> None:
        """Leave no process and no temporary file behind."""
        if self._torchrun.poll() is None:
            self.kill()
        self._temporary.cleanup()

    def running(self) -> bool:
        """Whether the run goes on; raises RuntimeError when it failed."""
        if self._torchrun.poll():
            tail = "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-60:])
            raise RuntimeError(f"{self.log}: exit status {self._torchrun.returncode}\n{tail}")
        return self._torchrun.returncode is None

    def events(self) -> Iterator[tuple[str, int]]:
        """Yield each ``step``, ``validation``, ``save begun`` and ``save``, until the run ends."""
        last, running = time.monotonic(), True
        while running:
            running = self.running()  # before the files, so that the last look misses nothing
            for event in self._news():
                last = time.monotonic()
                yield event
            if time.monotonic() - last > SILENCE_S:
                raise RuntimeError(f"{self.log}: nothing happened for {SILENCE_S:.0f} s")
            time.sleep(0.003)

    def _news(self) -> list[tuple[str, int]]:
        whole = self.folder.announced()
        found = {("save begun", i) for i in self.folder.unfinished_saves(self.launched)}
        found |= {("save", i) for kind, i in self._seen if kind == "save begun" and i <= whole}
        if written(self.folder.metrics) != self._metrics_before:  # else: of the last launch
            lines = self.folder.records()
            found |= {(kind, line["iteration"]) for kind in lines for line in lines[kind]}
            kept = max((i for kind, i in found if kind == "step"), default=0)
            if kept < self.resumed_from:
                raise Difference(self.resumed_from, "last step kept", self.resumed_from, kept)
        news = {event for event in found if event[1] > self.resumed_from} - self._seen
        self._seen |= news
        return sorted(news, key=lambda event: event[1])

    def kill(self) -> None:
        """End all processes at once, as a power failure would; RuntimeError if one survives."""
        pid = self._torchrun.pid
        os.kill(pid, signal.SIGSTOP)  # so that it neither starts trainers nor ends them gently
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        # torchrun gives each trainer a session of its own, which the trainer's workers share.
        for member in [*(child.pid for child in psutil.Process(pid).children()), pid]:
            with suppress(ProcessLookupError):
                os.killpg(os.getpgid(member), signal.SIGKILL)
        self._torchrun.wait()
        deadline = time.monotonic() + DEATH_S
        while alive := self._alive():
            if time.monotonic() > deadline:
                raise RuntimeError(f"alive {DEATH_S:.0f} s after the kill: {alive}")
            time.sleep(0.05)

    def _alive(self) -> list[psutil.Process]:
        mark, processes = ("TMPDIR", self._temporary.name), psutil.process_iter(["environ"])
        return [process for process in processes if mark in (process.info["environ"] or {}).items()]


class Campaign:
    """An undisturbed run, and interrupted runs that are held against it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.runs = 0
        self.kills: list[dict[str, Any]] = []
        self._rng = random.Random(options.seed)
        self._root = options.run_dir.absolute()
        self._reference = Folder(self._root / "undisturbed")
        self._root.mkdir(parents=True, exist_ok=True)
        config = self._root / "learning.yaml"
        config.write_text(LEARNING, encoding="utf-8")
        self._arguments = ["--data-path", *options.data_path, *TINY_RUN, "--acodm-config"]
        self._arguments += [str(config), *options.trainer, "--train-iters", str(options.steps)]

    def run(self) -> None:
        """Run all; raise Difference, RuntimeError or ValueError at the first thing amiss."""
        kills, arguments = self.options.kills, self._arguments
        with closing(Launch(self._reference, arguments, self.options.processes[0])) as launch:
            self._seconds = _phase_seconds(launch)
        self._facts = facts(self._reference, finished=True)
        per_run = min(KILLS_PER_RUN, -(-kills // 2))  # at least one run of each kind
        while len(self.kills) < kills:
            self.runs += 1
            self._interrupted_run(min(per_run, kills - len(self.kills)))

    def _interrupted_run(self, num_kills: int) -> None:
        folder = Folder(self._root / f"run-{self.runs}")
        layouts = self.options.processes[: 1 if self.runs % 2 else None]
        exact, processes = len(layouts) == 1, layouts[0]
        for kills_left in range(num_kills, -1, -1):
            with closing(Launch(folder, self._arguments, processes)) as launch:
                phase, iteration = self._draw_target(launch.resumed_from, kills_left)
                if not self._reach(launch, phase, iteration):
                    break
                launch.kill()
            after = self._rng.choice([n for n in layouts if n != processes] or layouts)
            self._record(launch, exact, phase, f"{processes} -> {after}")
            processes = after
            compare(self._facts, facts(folder, finished=False), exact, finished=False)
        compare(self._facts, facts(folder, finished=True), exact, finished=True)
        shutil.rmtree(folder.root)

    def _record(self, launch: Launch, exact: bool, aim: str, processes: str) -> None:
        step, checkpoint = max(launch.folder.last("step"), 0), launch.folder.announced()
        kill = {"run": self.runs, "layout": "same" if exact else "changes", "aimed at": aim}
        kill["died in"] = phase_at_death(launch.folder, launch.launched)
        kill |= {"last step": step, "resumes from": checkpoint, "processes": processes}
        self.kills.append(kill)
        if len(self.kills) == 1:
            print("".join(f"{name:>13}" for name in ("kill", *kill)))
        print("".join(f"{value!s:>13}" for value in (len(self.kills), *kill.values())), flush=True)
        for i in range(checkpoint + 1, step):  # a save before the last step must be announced
            if "save" in launch.folder.followed_by(i):
                raise Difference(step, "last checkpoint", i, checkpoint)

    def _draw_target(self, resumed_from: int, kills_left: int) -> tuple[str, int]:
        """A random phase, and the step it follows; kills spread over the rest of the run."""
        steps = self.options.steps
        if not kills_left:
            return "end", steps
        stride = 2 * (steps - resumed_from) // (kills_left + 1)
        first = min(resumed_from + self._rng.randint(1, max(1, stride)), steps)
        moments = {"start": [resumed_from]}
        for step in range(first, steps + 1):
            for phase in self._reference.followed_by(step) or ["step"]:
                moments.setdefault(phase, []).append(step)
        aims = Counter(kill["aimed at"] for kill in self.kills)  # each phase as often as another
        phase = min(moments, key=lambda phase: (aims[phase], self._rng.random()))
        return phase, moments[phase][0]

    def _reach(self, launch: Launch, phase: str, iteration: int) -> bool:
        """Wait for a random part of a phase to pass; False if the run ended before."""
        awaited = {"save": "save begun", "end": None}.get(phase, "step")
        passed = 0
        for event in launch.events() if phase != "start" else ():
            if event == (awaited, iteration):
                break
            passed += event[0] == phase
        if launch.running():
            seconds = self._seconds[phase]  # in order: the first of a launch may take longer
            time.sleep(self._rng.random() * seconds[min(passed, len(seconds) - 1)])
        return launch.running()


def _phase_seconds(launch: Launch) -> dict[str, list[float]]:
    """See a run to its end; return how long each phase took whenever it came."""
    at = {event: time.monotonic() for event in launch.events()}
    seconds = {"start": [at["step", 1] - launch.started]}
    seconds["step"] = [line["step_time_s"] for line in launch.folder.records()["step"]]
    for phase, begin in (("validation", "step"), ("save", "save begun")):
        seconds[phase] = [at[phase, i] - at[begin, i] for kind, i in at if kind == phase]
    return seconds


def conduct(campaign: Any, options: argparse.Namespace, tallied: str) -> int:
    """Run a campaign, report on it, and return the exit status.

    Args:
        campaign: has ``run``, and in ``runs`` and ``kills`` what it has done so far.
        options: with ``run_dir``, which is removed if all runs pass, and ``json``.
        tallied: the entry of each kill that the summary counts.
    """
    error, start = None, time.monotonic()
    try:
        campaign.run()
    except (Difference, RuntimeError, ValueError) as found:  # ValueError: a damaged file
        error = f"run {campaign.runs}, {found}; the runs are kept in {options.run_dir}"
    seconds = time.monotonic() - start
    counts = dict(Counter(kill[tallied] for kill in campaign.kills))
    print(f"{len(campaign.kills)} kills in {campaign.runs} runs, {seconds:.0f} s: {counts}")
    print(f"error: {error}" if error else "no difference")
    if options.json:
        report = {"error": error, "seconds": seconds, "kills": campaign.kills}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if not error:
        shutil.rmtree(options.run_dir)
    return 1 if error else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--data-path", nargs="+", required=True, help="as the trainer's")
    add("--kills", type=int, default=25, help="of all runs together")
    add("--steps", type=int, default=40, help="of each run (default: %(default)s)")
    add("--seed", type=int, default=1, help="of the moments to kill at")
    add("--processes", type=int, nargs="+", default=[2, 1], help="undisturbed, others to resume")
    add("--run-dir", type=Path, required=True, help="new or empty; removed if all runs pass")
    add("--json", type=Path, metavar="FILE", help="write the report to FILE")
    add("trainer", nargs="*", help="after --: more arguments for the trainer")
    options = parser.parse_args(arguments)
    if options.run_dir.exists() and any(options.run_dir.iterdir()):
        parser.error(f"--run-dir {options.run_dir} is not empty; name another")
    return conduct(Campaign(options), options, "died in")


if __name__ == "__main__":
    sys.exit(main())
