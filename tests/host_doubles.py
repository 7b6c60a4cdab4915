"""What scripts around a host's training share: a record of what is trained, and an abrupt end."""

from __future__ import annotations

import json
import os
from typing import Any

import psutil


def record_batches(path: str) -> None:
    """Append the tokens of every training micro-batch of a GPT to ``path``, as lines of JSON."""
    from megatron.core.models.gpt import GPTModel

    forward = GPTModel.forward
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (to the process's end)

    def recorded(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            file.write(json.dumps(input_ids.tolist()) + "\n")
            file.flush()
        return forward(self, input_ids, *args, **kwargs)

    GPTModel.forward = recorded


def crash() -> None:
    """End this process and its helpers as a lost machine would, with status 42."""
    for helper in psutil.Process().children(recursive=True):
        helper.kill()
    os._exit(42)
