"""A user's script around ``pretrain_gpt.py`` of a checkout: records what is trained, may crash.

``RECORD_TO`` names a file for the tokens of every training micro-batch; ``CRASH_AT_SAVE`` an
iteration whose checkpoint is complete but for its announcement when the process dies.
"""

import builtins
import json
import os
import runpy
import sys
from pathlib import Path

import psutil

TRACKER = "latest_checkpointed_iteration.txt"
CHECKOUT = os.environ["MEGATRON_LM_PATH"]


def _record(path: str) -> None:
    from megatron.core.models.gpt import GPTModel

    forward = GPTModel.forward
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (to the process's end)

    def recorded(self, input_ids, *args, **kwargs):
        if self.training:
            file.write(json.dumps(input_ids.tolist()) + "\n")
            file.flush()
        return forward(self, input_ids, *args, **kwargs)

    GPTModel.forward = recorded


def _crash_at(iteration: str) -> None:
    open_file = builtins.open

    def crashing(name, mode="r", *args, **kwargs):
        saved = Path(str(name)).parent / f"iter_{int(iteration):07d}"
        if "w" in mode and str(name).endswith(TRACKER) and saved.exists():
            for helper in psutil.Process().children(recursive=True):
                helper.kill()
            os._exit(42)
        return open_file(name, mode, *args, **kwargs)

    builtins.open = crashing


if __name__ == "__main__":
    sys.path.insert(0, CHECKOUT)
    if path := os.environ.get("RECORD_TO"):
        _record(path)
    if iteration := os.environ.get("CRASH_AT_SAVE"):
        _crash_at(iteration)
    runpy.run_path(os.path.join(CHECKOUT, "pretrain_gpt.py"), run_name="__main__")
