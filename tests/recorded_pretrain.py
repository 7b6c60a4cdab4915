"""A user's script around ``pretrain_gpt.py`` of a checkout: records what is trained, may crash.

``RECORD_TO`` names a file for the tokens of every training micro-batch; ``CRASH_AT_SAVE`` an
iteration whose checkpoint is complete but for its announcement when the process dies.
"""

import builtins
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from host_doubles import crash, record_batches

TRACKER = "latest_checkpointed_iteration.txt"
CHECKOUT = os.environ["MEGATRON_LM_PATH"]


def _crash_at(iteration: str) -> None:
    open_file = builtins.open

    def crashing(name: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        saved = Path(str(name)).parent / f"iter_{int(iteration):07d}"
        if "w" in mode and str(name).endswith(TRACKER) and saved.exists():
            crash()
        return open_file(name, mode, *args, **kwargs)

    builtins.open = crashing


if __name__ == "__main__":
    sys.path.insert(0, CHECKOUT)
    if path := os.environ.get("RECORD_TO"):
        record_batches(path)
    if iteration := os.environ.get("CRASH_AT_SAVE"):
        _crash_at(iteration)
    runpy.run_path(os.path.join(CHECKOUT, "pretrain_gpt.py"), run_name="__main__")
