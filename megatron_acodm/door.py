"""How the commands that torchrun starts on every rank speak and end: once, whatever the rank."""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser
from typing import NoReturn

_HEAD_START_S = 2.0
"""How long other ranks let rank 0 speak first: torchrun ends them when it exits."""


def rank() -> int:
    """This process's rank, before torch.distributed has started."""
    return int(os.environ.get("RANK", "0"))


def speak_once(parser: ArgumentParser) -> None:
    """Leave what the parser has to say of wrong flags to rank 0."""
    if rank() != 0:
        parser.print_usage = lambda file=None: None  # type: ignore[method-assign]
        parser.exit = _exit_quietly  # type: ignore[method-assign]


def fail(message: str) -> NoReturn:
    """Print the error once for all ranks and leave at once, whatever peers are waiting for."""
    if rank() != 0:
        time.sleep(_HEAD_START_S)
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _exit_quietly(status: int = 0, message: str | None = None) -> NoReturn:
    del message
    time.sleep(_HEAD_START_S)
    sys.exit(status)
