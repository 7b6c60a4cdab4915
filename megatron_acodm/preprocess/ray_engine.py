"""Builds shards on a Ray cluster, a task an input; all nodes see the same files."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from megatron_acodm.preprocess.build import ShardBuilder
from megatron_acodm.preprocess.pool import WorkerDied
from megatron_acodm.preprocess.progress import Progress
from megatron_acodm.preprocess.reader import InputFile

MAX_RETRIES = 3
"""Times that an input is begun again after the worker or the node at it was lost."""


def build_on_ray(
    builder: ShardBuilder, inputs: Mapping[int, InputFile], progress: Progress
) -> None:
    """Build the shards of some inputs on the cluster that RAY_ADDRESS names, or on this machine.

    Args:
        builder: Its ``workers`` are the CPUs that each task takes.
        inputs: By number.
        progress: Told of each input that is done.

    Raises:
        ValueError: when Ray is not installed, or for an input that cannot be used.
        OSError: when reading or writing fails; the file's name is in it.
        WorkerDied: when a worker is lost more than MAX_RETRIES times.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "--engine ray needs Ray, which is not installed; run: pip install 'megatron-acodm[ray]'"
        ) from error
    with _connected(ray, builder.workers):
        task = ray.remote(_build).options(
            num_cpus=builder.workers, max_retries=MAX_RETRIES, retry_exceptions=[WorkerDied]
        )
        indices = {task.remote(builder, index, item): index for index, item in inputs.items()}
        waiting = list(indices)
        while waiting:
            done, waiting = ray.wait(waiting)
            for reference in done:
                documents, text_bytes = _result(ray, reference, inputs[indices[reference]])
                progress.update(inputs[indices[reference]].size, documents, text_bytes)


def _build(builder: ShardBuilder, index: int, item: InputFile) -> tuple[int, int]:
    """Build one shard; return its documents and bytes of text. Runs on the cluster."""
    progress = Progress(item.name, item.size)
    builder.build({index: item}, progress.add_chunk)
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
def _connected(ray: ModuleType, cpus: int) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Megatron warns on import about packages that only a GPU run uses.
    quiet = {"env_vars": {"PYTHONWARNINGS": "ignore::UserWarning"}}
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"logging_level": "warning", "runtime_env": quiet}
    if not address:
        # A task that wants more than there is would wait for ever.
        cpus = max(cpus, len(os.sched_getaffinity(0)))
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (OSError, RuntimeError) as error:
        place = f"the cluster at RAY_ADDRESS={address}" if address else "Ray on this machine"
        raise ValueError(f"cannot reach {place}: {error}") from error
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray sets its own
    try:
        yield
    finally:
        ray.shutdown()  # ends the tasks that still run
