"""How the commands that torchrun starts on every rank speak and end: once, whatever the rank."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from argparse import ArgumentParser
from pathlib import Path
from typing import NoReturn

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""torchrun's variable with a file of each rank, in a folder of each start of all."""


def rank() -> int:
    """This process's rank, before torch.distributed has started."""
    return int(os.environ.get("RANK", "0"))


def speak_once(parser: ArgumentParser) -> None:
    """Let one rank say what the parser has to say of wrong flags, where many are started."""

    def error(message: str) -> NoReturn:
        if rank() != 0 and not os.environ.get(_ERROR_FILE):  # no torchrun ends who speaks
            sys.exit(2)
        fail(f"{parser.format_usage()}{parser.prog}: error: {message}", status=2)

    if "RANK" in os.environ:
        parser.error = error  # type: ignore[method-assign]


def fail(message: str, cause: BaseException | None = None, status: int = 1) -> NoReturn:
    """Print the error once for all ranks of a node and leave at once, whatever peers wait for.

    The first to fail speaks, as the others may fail because it has.

    Args:
        message: the last thing that is said.
        cause: whose traceback is printed before it: an error that may not be what it seems.
        status: to exit with.
    """
    ignore_sigterm()
    if _is_first_to_fail():
        if cause is not None:
            traceback.print_exception(cause)
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    for helper in multiprocessing.active_children():  # Megatron's writer of checkpoints has one
        helper.kill()
    os._exit(status)


def ignore_sigterm() -> None:
    """Let a rank that fails say so: torchrun sends SIGTERM to all of a node when it has lost one.

    Blocking the signal would not do, as another thread of the process would take it.
    """
    with contextlib.suppress(ValueError):  # in a thread, which may not; the main one decides
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_first_to_fail() -> bool:
    """Whether no other rank that this torchrun has started asked that before."""
    file = os.environ.get(_ERROR_FILE)
    if not file:  # it is empty where torchrun keeps no logs
        return True
    start = Path(file).parent.parent  # of one start of all ranks; torchrun removes it
    try:
        (start / "megatron_acodm_failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
