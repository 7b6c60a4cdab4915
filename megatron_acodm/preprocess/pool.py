"""Runs a function over a stream in worker processes: results in order, and no hang if one dies."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

_WINDOW = 4
"""Tasks a worker that may be unfinished or waiting for their turn: bounds the memory."""

_WINDOW_BYTES = 1 << 26
"""Bytes of such tasks: the memory stays bounded when they are large."""

_PR_SET_PDEATHSIG = 1

# Forked workers start at once, where others would import Megatron, each for seconds.
_CONTEXT = multiprocessing.get_context("fork")


class WorkerDied(RuntimeError):
    """A worker process ended before its work was done."""


class WorkerPool:
    """Processes that each hold a function and apply it to what they are sent.

    The standard pools wait for ever when a process is killed while it holds their shared queue;
    here each worker has a pipe of its own, whose end of file tells both sides that the other is
    gone. Use it in a ``with`` statement; the processes end with it.

    Args:
        workers: How many, at least 1.
        make_function: Called in each process for the function.
    """

    def __init__(self, workers: int, make_function: Callable[[], Callable[[Any], Any]]) -> None:
        if workers < 1:
            raise ValueError(f"--workers is {workers}; it must be at least 1")
        self._processes: dict[Connection, Any] = {}
        for _ in range(workers):
            ours, theirs = _CONTEXT.Pipe()
            # The process inherits copies of our ends, which would keep the pipes open.
            inherited = [*self._processes, ours]
            process = _CONTEXT.Process(
                target=_serve, args=(os.getpid(), theirs, inherited, make_function), daemon=True
            )
            self._processes[ours] = process
            process.start()
            theirs.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.kill()
            process.join()

    def map(
        self, tasks: Iterable[Any], size: Callable[[Any], int] = lambda task: 0
    ) -> Iterator[Any]:
        """Yield the function's result for each task, in the order of the tasks.

        Tasks are taken one ahead of what the workers need, so that a slow source and the workers
        run at the same time.

        Args:
            tasks: Taken as the workers need them.
            size: Bytes of a task, of which at most _WINDOW_BYTES are unfinished or waiting for
                their turn at once, or a single task.

        Raises:
            OSError: that the function raised.
            WorkerDied: when a worker ends; what it printed is on standard error.
        """
        under_way, done = deque[int](), dict[int, Any]()
        returned = 0

        def admits(task: Any) -> bool:
            is_full = len(under_way) >= _WINDOW * len(self._processes)
            if under_way and (is_full or sum(under_way) + size(task) > _WINDOW_BYTES):
                return False
            under_way.append(size(task))
            return True

        for number, result in self.as_completed(tasks, admits):
            done[number] = result
            while returned in done:
                yield done.pop(returned)
                under_way.popleft()
                returned += 1

    def as_completed(
        self, tasks: Iterable[Any], admits: Callable[[Any], bool] = lambda task: True
    ) -> Iterator[tuple[int, Any]]:
        """Yield the number of each task and the function's result, as soon as it is there.

        Args:
            tasks: Taken one ahead of what the workers need.
            admits: Asked for the next task when a worker is idle, until it says yes. It must when
                all results so far have been taken.

        Raises:
            OSError, WorkerDied: as ``map``.
        """
        source = enumerate(tasks)
        ahead = next(source, None)
        idle, busy = deque(self._processes), dict[Connection, int]()
        while ahead is not None or busy:
            while ahead is not None and idle and admits(ahead[1]):
                number, task = ahead
                self._send(idle[0], task)
                busy[idle.popleft()] = number
                ahead = task = None  # the worker has it; memory need not hold two
                ahead = next(source, None)
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                result = self._receive(connection)
                idle.append(connection)
                yield busy.pop(connection), result

    def _send(self, worker: Connection, task: Any) -> None:
        try:
            worker.send(task)
        except OSError as error:
            raise self._death(worker) from error

    def _receive(self, worker: Connection) -> Any:
        try:
            result = worker.recv()
        except (EOFError, OSError) as error:
            raise self._death(worker) from error
        if isinstance(result, OSError):
            raise result
        return result

    def _death(self, worker: Connection) -> WorkerDied:
        process = self._processes[worker]
        process.join(timeout=10)
        code = process.exitcode
        if code is not None and code < 0:
            return WorkerDied(
                f"worker process {process.pid} was killed by {signal.Signals(-code).name}; if the "
                "machine ran out of memory, lower --workers"
            )
        return WorkerDied(f"worker process {process.pid} failed (exit code {code}); see above")


def _serve(
    parent: int,
    connection: Connection,
    inherited: Sequence[Connection],
    make_function: Callable[[], Callable[[Any], Any]],
) -> None:
    """Answer tasks until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(parent)
    for other in inherited:
        other.close()
    function = make_function()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            result = function(task)
        except OSError as error:  # a full disk is no fault of the program
            result = error
        with suppress(BrokenPipeError):
            connection.send(result)


def _die_with(parent: int) -> None:
    """End with the parent, whatever ends it: nobody may write when the next run begins."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before
        os._exit(1)
