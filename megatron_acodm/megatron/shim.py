"""Lets Megatron-Core train on a machine without CUDA: its 'cuda' tensors become CPU tensors.

Megatron-Core allocates with ``device='cuda'`` and asks ``torch.cuda`` for devices, streams and
random states. On a CPU machine the shim answers those calls with the CPU's, so that tests, CI
and the quickstart run the same code paths (over gloo) as a GPU job. ``torch.cuda.is_available``
stays False.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    if isinstance(device, bool):
        return False
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like"),
    *("linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like"),
    *("randperm", "tensor", "tril_indices", "triu_indices", "zeros", "zeros_like"),
)
_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the CPU in place of a CUDA ``device`` argument."""

    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        return function(*args, **kwargs)

    return on_cpu


def _tensor_replacements() -> dict[str, Callable[..., Any]]:
    tensor_to, tensor_type = _on_cpu(torch.Tensor.to), torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        return tensor_to(self, *args, **kwargs)

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        del args, kwargs
        return self

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        # Megatron's optimizer and gradient clipping accept CUDA type names only.
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return {
        **{name: _on_cpu(getattr(torch.Tensor, name)) for name in _METHODS},
        "to": to,
        "cuda": cuda,
        "type": type_name,
    }


class _Stream:
    """Stands in for a CUDA stream or event: CPU work is done when the call returns."""

    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _stream_context(stream: Any) -> Iterator[None]:
    del stream
    yield


class _DeviceProperties:
    name = "cpu"
    major, minor = 0, 0
    total_memory = 0
    multi_processor_count = 0


def _constant(value: Any) -> Callable[..., Any]:
    """A new function that takes anything and returns ``value``.

    Each replacement is a function of its own: torch._dynamo keeps its rules by function.
    """

    def constant(*args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return value

    return constant


def _cuda_replacements() -> dict[str, Any]:
    zeros = (
        "device_count",
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
    )
    nothings = ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats")
    return {
        **{name: _constant(0) for name in zeros},
        **{name: _constant(None) for name in nothings},
        "current_device": _constant(_CPU),
        "get_device_capability": _constant((0, 0)),
        "get_device_properties": _constant(_DeviceProperties()),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "Stream": _Stream,
        "Event": _Stream,
        "stream": _stream_context,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
    }


class CpuShim:
    """The installed shim; ``uninstall`` puts every replaced function back."""

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []

    def install(self) -> None:
        """Replace the functions."""
        # Megatron compiles a few helpers with torch.compile; on CPU that costs minutes.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        for name in _FACTORIES:
            self._replace(torch, name, _on_cpu(getattr(torch, name)))
        for name, replacement in _tensor_replacements().items():
            self._replace(torch.Tensor, name, replacement)
        for name, replacement in _cuda_replacements().items():
            self._replace(torch.cuda, name, replacement)
        from megatron.core.tensor_parallel import random as megatron_random

        self._replace(
            megatron_random,
            "_get_cuda_rng_state",
            lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
        )
        self._replace(
            megatron_random,
            "_set_cuda_rng_state",
            lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state),
        )
        logger.info("no CUDA device: Megatron-Core runs on the CPU over gloo")

    def uninstall(self) -> None:
        """Put them back."""
        for restore in reversed(self._restore):
            restore()
        self._restore.clear()

    def _replace(self, owner: Any, name: str, replacement: Any) -> None:
        original = getattr(owner, name)
        setattr(owner, name, replacement)
        self._restore.append(lambda: setattr(owner, name, original))


_installed: CpuShim | None = None


def install_cpu_shim() -> None:
    """Install the shim where there is no CUDA device; does nothing elsewhere or twice."""
    global _installed
    if _installed is None and not torch.cuda.is_available():
        shim = CpuShim()
        shim.install()
        _installed = shim


def uninstall_cpu_shim() -> None:
    """Undo ``install_cpu_shim``; does nothing when it is not installed."""
    global _installed
    if _installed is not None:
        _installed.uninstall()
        _installed = None
