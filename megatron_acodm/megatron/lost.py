"""Tells a rank that is gone, or does not answer, from the other ways in which a step can fail."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_acodm.megatron.checkpoint_names import TRACKER

_SIGNS = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket (closed|error|timeout)"
    r"|timed out waiting|wait timeout|failed to recv|remote process exited|process group .*abort"
    r"|NCCL (communicator was aborted|error.*remote)|could not receive",
    re.IGNORECASE,
)
"""What gloo, NCCL and torch's store say of it; they raise RuntimeErrors without a class of theirs."""


def lost_rank(error: BaseException) -> str | None:
    """What a collective said of a rank that is gone; None if the error is of another kind."""
    for cause in _causes(error):
        if not isinstance(cause, RuntimeError):
            continue
        for line in str(cause).splitlines():
            if _SIGNS.search(line):
                return re.sub(r"^\[[^]]*\] *", "", line.strip())
    return None


def explain_lost_rank(
    said: str, timeout_minutes: float, save: str | None, iteration: int | None
) -> str:
    """One message: what happened, the limit, and how to go on."""
    during = "at the start" if iteration is None else f"in step {iteration}"
    return (
        f"another rank is gone, or did not answer within {timeout_minutes:g} minutes "
        f"(--distributed-timeout-minutes), {during}: {said}; {_how_to_go_on(save)}"
    )


def _how_to_go_on(save: str | None) -> str:
    if save is None:
        return "nothing was saved without --save"
    tracker = Path(save) / TRACKER
    if not tracker.is_file():
        return f"there is no checkpoint in {save} yet, so the same command starts over"
    return (
        f"the same command with --load {save} goes on from its last checkpoint, after step "
        f"{tracker.read_text(encoding='utf-8').strip()}"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
