"""Kills runs of Megatron-LM under the launcher at random moments, and compares what comes of them.

Two tensor-parallel ranks train from the start to a random moment; then either all processes are
killed at once (SIGKILL), or one rank is, or torchrun is told to end (SIGTERM). What is left must
end by itself. The same command is given again, until the run is over: metrics, samples, model,
optimizer, ledger and policy must equal an undisturbed run's bit for bit; the host's random states
are left out, since its loaders draw from them at each start. The first difference ends the campaign
with exit status 1.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import psutil
from kill_resume import LEARNING, Difference, Facts, Folder, Launch, compare, conduct, facts

from megatron_acodm.help_format import HelpFormatter

WAYS = ("all", "one rank", "SIGTERM")
KILLS_PER_RUN = 4
PATIENCE_S = 90.0  # for what is left after a kill to end
MODEL = [
    *("--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4"),
    *("--seq-length", "64", "--max-position-embeddings", "64"),
    *("--micro-batch-size", "2", "--global-batch-size", "16"),
    *("--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine", "--seed", "7"),
    *("--transformer-impl", "local", "--no-persist-layer-norm", "--no-masked-softmax-fusion"),
    *("--no-gradient-accumulation-fusion", "--no-bias-gelu-fusion", "--no-bias-dropout-fusion"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--no-rope-fusion"),
    *("--no-create-attention-mask-in-dataloader", "--distributed-backend", "gloo"),
    *("--tensor-model-parallel-size", "2", "--distributed-timeout-minutes", "1"),
    *("--split", "90,10,0", "--eval-interval", "7", "--eval-iters", "1", "--log-interval", "1"),
    *("--num-workers", "1", "--save-interval", "5", "--exit-signal-handler"),
]


class HostLaunch(Launch):
    """One start of ``pretrain_gpt.py``."""

    def program(self, arguments: Sequence[str]) -> list[str]:
        """What torchrun runs."""
        checkout = os.environ["MEGATRON_LM_PATH"]
        config = self.folder.root.parent / "learning.yaml"
        own = ["--acodm-config", str(config), "--acodm-run-dir", str(self.folder.run)]
        script = str(Path(checkout) / "pretrain_gpt.py")
        return ["-m", "megatron_acodm.launch", *own, script, *MODEL, *arguments]

    def see_out(self, limit: float) -> None:
        """Wait until torchrun has ended; RuntimeError if it does not."""
        deadline = time.monotonic() + limit
        while self._torchrun.poll() is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.log}: did not end within {limit:.0f} s")
            time.sleep(0.02)

    def disturb(self, way: str, rng: random.Random) -> None:
        """End the run in one of WAYS, and see to it that nothing is left."""
        if way == "all":
            self.kill()
            return
        if way == "one rank":
            trainers = psutil.Process(self._torchrun.pid).children()
            rng.choice(trainers).kill() if trainers else self._torchrun.terminate()
        else:
            self._torchrun.send_signal(signal.SIGTERM)
        self.see_out(PATIENCE_S)
        for process in self._alive():  # helpers of a rank that was killed
            with suppress(psutil.Error):
                process.kill()


def host_facts(folder: Folder, finished: bool) -> Facts:
    """The facts but for the host's random states: its loaders draw from them at each start."""
    found = facts(folder, finished).items()
    return {k: v for k, v in found if not any(str(name).startswith("rng_state") for name in k)}


class Campaign:
    """An undisturbed run, and disturbed ones that are held against it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._rng = options, random.Random(options.seed)
        self._root = options.run_dir.absolute()
        self._root.mkdir(parents=True, exist_ok=True)
        (self._root / "learning.yaml").write_text(LEARNING, encoding="utf-8")
        self._arguments = ["--data-path", str(Path(options.manifest).absolute())]
        self._arguments += ["--data-cache-path", str(self._root / "cache")]
        self._arguments += ["--train-iters", str(options.steps)]
        self.kills: list[dict[str, object]] = []
        self.runs = 0

    def run(self) -> None:
        """Run until the time is up; raise at the first thing amiss."""
        end = time.monotonic() + 60 * self._options.minutes
        reference = Folder(self._root / "undisturbed")
        begun, first_step = time.monotonic(), 0.0
        with closing(HostLaunch(reference, self._arguments, 2)) as launch:
            while launch.running():
                if not first_step and reference.last("step") > 0:
                    first_step = time.monotonic() - begun
                time.sleep(0.01)
        step_s = (time.monotonic() - begun - first_step) / self._options.steps
        expected = host_facts(reference, finished=True)
        while time.monotonic() < end:
            self.runs += 1
            folder = Folder(self._root / f"run-{self.runs}")
            for _ in range(KILLS_PER_RUN):
                way = WAYS[len(self.kills) % len(WAYS)]
                with closing(HostLaunch(folder, self._arguments, 2)) as launch:
                    if not self._wait(launch, first_step, step_s):
                        break
                    launch.disturb(way, self._rng)
                self._record(folder, way)
                compare(expected, host_facts(folder, finished=False), exact=True, finished=False)
            if folder.announced() < self._options.steps:
                with closing(HostLaunch(folder, self._arguments, 2)) as launch:
                    while launch.running():
                        time.sleep(0.05)
            compare(expected, host_facts(folder, finished=True), exact=True, finished=True)
            shutil.rmtree(folder.root)

    def _wait(self, launch: HostLaunch, first_step: float, step_s: float) -> bool:
        """Let a random part of the start, or of a step and its save, pass; False if it ended."""
        resumed = launch.resumed_from
        target = self._rng.randint(resumed, min(resumed + 12, self._options.steps - 1))
        while target > resumed and launch.running() and launch.folder.last("step") < target:
            time.sleep(0.005)
        end = time.monotonic() + self._rng.random() * (
            first_step if target == resumed else 2 * step_s
        )
        while launch.running() and time.monotonic() < end:
            time.sleep(0.005)
        return launch.running()

    def _record(self, folder: Folder, way: str) -> None:
        step, checkpoint = max(folder.last("step"), 0), folder.announced()
        kill = {"run": self.runs, "killed": way}
        kill |= {"last step": step, "resumes from": checkpoint}
        self.kills.append(kill)
        print("".join(f"{name} {value!s:<10}" for name, value in kill.items()), flush=True)
        if checkpoint < step - step % 5 - 5:
            raise Difference(step, "last checkpoint", step - step % 5, checkpoint)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("manifest", help="of tools/preprocess_pile.py")
    add("--minutes", type=float, default=10, help="begin no further run after these")
    add("--steps", type=int, default=60, help="of each run (default: %(default)s)")
    add("--seed", type=int, default=1, help="of the moments to kill at")
    add("--run-dir", type=Path, required=True, help="new or empty; removed if all runs pass")
    add("--json", type=Path, metavar="FILE", help="write the report to FILE")
    options = parser.parse_args(arguments)
    if "MEGATRON_LM_PATH" not in os.environ:
        parser.error("MEGATRON_LM_PATH must name a checkout of Megatron-LM")
    if options.run_dir.exists() and any(options.run_dir.iterdir()):
        parser.error(f"--run-dir {options.run_dir} is not empty; name another")
    path = os.environ["MEGATRON_LM_PATH"], os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return conduct(Campaign(options), options, "killed")


if __name__ == "__main__":
    sys.exit(main())
