"""A thread that takes mixing off the training step's path."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

Result = TypeVar("Result")

_PATIENCE_S = 5.0
"""How long to wait for the last task: it may itself wait for ranks that are gone."""


class Background:
    """Runs tasks one after the other in a thread of its own.

    A task may wait for a rank that is gone, and must not keep this process alive, as the threads of
    concurrent.futures would. Nor must it be cut off when the interpreter ends, which aborts the
    process: then, too, ``stop`` is called.

    Args:
        device: whose CUDA context, if any, the tasks use.
        give_up: makes a task fail that waits for other ranks.
    """

    def __init__(self, device: torch.device, give_up: Callable[[], None]) -> None:
        self._device = device
        self._give_up = give_up
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="megatron_acodm", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def submit(self, task: Callable[[], Result]) -> Future[Result]:
        """Run a task after those before it; its result or exception is the future's."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                result = task()
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)
            else:
                future.set_result(result)

        self._tasks.put(run)
        return future

    def stop(self) -> None:
        """End the thread after the tasks before; waits for it, but not for long."""
        atexit.unregister(self.stop)
        self._tasks.put(None)
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            self._give_up()
            self._thread.join(_PATIENCE_S)

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a thread starts on the first one
        while (task := self._tasks.get()) is not None:
            task()
