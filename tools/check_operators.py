#!/usr/bin/env python3
"""Checks the alignment operators on a device against definitions in float64, without a test runner.

Every check goes through all its cases and names the first that is off. The test suite does the
same and more on the CPU; this is for machines with a GPU, where only torch is at hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_acodm import ops
from megatron_acodm.help_format import HelpFormatter

Check = Callable[[torch.device], Iterator[str]]

DTYPES = (torch.float32, torch.bfloat16)
ROWS = (1, 2, 3, 7, 8, 9, 16, 17, 22, 31, 33, 64, 65, 127, 128, 255, 256)
COLUMNS = (0, 1, 3, 31, 32, 33, 64, 65, 127, 1000, 1025, 9001)


def require(condition: bool | Tensor, what: str) -> None:
    """Raise AssertionError that says what is off; unlike ``assert`` under -O as well."""
    if not bool(condition):
        raise AssertionError(what)


def require_alignment(G: Tensor, case: str) -> None:
    """Alignment and Gram matrix agree with the products in float64, as float32 sums may."""
    exact = G.double() @ G.double().T
    norms = exact.diagonal().sqrt()
    W, sq_norm = ops.domain_alignment(G)
    expected = exact.sum(1) - exact.diagonal()
    require(W.dtype == sq_norm.dtype == torch.float64, f"dtypes, {case}")
    tolerance = 2e-6 * norms * norms.sum() + 1e-30
    require(torch.all((W - expected).abs() <= tolerance), f"W, {case}")
    require(torch.all((sq_norm - norms**2).abs() <= 2e-6 * norms**2), f"squared norms, {case}")
    H = ops.gram(G)
    require(torch.all((H - exact).abs() <= 2e-6 * norms[:, None] * norms), f"Gram matrix, {case}")
    require(torch.equal(H, H.T), f"symmetry of the Gram matrix, {case}")


def sketched(g: Tensor, m: int, key: int) -> Tensor:
    """The sketch of g alone."""
    row = torch.zeros(m, device=g.device)
    ops.add_sketch_(row, g, key)
    return row


def integers(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Small whole numbers: float32 and bfloat16 hold them, float32 adds them in any order alike."""
    return torch.randint(-9, 10, shape, device=device).to(dtype)


def fused_kernels_are_built(device: torch.device) -> Iterator[str]:
    """Otherwise the references would be checked against themselves."""
    yield device.type
    require(ops.has_fused_kernels(device.type), f"no fused kernels for {device.type}")


def alignment_and_gram_for_every_number_of_domains(device: torch.device) -> Iterator[str]:
    """K from 1 to 256, P from none to odd sizes, both dtypes."""
    for dtype in DTYPES:
        for K in ROWS:
            for P in COLUMNS:
                yield (case := f"K={K}, P={P}, {dtype}")
                require_alignment(torch.randn(K, P, device=device).to(dtype), case)


def alignment_and_gram_of_any_view(device: torch.device) -> Iterator[str]:
    """Misaligned, strided, transposed and expanded matrices."""
    for dtype in DTYPES:
        for offset in range(6):
            for gap in (0, 1, 3, 8):
                for P in (1, 33, 1000):
                    flat = torch.randn(offset + 7 * (P + gap), device=device).to(dtype)
                    yield (case := f"offset {offset}, gap {gap}, P={P}, {dtype}")
                    require_alignment(flat[offset:].view(7, P + gap)[:, :P], case)
        base = torch.randn(44, 2003, device=device).to(dtype)
        views = {"transposed": base.T[:200], "every second": base[::2, ::2], "tail": base[3:, 5:]}
        views["expanded"] = base[:1].expand(5, 2003)
        views["of one column"] = base[:, :1].expand(44, 300)
        for name, view in views.items():
            yield (case := f"{name}, {dtype}")
            require_alignment(view, case)


def alignment_and_gram_of_large_matrices(device: torch.device) -> Iterator[str]:
    """Many tiles a block; on a GPU with the memory also more elements than 32 bits count."""
    numbers = 3_000_001 if device.type == "cuda" else 100_001
    for dtype in DTYPES:
        for K in (3, 22, 64):
            yield (case := f"K={K}, P={numbers}, {dtype}")
            require_alignment(torch.randn(K, numbers, device=device).to(dtype), case)
    if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] < 16 << 30:
        return
    yield (case := "K=256, P=8,500,000, bfloat16")
    G = torch.empty(256, 8_500_000, device=device, dtype=torch.bfloat16).normal_()
    for result, reference in (
        (torch.stack(ops.domain_alignment(G)), torch.stack(ops.domain_alignment_reference(G))),
        (ops.gram(G), ops.gram_reference(G)),
    ):
        require((result - reference).abs().max() <= 1e-4 * G.shape[1], case)


def numbers_that_are_not_finite_show(device: torch.device) -> Iterator[str]:
    """A NaN or Inf spoils every W, its own row's norm and Gram entries, and one bucket."""
    for dtype in DTYPES:
        for bad in (float("nan"), float("inf"), -float("inf")):
            for column in (0, 517, 1029):
                yield (case := f"{bad} in column {column}, {dtype}")
                G = torch.randn(12, 1030, device=device).to(dtype)
                G[4, column] = bad
                W, sq_norm = ops.domain_alignment(G)
                require(not torch.isfinite(W).any(), f"W, {case}")
                spoilt = torch.arange(12, device=device) == 4
                require(torch.equal(~torch.isfinite(sq_norm), spoilt), f"squared norms, {case}")
                expected = spoilt | spoilt[:, None]
                require(torch.equal(~torch.isfinite(ops.gram(G)), expected), f"Gram, {case}")
                buckets = ~torch.isfinite(sketched(G[4], 128, 2))
                require(buckets.sum() == 1, f"sketch, {case}")


def sketches_are_the_reference_map(device: torch.device) -> Iterator[str]:
    """Same buckets and signs as the reference on the CPU; whole numbers leave no rounding."""
    sizes = [0, 1, 63, 64, 65, 1000, 9001, 200_003]
    for dtype in DTYPES:
        for m in (64, 192, 4096, 16_384):
            for n in sizes:
                for key in (0, -1, 2**63 - 1):
                    yield (case := f"m={m}, n={n}, key={key}, {dtype}")
                    g = integers(n, device=device, dtype=dtype)
                    row = integers(m, device=device, dtype=torch.float32)
                    expected = row.to("cpu", copy=True)
                    ops.add_sketch_reference_(expected, g.cpu(), key)
                    ops.add_sketch_(row, g, key)
                    require(torch.equal(row.cpu(), expected), case)


def sketches_of_any_view_and_of_many_blocks(device: torch.device) -> Iterator[str]:
    """Views, surroundings left alone, and products kept within their promised error."""
    for dtype in DTYPES:
        flat = integers(1005, device=device, dtype=dtype)
        views = {"offset": flat[3:1001], "every second": flat[::2]}
        views |= {"transposed": flat[:1000].view(20, 50).T, "expanded": flat[:1].expand(700)}
        for name, g in views.items():
            yield (case := f"{name}, {dtype}")
            rows = torch.zeros(200, device=device)
            ops.add_sketch_(rows[5:133], g, 1)
            expected = sketched(g.reshape(-1).clone(), 128, 1)
            require(torch.equal(rows[5:133], expected), case)
            require(not rows[:5].any() and not rows[133:].any(), f"surroundings, {case}")
    yield (case := "4 M numbers in 16,384 buckets")
    g = torch.randn(4_000_003, device=device)
    norm = g.double().square().sum()
    error = (sketched(g, 16_384, 5).double().square().sum() - norm).abs()
    require(error < 6 * norm * (2 / 16_384) ** 0.5, case)


def growth_is_added_and_remembered(device: torch.device) -> Iterator[str]:
    """Bit for bit what the formula gives, on aligned and misaligned views, and nothing beside."""
    for dtype in DTYPES:
        for n in (0, 1, 3, 15, 16, 17, 1000, 70_001, 2_000_003):
            for offsets in ((0, 0, 0), (1, 2, 3), (4, 4, 4), (0, 8, 1)):
                yield (case := f"n={n}, offsets {offsets}, {dtype}")
                row, grad, seen = (torch.randn(n + 12, device=device) for _ in range(3))
                grad, seen = grad.to(dtype), seen.to(dtype)
                i, j, k = (slice(offset, offset + n) for offset in offsets)
                expected_row, expected_seen = row.clone(), seen.clone()
                expected_row[i] += grad[j].float() - seen[k].float()
                expected_seen[k] = grad[j]
                ops.accumulate_domain_grad_(row[i], grad[j], seen[k])
                require(torch.equal(row, expected_row), f"row, {case}")
                require(torch.equal(seen, expected_seen), f"seen, {case}")


def results_repeat_bit_for_bit(device: torch.device) -> Iterator[str]:
    """Five calls on the same numbers."""
    for dtype in DTYPES:
        for K, P in ((22, 300_001), (64, 100_000), (256, 20_011)):
            yield (case := f"K={K}, P={P}, {dtype}")
            G = torch.randn(K, P, device=device).to(dtype)
            calls = [
                [*ops.domain_alignment(G), ops.gram(G), sketched(G, 8192, 3)] for _ in range(5)
            ]
            for other in calls[1:]:
                require(all(map(torch.equal, calls[0], other)), case)


def work_joins_the_current_stream(device: torch.device) -> Iterator[str]:
    """On another stream an operator sees what was queued before it there; CUDA only."""
    if device.type != "cuda":
        return
    for dtype in DTYPES:
        yield (case := f"{dtype}")
        new = torch.randn(22, 100_003, device=device).to(dtype)
        G, row, seen = torch.zeros_like(new), torch.zeros(64, device=device), torch.zeros_like(new)
        total, stream = torch.zeros(new.shape, device=device), torch.cuda.Stream(device)
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # cycles, some 0.1 s
            G.copy_(new)
            results = [*ops.domain_alignment(G), ops.gram(G)]
            ops.add_sketch_(row, G, 1)
            ops.accumulate_domain_grad_(total, G, seen)
        stream.synchronize()
        expected = [*ops.domain_alignment(new), ops.gram(new), sketched(new, 64, 1), new.float()]
        require(all(map(torch.equal, [*results, row, total], expected)), case)


def wrong_input_is_refused(device: torch.device) -> Iterator[str]:
    """With a ValueError, before anything is written."""
    zeros = torch.zeros(128, device=device)
    refused: dict[str, Callable[[], Any]] = {
        "a vector": lambda: ops.domain_alignment(zeros),
        "257 domains": lambda: ops.gram(torch.zeros(257, 4, device=device)),
        "float16": lambda: ops.domain_alignment(zeros.half().view(2, 64)),
        "a sketch of 100": lambda: ops.add_sketch_(zeros[:100], torch.ones(9, device=device), 0),
        "shared memory": lambda: ops.accumulate_domain_grad_(zeros[:64], zeros[32:96], zeros[64:]),
        "two sizes": lambda: ops.accumulate_domain_grad_(zeros, zeros[:3], torch.zeros_like(zeros)),
        "two devices": lambda: ops.add_sketch_(zeros, torch.ones(9, device="meta"), 0),
    }
    for case, call in refused.items():
        yield case
        try:
            call()
        except ValueError:
            continue
        raise AssertionError(f"{case} was taken")


CHECKS: tuple[Check, ...] = (
    fused_kernels_are_built,
    alignment_and_gram_for_every_number_of_domains,
    alignment_and_gram_of_any_view,
    alignment_and_gram_of_large_matrices,
    numbers_that_are_not_finite_show,
    sketches_are_the_reference_map,
    sketches_of_any_view_and_of_many_blocks,
    growth_is_added_and_remembered,
    results_repeat_bit_for_bit,
    work_joins_the_current_stream,
    wrong_input_is_refused,
)


def run(check: Check, device: torch.device) -> dict[str, Any]:
    """Go through a check's cases; what failed, if something did."""
    torch.manual_seed(0)
    start, cases, failure = time.perf_counter(), 0, None
    try:
        for _ in check(device):
            cases += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a kernel's fault belongs to its own check
    except Exception as error:  # whatever it is, the other checks run
        failure = f"{type(error).__name__}: {error}"
        if not isinstance(error, AssertionError):
            traceback.print_exc()
    seconds = time.perf_counter() - start
    return {"check": check.__name__, "cases": cases, "seconds": seconds, "failure": failure}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all checks; 0 if all hold."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=HelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: this torch finds no CUDA device; try cpu")
    results = []
    for check in CHECKS:
        results.append(run(check, torch.device(options.device)))
        result = results[-1]
        state = "ok" if result["failure"] is None else f"FAILED {result['failure']}"
        name = result["check"].replace("_", " ")
        print(
            f"{name:50} {result['cases']:5} cases {result['seconds']:6.1f} s  {state}", flush=True
        )
    if options.json:
        report = {"device": options.device, "checks": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(result["failure"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
