"""SIGTERM as a wish to save and end, which all ranks follow after the same step.

torchrun sends it to the trainers, batch systems to every process that these have started, too.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


class ExitSignal:
    """Whether any rank was asked to end.

    Ranks are asked at different moments; a sum over all of them, which travels beside the step,
    says after which step they end. It costs the step nothing.

    Args:
        group: all ranks; used by nothing else at the same time.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._is_noted = False
        self._message = torch.zeros(1, dtype=torch.int32)
        self._sum: Any = None
        self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._is_noted = True

    def begin_step(self) -> None:
        """Tell the others what is known so far; collective."""
        self._message.fill_(int(self._is_noted))
        self._sum = dist.all_reduce(self._message, group=self._group, async_op=True)

    def came(self) -> bool:
        """Whether any rank had been asked when the step began; the same on all."""
        self._sum.wait()
        return bool(self._message)

    def close(self) -> None:
        """Let SIGTERM do what it did before."""
        signal.signal(signal.SIGTERM, self._before)


def heed_parent_only(worker: int) -> None:
    """In a loading worker: let nobody but the trainer end it with SIGTERM.

    torchrun and batch systems send the signal to every process, but the trainer needs its workers
    to finish the step. Blocked, the signal is taken by a thread that can see who sent it.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while True:
            if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
                os._exit(0)

    threading.Thread(target=wait, name="sigterm", daemon=True).start()
