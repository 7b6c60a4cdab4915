"""A training run that goes on while the test looks, and loses ranks as the test wants."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ENVIRONMENT, REPOSITORY


class Running:
    """torchrun in the background, with the trainers it has started.

    Args:
        command: of torchrun.
        directory: of the run's metrics.
        log: file for what it prints.
        environment: added to the suite's.
    """

    def __init__(
        self, command: list[Any], directory: Path, log: Path, environment: dict[str, str]
    ) -> None:
        self.directory, self._log = directory, log
        self._mark = ("RUNNING_OF_TEST", str(log))
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                [*map(str, command)],
                env={
                    **ENVIRONMENT,
                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                    **environment,
                    **dict([self._mark]),
                },
                cwd=REPOSITORY,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What the lines of steps say, but for times; a last one that is being written is not."""
        path = self.directory / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
        timed = ("step_time_s", "mixing_time_s", "timing")
        return [{k: v for k, v in x.items() if k not in timed} for x in lines if "lm_loss" in x]

    def wait_for_step(self, step: int, seconds: float = 300) -> None:
        """Until the metrics have it, or a later one, of this start."""
        deadline = time.monotonic() + seconds
        while not self.steps or self.steps[-1]["iteration"] < step:
            assert self._process.poll() is None, f"ended before step {step}\n{self.output}"
            assert time.monotonic() < deadline, f"no step {step} in {seconds} s\n{self.output}"
            time.sleep(0.02)

    def wait_for_output(self, text: str, seconds: float) -> None:
        """Until it has said something."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < deadline, f"no {text!r} in {seconds} s\n{self.output}"
            time.sleep(0.1)

    def trainer(self, rank: int) -> psutil.Process:
        """The process of a rank."""
        for process in psutil.Process(self._process.pid).children():
            with suppress(psutil.Error):
                if process.environ().get("RANK") == str(rank):
                    return process
        raise AssertionError(f"no rank {rank} runs here\n{self.output}")

    def tell(self, number: int = signal.SIGTERM) -> None:
        """Signal torchrun."""
        os.kill(self._process.pid, number)

    def tell_every_process(self, number: int = signal.SIGTERM) -> None:
        """Signal torchrun, its trainers and all that they have started, as batch systems do."""
        for process in self._processes():
            with suppress(psutil.Error):
                process.send_signal(number)

    def _processes(self) -> list[psutil.Process]:
        processes = psutil.process_iter(["environ"])
        return [p for p in processes if self._mark in (p.info["environ"] or {}).items()]

    def lose(self) -> None:
        """End torchrun, its trainers and their helpers at once, as if the node had no power."""
        if self._process.poll() is None:
            self.tell(signal.SIGSTOP)  # so that it neither ends trainers gently nor starts others
        for process in self._processes():
            with suppress(psutil.Error):
                process.kill()
        self._process.wait()

    def wait(self, seconds: float = 400) -> int:
        """The exit status of torchrun."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.output}") from None

    def close(self) -> None:
        """Leave no process behind, nor a helper of a trainer that was killed."""
        self.lose()


def mount(*arguments: str) -> None:
    """Mount for the first time, or skip the test where that is not allowed."""
    result = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"this test must be allowed to mount: {result.stderr.strip()}")


def remount(folder: Path, size: int) -> None:
    """Give a mounted tmpfs another size in bytes."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
