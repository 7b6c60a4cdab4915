"""What Megatron-LM's training package needs beside the shim to run on a machine without CUDA.

For tests and small trials: it trains over gloo, on the same code path as on GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import itertools
import multiprocessing.spawn
import os
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed import distributed_c10d

from megatron_acodm.megatron.shim import install_cpu_shim


def runs_on_cpu(arguments: Sequence[str]) -> bool:
    """Whether a command line is meant for the CPU: no CUDA device, and gloo asked for.

    Both, so that a GPU node whose driver is broken ends with the host's own error.
    """
    words = [word for argument in arguments for word in argument.split("=", 1)]
    backends = [b for flag, b in itertools.pairwise(words) if flag.endswith("-backend")]
    return "gloo" in backends and not torch.cuda.is_available()


def prepare_megatron_lm() -> None:
    """Import ``megatron.training`` without CUDA, and replace what in it asks for CUDA.

    Raises:
        ImportError: when one of its requirements is not installed.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with _without_triton():
        install_cpu_shim()
        from megatron.training import training
    torch.cuda.device_count = lambda: 1  # none: Megatron-LM would set up no parallel groups
    training.initialize_megatron = functools.partial(
        training.initialize_megatron, allow_no_cuda=True
    )
    from megatron.core.datasets import utils

    utils.compile_helpers = functools.partial(_compile_helpers, os.path.dirname(utils.__file__))
    _keep_script_out_of_helpers()
    _send_copies()
    with contextlib.suppress(ImportError):  # not in newer versions
        from megatron.legacy import fused_kernels

        fused_kernels.load = lambda args: None


def _keep_script_out_of_helpers() -> None:
    """Spawn helper processes without the script, which would import triton; none of them needs it.

    Megatron's ``torch_dist`` writer has one for its results.
    """
    original = multiprocessing.spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {k: v for k, v in original(name).items() if not k.startswith("init_main")}

    multiprocessing.spawn.get_preparation_data = get_preparation_data


def _send_copies() -> None:
    """Let gloo send a copy of what the schedule frees before it has gone; CUDA orders the two."""
    original = distributed_c10d.isend

    @functools.wraps(original)
    def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(tensor.clone(), *args, **kwargs)

    torch.distributed.isend = distributed_c10d.isend = isend


def _compile_helpers(folder: str) -> None:
    """Megatron's Makefile for the interpreter that runs, which its own call does not look for."""
    import pybind11

    includes = (pybind11.get_include(), sysconfig.get_paths()["include"])
    subprocess.run(
        [
            *("make", "-C", folder, f"LIBEXT={sysconfig.get_config_var('EXT_SUFFIX')}"),
            "CPPFLAGS=" + " ".join(f"-I{include}" for include in includes),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )


class _Anything:
    """Answers to whatever a module does with triton while it is imported."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_decorator = len(args) == 1 and not kwargs and callable(args[0])
        return args[0] if is_decorator else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class _TritonModule(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 (a package, as importlib has it)
    __version__ = "3.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _TritonFinder:
    """Finds empty modules for ``triton`` and all below it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] == "triton":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _TritonModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


@contextlib.contextmanager
def _without_triton() -> Iterator[None]:
    """Let modules be imported that import triton whether or not they use it."""
    if importlib.util.find_spec("triton") is not None:
        yield
        return
    finder = _TritonFinder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
            del sys.modules[name]
