"""Runs a function over a stream in worker processes: results in order, and no hang if one dies."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

_WINDOW = 4
"""Tasks a worker that may be unfinished or waiting for their turn: bounds the memory."""

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
                target=_serve, args=(theirs, inherited, make_function), daemon=True
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

    def map(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yield the function's result for each task, in the order of the tasks.

        Tasks are taken one ahead of what the workers need, so that a slow source and the workers
        run at the same time.

        Raises:
            OSError: that the function raised.
            WorkerDied: when a worker ends; what it printed is on standard error.
        """
        source = iter(tasks)
        ahead = next(source, None)
        idle, busy, done = deque(self._processes), dict[Connection, int](), dict[int, Any]()
        sent = returned = 0
        window = _WINDOW * len(self._processes)
        while ahead is not None or busy or done:
            while ahead is not None and idle and sent - returned < window:
                self._send(idle[0], ahead)
                busy[idle.popleft()] = sent
                sent += 1
                ahead = next(source, None)
            while returned in done:
                yield done.pop(returned)
                returned += 1
            for connection in wait(list(busy)) if busy else ():
                assert isinstance(connection, Connection)
                done[busy.pop(connection)] = self._receive(connection)
                idle.append(connection)

    def as_completed(self, tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the number of each task and the function's result, as soon as it is there.

        Raises:
            OSError, WorkerDied: as ``map``.
        """
        waiting = deque(enumerate(tasks))
        idle, busy = deque(self._processes), dict[Connection, int]()
        while waiting or busy:
            while waiting and idle:
                number, task = waiting.popleft()
                self._send(idle[0], task)
                busy[idle.popleft()] = number
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
    connection: Connection,
    inherited: Sequence[Connection],
    make_function: Callable[[], Callable[[Any], Any]],
) -> None:
    """Answer tasks until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
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
