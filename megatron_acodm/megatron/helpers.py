"""The processes that a host's save starts: they outlive a SIGTERM, and not their trainer.

Imports no torch, as each of them imports this.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.managers import BaseManager
from typing import Any


@contextmanager
def helpers_in_hand(*, heed_sigterm: bool = False) -> Iterator[None]:
    """What this thread starts meanwhile is deaf to SIGTERM; managers end with their trainer.

    Batch systems send the signal to every process of a job. A checkpoint is written with helpers,
    one of which, a manager, lives on for the next: the save that the signal asks for would fail for
    want of it. When a trainer is killed Python leaves its managers behind, and with them whoever
    waits for the end of the job's output. The process itself is not protected: other threads of it
    still take the signal.

    Args:
        heed_sigterm: let SIGTERM end helpers all the same.
    """
    start = BaseManager.start

    def start_watching(
        self: BaseManager, initializer: Callable[..., object] | None = None, initargs: Any = ()
    ) -> None:
        start(self, initializer or end_with_parent, initargs)

    resource_tracker.ensure_running()  # or Python lets the signal through when it starts it
    blocked = set() if heed_sigterm else {signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    BaseManager.start = start_watching  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseManager.start = start  # type: ignore[method-assign]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """In a helper: end when the process that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
