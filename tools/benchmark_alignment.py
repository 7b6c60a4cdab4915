#!/usr/bin/env python3
"""Times the alignment operators against a plain sum, and the reward path against the published.

Two tables. The operators: one call on a K×P matrix, as a multiple of the time that ``G.sum()``
takes for the same bytes. The reward path: what a training step spends on measuring the alignment,
from its micro-batches' gradients to the products. Every figure is a median over rounds; within a
round all candidates run in turn, and ratios are taken within the round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_acodm import ops
from megatron_acodm.alignment import (
    CapturedEstimator,
    Estimator,
    ExactEstimator,
    GradientEstimator,
    SketchEstimator,
)
from megatron_acodm.config import AlignmentConfig
from megatron_acodm.help_format import HelpFormatter

Candidates = dict[str, Callable[[], float]]


def published_products(matrix: Tensor) -> Tensor:
    """Row sums of the Gram matrix without its diagonal, as the published code forms them."""
    gram = matrix @ matrix.T
    return (gram - torch.diag(torch.diag(gram))).sum(dim=-1)


class Clock:
    """Seconds that calls take, a CUDA device's work included."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def __call__(self, work: Callable[[], Any]) -> float:
        """Run the work and return its seconds."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def operator_candidates(G: Tensor, sketch_size: int, clock: Clock) -> Candidates:
    """One pass over the matrix each; the floor comes first."""
    row, copy = torch.zeros(sketch_size, device=G.device), torch.empty_like(G)

    def sketch_rows() -> None:
        for gradient in G:
            ops.add_sketch_(row, gradient, 0)

    return {
        "G.sum() (floor)": lambda: clock(G.sum),
        "domain_alignment": lambda: clock(lambda: ops.domain_alignment(G)),
        "gram": lambda: clock(lambda: ops.gram(G)),
        "add_sketch_, each row": lambda: clock(sketch_rows),
        "copy": lambda: clock(lambda: copy.copy_(G)),
        "PyTorch reference": lambda: clock(lambda: ops.domain_alignment_reference(G)),
        "G @ G.T": lambda: clock(lambda: G @ G.T),
    }


class RewardPath:
    """A step's micro-batches on one rank, measured in six ways.

    The gradients are made, and accumulated as the host does, outside the timed parts.

    Args:
        num_domains: K.
        numbers: about P, over three weights of four times as many inputs as outputs.
        num_micro_batches: micro-batches of the step; they take domains in turn.
        num_tokens: of a micro-batch, on which alone estimator captured depends.
        sketch_size: numbers a domain of the sketch.
        device: where gradients live.
    """

    def __init__(
        self,
        num_domains: int,
        numbers: int,
        num_micro_batches: int,
        num_tokens: int,
        sketch_size: int,
        device: torch.device,
    ) -> None:
        outputs = max(1, round((numbers / 12) ** 0.5))
        inputs = 4 * outputs
        self.numels = [outputs * inputs] * 3
        self.numbers = sum(self.numels)
        self.domains = [i % num_domains for i in range(num_micro_batches)]
        self.num_domains = num_domains
        self.gradient = [torch.randn(n, device=device) for n in self.numels]
        self.main_grads = [torch.zeros(n, device=device) for n in self.numels]
        self.exact = ExactEstimator(self.numels, num_domains, 0, device)
        self.sketch = SketchEstimator(self.numels, num_domains, 0, device, sketch_size, seed=0)
        self.captured = CapturedEstimator(
            [(outputs, inputs)] * 3, num_domains, 0, device, sketch_size,
            AlignmentConfig.captured_width, seed=0,
        )  # fmt: skip
        self.sides = [torch.randn(num_tokens, 1, size, device=device) for size in (inputs, outputs)]
        self.matrix = torch.zeros(num_domains, self.numbers)
        self.clock = Clock(device)

    def _micro_batches(self) -> Any:
        """Domain of each micro-batch, after the host has accumulated its gradient."""
        for main_grad in self.main_grads:
            main_grad.zero_()
        for domain in self.domains:
            for main_grad, gradient in zip(self.main_grads, self.gradient, strict=True):
                main_grad += gradient
            yield domain

    def published(self) -> float:
        """Clone to the host, difference, accumulate; at the end the product (DANG-ai/AC-ODM)."""
        previous: Tensor | None = None

        def add(domain: int) -> None:
            nonlocal previous
            current = torch.cat([grad.clone().detach().flatten().cpu() for grad in self.main_grads])
            own = current.clone() if previous is None else current - previous
            previous = current.clone()
            self.matrix[domain, :] += own

        seconds = self.clock(self.matrix.zero_)
        for domain in self._micro_batches():
            seconds += self.clock(lambda: add(domain))  # noqa: B023 - runs at once
        return seconds + self.clock(lambda: published_products(self.matrix))

    def by_gradient(self, estimator: GradientEstimator) -> float:
        """An estimator that is given each micro-batch's gradient by a hook."""
        return self._measured(
            estimator, lambda i, domain: estimator.add_gradient(i, domain, self.gradient[i])
        )

    def by_growth(self, estimator: GradientEstimator) -> float:
        """An estimator where only ``main_grad`` is visible."""
        return self._measured(
            estimator, lambda i, domain: estimator.add_growth(i, domain, self.main_grads[i])
        )

    def by_sides(self) -> float:
        """The estimator that is given each layer's inputs and output gradients."""
        estimator, (inputs, output_grad) = self.captured, self.sides

        def add(i: int, domain: int) -> None:
            folded = estimator.fold_input(i, inputs), estimator.fold_output_grad(i, output_grad)
            estimator.add_sides(i, [domain], *folded)

        return self._measured(estimator, add)

    def _measured(self, estimator: Estimator, add: Callable[[int, int], None]) -> float:
        def add_all(domain: int) -> None:
            for index in range(len(self.numels)):
                add(index, domain)

        seconds = self.clock(estimator.begin_step)
        for domain in self._micro_batches():
            seconds += self.clock(lambda: add_all(domain))  # noqa: B023 - runs at once
        return seconds + self.clock(estimator.products)

    def candidates(self) -> Candidates:
        """What is compared; the published way comes first."""
        return {
            "published": self.published,
            "exact, by gradient": lambda: self.by_gradient(self.exact),
            "exact, by growth": lambda: self.by_growth(self.exact),
            "sketch, by gradient": lambda: self.by_gradient(self.sketch),
            "sketch, by growth": lambda: self.by_growth(self.sketch),
            "captured": self.by_sides,
        }


def measure(candidates: Candidates, rounds: int) -> list[dict[str, Any]]:
    """Median, 10% and 90% quantiles of each, and the median ratio to the first of its round."""
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(run())
    first = times[next(iter(candidates))]
    rows = []
    for name, own in times.items():
        deciles = statistics.quantiles(own, n=10, method="inclusive")
        ratios = [a / b for a, b in zip(own, first, strict=True)]
        rows.append(
            {
                "what": name,
                "median_s": statistics.median(own),
                "p10_s": deciles[0],
                "p90_s": deciles[-1],
                "ratio": statistics.median(ratios),
            }
        )
    return rows


def show(title: str, rows: list[dict[str, Any]], num_bytes: int | None) -> None:
    """Print one table; with num_bytes, also the rate at which they were read."""
    print(f"\n{title}")
    rate = "   GB/s" if num_bytes else ""
    print(f"  {'':22} {'median ms':>10} {'p10':>9} {'p90':>9} {'ratio':>7}{rate}")
    for row in rows:
        times = [1e3 * row[key] for key in ("median_s", "p10_s", "p90_s")]
        line = f"  {row['what']:22} {times[0]:10.3f} {times[1]:9.3f} {times[2]:9.3f}"
        line += f" {row['ratio']:7.2f}"
        print(line + (f" {num_bytes / row['median_s'] / 1e9:6.1f}" if num_bytes else ""))


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and versions that the figures belong to."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "cpus": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": psutil.getloadavg()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fused_kernels": ops.has_fused_kernels(device.type),
    }


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device, and on the host for the published way."""
    host = psutil.virtual_memory().available
    return min(host, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--domains", type=int, nargs="+", default=[7, 22, 64], metavar="K", help="how many"
    )
    parser.add_argument(
        "--numbers",
        type=float,
        nargs="+",
        default=[1e6],
        metavar="P",
        help="numbers of a gradient, e.g. 1e6 1e7 5e7 (default: 1e6)",
    )
    parser.add_argument("--micro-batches", type=int, default=18, help="per step and rank")
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch")
    parser.add_argument(
        "--sketch-size",
        type=int,
        default=AlignmentConfig.sketch_size,
        metavar="M",
        help="numbers a domain of the sketch (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the gradients"
    )
    parser.add_argument("--rounds", type=int, default=15, help="that medians are over")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    options = parser.parse_args(arguments)
    for name in ("micro_batches", "rounds", "tokens"):
        if getattr(options, name) < 2:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; at least 2")
    if min(options.numbers) < 3 or not 1 <= min(options.domains) <= max(options.domains) <= 256:
        parser.error("--numbers must be at least 3 each, --domains 1 to 256")
    try:
        AlignmentConfig(sketch_size=options.sketch_size)
    except ValueError as error:
        parser.error(f"--sketch-size: {error}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device")
    return options


def benchmark(K: int, P: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Both tables for one shape."""
    G = torch.randn(K, P, device=device).to(getattr(torch, options.dtype))
    operators = measure(operator_candidates(G, options.sketch_size, Clock(device)), options.rounds)
    copied = next(row["median_s"] for row in operators if row["what"] == "copy")
    for row in operators:  # a copy reads and writes: of its bandwidth, what reading once achieves
        row["copy_share"] = copied / 2 / row["median_s"] if row["what"] != "copy" else 1.0
    show(f"operators, K={K}, P={P:,}, {options.dtype}", operators, G.nbytes)
    del G
    path = RewardPath(K, P, options.micro_batches, options.tokens, options.sketch_size, device)
    rewards = measure(path.candidates(), max(2, options.rounds // 3))
    for row in rewards:
        row["speedup"] = 1 / row["ratio"]
    title = f"reward path of {options.micro_batches} micro-batches of {options.tokens} tokens"
    show(f"{title}, K={K}, P={path.numbers:,}", rewards, None)
    packed = {"exact": path.exact.packed_bytes, "sketch": path.sketch.packed_bytes}
    print("  reduced per step, bytes: " + ", ".join(f"{k} {v:,}" for k, v in packed.items()))
    return {
        "domains": K,
        "numbers": P,
        "sketch_size": options.sketch_size,
        "operators": operators,
        "reward_path": rewards,
        "packed_bytes": packed,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; see ``--help``."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    torch.manual_seed(0)
    report: dict[str, Any] = {"machine": machine(device), "shapes": []}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for P in (int(number) for number in options.numbers):
        for K in options.domains:
            needed = 4 * K * P * 4 + 10 * P * 4
            if needed > free_bytes(device) // 2:
                print(f"\nK={K}, P={P:,}: left out, it takes {needed / 2**30:.1f} GiB of memory")
                continue
            report["shapes"].append(benchmark(K, P, options, device))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
