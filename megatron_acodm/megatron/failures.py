"""What ends a run from outside, a lost rank or a full disk, and how to say so in one message."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_acodm.megatron.compat import UnsupportedHostError

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file with the number of the last whole checkpoint."""

_SIGNS = re.compile(
    r"connection (closed|reset|refused)|pair closure|broken pipe|socket (closed|error|timeout)"
    r"|timed out waiting|wait timeout|failed to recv|could not receive|remote process exited"
    r"|watchdog caught collective operation timeout|nccl communicator was aborted",
    re.IGNORECASE,
)
"""What gloo, NCCL and torch's store say of a rank that is gone; they have no exceptions for it."""


class SaveFailed(OSError):
    """A checkpoint could not be written; the one before it is as it was."""


def lost_rank(error: BaseException) -> str | None:
    """What a collective said of a rank that is gone; None if the error is of another kind."""
    for cause in _causes(error):
        if not isinstance(cause, (RuntimeError, CheckpointException)):
            continue
        for line in str(cause).splitlines():
            if _SIGNS.search(line):
                words = re.sub(r"\[[^]]*\.cc:\d+\] *", "", line.strip())
                return words.partition(". ")[0].rstrip(".")
    return None


def explain_lost_rank(said: str, minutes: float, save: str | None, iteration: int) -> str:
    """The message on it, with the limit and how to go on.

    Args:
        said: by ``lost_rank``.
        minutes: that a collective waits.
        save: folder of the checkpoints, if any.
        iteration: steps that were begun.
    """
    where = f"in or after step {iteration}" if iteration else "before the first step"
    return (
        f"another rank is gone, or did not answer within {minutes:g} minutes "
        f"(distributed-timeout-minutes), {where}: {said}. {_how_to_go_on(save)}"
    )


@contextlib.contextmanager
def naming_failed_save(root: str | Path, iteration: int) -> Iterator[None]:
    """Raise SaveFailed for what stops a save in it, unless that is a lost rank."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        if isinstance(error, UnsupportedHostError) or _is_of_the_device(error):
            raise
        if lost_rank(error) is not None:
            raise
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(root).free
            reason += f" ({free / 1e6:,.0f} MB are free there)"
        raise SaveFailed(
            f"the checkpoint of step {iteration} could not be written to {root}: {reason}; make "
            f"room or name another folder. {_how_to_go_on(str(root))}"
        ) from error


def _how_to_go_on(save: str | None) -> str:
    if not save:
        return "Nothing is saved without --save"
    tracker = Path(save) / TRACKER
    if not tracker.is_file():
        return f"There is no checkpoint in {save} yet: the same command starts over"
    step = tracker.read_text(encoding="utf-8").strip()
    if not step.isdigit():
        return f"The same command, with --load {save}, starts from the weights there"
    return f"The same command, with --load {save}, goes on after step {step}"


def _is_of_the_device(error: BaseException) -> bool:
    """Whether an error of the GPU surfaced here, as it may wherever the host waits for it."""
    signs = ("CUDA error", "CUDA out of memory", "NCCL error", "device-side assert")
    return any(
        isinstance(cause, torch.OutOfMemoryError) or any(sign in str(cause) for sign in signs)
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
