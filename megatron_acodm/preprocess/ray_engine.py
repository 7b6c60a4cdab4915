"""Builds shards on a Ray cluster, a task an input; all nodes see the same files."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from megatron_acodm.preprocess.pool import WorkerDied
from megatron_acodm.preprocess.progress import Progress
from megatron_acodm.preprocess.reader import InputFile
from megatron_acodm.preprocess.shard import ShardBuilder

MAX_RETRIES = 3
"""Times that an input is begun again after the worker or the node at it was lost."""

_POLL_S = 0.5
"""Ray does not let a signal's handler end a wait: how long one waits at most."""


def build_on_ray(builder: ShardBuilder, inputs: Sequence[InputFile], progress: Progress) -> None:
    """Build the shards of some inputs on the cluster that RAY_ADDRESS names, or on this machine.

    Args:
        builder: Its ``workers`` are the CPUs that each task takes.
        inputs: As for ``ShardBuilder.build``.
        progress: Told of each input that is done.

    Raises:
        ValueError: when Ray is not installed, when no node has as many CPUs as ``workers``, or
            for an input that cannot be used.
        OSError: when reading or writing fails; the file's name is in it.
        WorkerDied: when a worker is lost more than MAX_RETRIES times.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "--engine ray needs Ray, which is not installed; run: pip install 'megatron-acodm[ray]'"
        ) from error
    with _deferred_sigterm() as end_if_told, _connected(ray, builder.workers):
        task = ray.remote(_build).options(
            num_cpus=builder.workers, max_retries=MAX_RETRIES, retry_exceptions=[WorkerDied]
        )
        items = {task.remote(builder, item): item for item in inputs}
        waiting = list(items)
        while waiting:
            end_if_told()
            done, waiting = ray.wait(waiting, timeout=_POLL_S)
            for reference in done:
                documents, text_bytes = _result(ray, reference, items[reference])
                progress.update(items[reference].size, documents, text_bytes)


def _build(builder: ShardBuilder, item: InputFile) -> tuple[int, int]:
    """Build one shard; return its documents and bytes of text. Runs on the cluster."""
    progress = Progress(item.name, item.size)
    builder.build([item], progress.add_chunk)
    return progress.documents, progress.text_bytes


def _result(ray: ModuleType, reference: object, item: InputFile) -> tuple[int, int]:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise WorkerDied(
            f"{item.name}: lost {MAX_RETRIES + 1} times with the worker at it ({error})"
        ) from error


@contextmanager
def _deferred_sigterm() -> Iterator[Callable[[], None]]:
    """Only note a SIGTERM, which Ray would swallow; yield what does as the signal says."""
    before, was_told = signal.getsignal(signal.SIGTERM), False

    def note(*_: object) -> None:
        nonlocal was_told
        was_told = True

    def end_if_told() -> None:
        signal.signal(signal.SIGTERM, before if was_told else note)  # Ray sets its own
        if was_told:
            signal.raise_signal(signal.SIGTERM)

    try:
        end_if_told()
        yield end_if_told
        end_if_told()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _connected(ray: ModuleType, workers: int) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Megatron warns on import about packages that only a GPU run uses.
    quiet = {"env_vars": {"PYTHONWARNINGS": "ignore::UserWarning"}}
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"logging_level": "warning", "runtime_env": quiet}
    if not address:
        # A task that wants more than there is would wait for ever.
        cpus = max(workers, len(os.sched_getaffinity(0)))
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(**options)
    except (OSError, RuntimeError) as error:
        place = f"the cluster at RAY_ADDRESS={address}" if address else "Ray on this machine"
        raise ValueError(f"cannot reach {place}: {error}") from error
    try:
        most = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        if most < workers:
            raise ValueError(
                f"--workers is {workers}, the CPUs of each task, but no node of the cluster "
                f"has more than {most:g}; lower --workers"
            )
        yield
    finally:
        ray.shutdown()  # ends the tasks that still run
