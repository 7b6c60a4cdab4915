"""Runs a script of Megatron-LM on the CPU without the launcher: what it is compared with."""

import runpy
import sys
from pathlib import Path

from megatron_acodm.megatron.hosts.cpu import prepare_megatron_lm

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    prepare_megatron_lm()
    if sys.argv[0] != "-":
        runpy.run_path(sys.argv[0], run_name="__main__")
