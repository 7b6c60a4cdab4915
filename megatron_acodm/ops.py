"""The fused operators of the alignment room, each beside its PyTorch reference.

The kernels are in ``csrc``: module ``_C`` holds those for the CPU, ``_C_cuda`` those for CUDA.
Where one is missing, the operator runs its reference on that device and says so once.
"""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_DOMAINS = 256
"""Most rows that ``domain_alignment`` and ``gram`` take."""

SKETCH_STEP = 64
"""A sketch has a multiple of so many numbers."""

MAX_SKETCH_SIZE = 1 << 30
"""Most numbers of a sketch."""

DTYPES = (torch.float32, torch.bfloat16)
"""Of the gradients that the operators take."""

_SCHEMAS = {
    "domain_alignment": "(Tensor G) -> (Tensor W, Tensor sq_norm)",
    "gram": "(Tensor G) -> Tensor",
    "add_sketch_": "(Tensor(a!) row, Tensor grad, int key) -> ()",
    "accumulate_domain_grad_": "(Tensor(a!) row, Tensor main_grad, Tensor(b!) seen) -> ()",
}
# Numbers that the reference converts to float64 at a time, which bounds its memory: what fits a
# processor's cache, or keeps a GPU busy.
_REFERENCE_NUMBERS_CPU = 1 << 15
_REFERENCE_NUMBERS_GPU = 1 << 22


def domain_alignment(G: Tensor) -> tuple[Tensor, Tensor]:
    """How each domain's gradient aligns with the sum of the others, in one pass over G.

    Args:
        G: [K, P] float32 or bfloat16, K from 1 to 256: the gradient of each domain. Any strides;
            a copy is made unless the elements of a row lie side by side.

    Returns:
        W: [K] float64, ``W[i] = <G[i], sum of G[j] over j != i>``.
        sq_norm: [K] float64, ``||G[i]||^2``.

    Columns are summed in float32 and their products in float32 lanes that join float64 sums
    every few thousand columns. The result repeats bit for bit for a shape on a machine, at any
    number of threads. A NaN or Inf in one row makes every W non-finite, and sq_norm of that row.

    Raises:
        ValueError: G is not a matrix, has too many rows, or is of another dtype.
    """
    return torch.ops.megatron_acodm.domain_alignment(G)


def gram(G: Tensor) -> Tensor:
    """Product of each domain's gradient with every other, in one pass over G.

    Args:
        G: [K, P] as ``domain_alignment`` takes it.

    Returns:
        [K, K] float64, symmetric: ``<G[i], G[j]>``, summed as ``domain_alignment`` sums. On CUDA,
        G is read once for every 64 domains.

    Raises:
        ValueError: as ``domain_alignment`` does.
    """
    return torch.ops.megatron_acodm.gram(G)


def add_sketch_(row: Tensor, grad: Tensor, key: int) -> None:
    """Add a random projection of a gradient to a few numbers: one read of it, in place.

    The flat gradient is cut into blocks of ``m = len(row)`` numbers. Each block is rotated by a
    random shift and multiplied by random signs, then added to the row. The map is linear and
    depends on the key, m and the numbers' positions only. Products survive it: for gradients g and
    h under one key the product of their sketches is ``<g, h>`` on average over keys, with a
    variance of at most ``(||g||^2 ||h||^2 + <g, h>^2) / m``.

    Args:
        row: [m] float32, contiguous, updated. m is a multiple of 64.
        grad: float32 or bfloat16, of any shape; a copy is made unless it is contiguous.
        key: which map, any 64-bit integer. Sums of sketches under different keys, one for each
            parameter, sketch the parameters' concatenation.

    Sums are taken block by block in float32; the result repeats bit for bit at any number of
    threads on a CPU, and on a CUDA device. A NaN or Inf stays in its bucket.

    Raises:
        ValueError: a size, dtype or device does not fit, or the tensors share memory.
    """
    torch.ops.megatron_acodm.add_sketch_(row, grad, key)


def accumulate_domain_grad_(row: Tensor, main_grad: Tensor, seen: Tensor) -> None:
    """Add what ``main_grad`` has grown by since it was last seen: one pass, in place.

    ``row += main_grad - seen; seen = main_grad``, the difference taken in float32.

    Args:
        row: float32, updated. All three are contiguous and hold equally many numbers.
        main_grad: float32 or bfloat16, the accumulated gradient of a parameter.
        seen: like ``main_grad``, updated: its value at the last call.

    Raises:
        ValueError: sizes, dtypes or devices differ, or the tensors share memory.
    """
    torch.ops.megatron_acodm.accumulate_domain_grad_(row, main_grad, seen)


def has_fused_kernels(device_type: str) -> bool:
    """Whether the compiled kernels serve tensors on ``"cpu"`` or ``"cuda"``."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"megatron_acodm::{name}", key)
        for name in _SCHEMAS
    )


def domain_alignment_reference(G: Tensor) -> tuple[Tensor, Tensor]:
    """``domain_alignment`` in plain PyTorch, in float64 throughout."""
    _check_alignment_input(G)
    W = G.new_zeros(G.shape[0], dtype=torch.float64)
    sq_norm = torch.zeros_like(W)
    numbers = _REFERENCE_NUMBERS_CPU if G.device.type == "cpu" else _REFERENCE_NUMBERS_GPU
    for block in G.split(numbers // G.shape[0], dim=1):
        block = block.double()
        W += (block * (block.sum(0) - block)).sum(1)
        sq_norm += (block * block).sum(1)
    return W, sq_norm


def gram_reference(G: Tensor) -> Tensor:
    """``gram`` in plain PyTorch, in float64 throughout."""
    _check_alignment_input(G)
    H = G.new_zeros(G.shape[0], G.shape[0], dtype=torch.float64)
    numbers = _REFERENCE_NUMBERS_CPU if G.device.type == "cpu" else _REFERENCE_NUMBERS_GPU
    for block in G.split(numbers // G.shape[0], dim=1):
        block = block.double()
        H += block @ block.T
    return H.triu() + H.triu(1).T  # a matrix product may round the two halves differently


def add_sketch_reference_(row: Tensor, grad: Tensor, key: int) -> None:
    """``add_sketch_`` in plain PyTorch."""
    _check_sketch_inputs(row, grad)
    _check_sketch_separate(row, grad)
    m, flat = row.numel(), grad.reshape(-1)
    bucket = torch.arange(m, device=row.device)
    bits, words = bucket[:SKETCH_STEP], bucket[: m // SKETCH_STEP]
    state = _mixed(torch.full_like(bits[0], key))
    for index in range(-(-len(flat) // m)):
        block = flat[index * m : (index + 1) * m].float()
        block_state = _random_word(state, torch.full_like(state, index))
        shift = (_shifted(block_state, 32) * m) >> 32
        signs = 1 - 2 * (_random_word(block_state, words)[:, None] >> bits & 1).flatten()
        target = (bucket[: len(block)] + shift) % m
        row[target] += block * signs[target]  # no target comes twice


# 0x9e3779b97f4a7c15 and the factors of SplitMix64 as signed integers; csrc/hash.h is the same.
_GOLDEN = -0x61C8864680B583EB
_FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


def _shifted(x: Tensor, places: int) -> Tensor:
    """Shift right the unsigned number whose bits x has."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _random_word(state: Tensor, index: Tensor) -> Tensor:
    return _mixed(state + (index + 1) * _GOLDEN)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FACTORS[0]
    x = (x ^ _shifted(x, 27)) * _FACTORS[1]
    return x ^ _shifted(x, 31)


def accumulate_domain_grad_reference_(row: Tensor, main_grad: Tensor, seen: Tensor) -> None:
    """``accumulate_domain_grad_`` in plain PyTorch."""
    _check_growth_inputs(row, main_grad, seen)
    _check_separate(row, main_grad, seen)
    row.view(-1).add_(main_grad.view(-1).float() - seen.view(-1).float())
    seen.view(-1).copy_(main_grad.view(-1))


def _check_alignment_input(G: Tensor) -> None:
    if G.dim() != 2:
        raise ValueError(f"G has shape {list(G.shape)}; it must be [domains, numbers]")
    if not 1 <= G.shape[0] <= MAX_DOMAINS:
        raise ValueError(f"G has {G.shape[0]} rows; 1 to {MAX_DOMAINS} domains are supported")
    if G.dtype not in DTYPES:
        raise ValueError(f"G is of {G.dtype}; it must be float32 or bfloat16")


def _check_growth_inputs(row: Tensor, main_grad: Tensor, seen: Tensor) -> None:
    if row.dtype != torch.float32:
        raise ValueError(f"row is of {row.dtype}; it must be float32")
    if main_grad.dtype not in DTYPES:
        raise ValueError(f"main_grad is of {main_grad.dtype}; it must be float32 or bfloat16")
    if seen.dtype != main_grad.dtype:
        raise ValueError(
            f"seen is of {seen.dtype} and main_grad of {main_grad.dtype}; they must be alike"
        )
    if not row.numel() == main_grad.numel() == seen.numel():
        raise ValueError(
            f"row, main_grad and seen hold {row.numel()}, {main_grad.numel()} and {seen.numel()} "
            "numbers; they must hold equally many"
        )
    if not row.device == main_grad.device == seen.device:
        raise ValueError(
            f"row, main_grad and seen lie on {row.device}, {main_grad.device} and {seen.device}; "
            "they must lie on one device"
        )
    if not all(tensor.is_contiguous() for tensor in (row, main_grad, seen)):
        raise ValueError("row, main_grad and seen must be contiguous; pass views of flat buffers")


def _check_sketch_inputs(row: Tensor, grad: Tensor, key: int = 0) -> None:
    if row.dtype != torch.float32:
        raise ValueError(f"row is of {row.dtype}; it must be float32")
    if grad.dtype not in DTYPES:
        raise ValueError(f"grad is of {grad.dtype}; it must be float32 or bfloat16")
    size = row.numel()
    if row.dim() != 1 or size % SKETCH_STEP or not 0 < size <= MAX_SKETCH_SIZE:
        raise ValueError(
            f"row has shape {list(row.shape)}; it must be flat, a multiple of {SKETCH_STEP} "
            f"numbers, {MAX_SKETCH_SIZE} at most"
        )
    if not row.is_contiguous():
        raise ValueError("row must be contiguous")
    if row.device != grad.device:
        raise ValueError(
            f"row and grad lie on {row.device} and {grad.device}; they must lie on one device"
        )


def _check_sketch_separate(row: Tensor, grad: Tensor) -> None:
    first, last = row.data_ptr(), row.data_ptr() + row.nbytes
    if grad.is_contiguous() and first < grad.data_ptr() + grad.nbytes and grad.data_ptr() < last:
        raise ValueError("row and grad share memory; give the sketch a row of its own")


def _check_separate(*tensors: Tensor) -> None:
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
        raise ValueError(
            "row, main_grad and seen share memory; seen must be a copy of main_grad, not a view"
        )


def _domain_alignment_fake(G: Tensor) -> tuple[Tensor, Tensor]:
    _check_alignment_input(G)
    W = G.new_empty(G.shape[0], dtype=torch.float64)
    return W, torch.empty_like(W)


def _gram_fake(G: Tensor) -> Tensor:
    _check_alignment_input(G)
    return G.new_empty(G.shape[0], G.shape[0], dtype=torch.float64)


# By kind of device: why its kernels could not be loaded, and whether that has been said.
_missing: dict[str, str] = {}
_reported: set[str] = set()


def _announced(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as an operator's kernel, which says once per kind of device that it runs."""

    def kernel(tensor: Tensor, *others: Any) -> Any:
        device = tensor.device.type
        if device not in _reported:
            _reported.add(device)
            logger.warning(
                "no fused alignment kernels for %s: the slower PyTorch reference runs. %s",
                device,
                _missing.get(device, ""),
            )
        return reference(tensor, *others)

    return kernel


def _load(module: str, device: str) -> bool:
    """Import a compiled module; if that fails, keep why for the message."""
    try:
        importlib.import_module(f"megatron_acodm.{module}")
    except ImportError as error:
        _missing[device] = (
            f"megatron_acodm.{module} cannot be loaded ({error}); the output of "
            "`pip install --no-build-isolation -v` says what the build left out and why."
        )
        return False
    return True


def _register() -> torch.library.Library:
    """Load the kernels, and let the references serve wherever there is none."""
    library = torch.library.Library("megatron_acodm", "FRAGMENT")
    if _load("_C", "cpu"):
        _load("_C_cuda", "cuda")
    else:
        for name, schema in _SCHEMAS.items():
            library.define(name + schema)
    references: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "domain_alignment": (domain_alignment_reference, _domain_alignment_fake),
        "gram": (gram_reference, _gram_fake),
        "add_sketch_": (add_sketch_reference_, _check_sketch_inputs),
        "accumulate_domain_grad_": (accumulate_domain_grad_reference_, _check_growth_inputs),
    }
    for name, (reference, fake) in references.items():
        library.impl(name, _announced(reference), "CompositeExplicitAutograd")
        torch.library.register_fake(f"megatron_acodm::{name}", fake, lib=library)
    return library


# Kept: the registrations live as long as the library object does.
_library = _register()
