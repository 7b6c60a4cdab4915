#!/usr/bin/env python3
"""Times the ledger against Megatron's blending index, for runs of growing length.

Megatron decides every sample of a run before it starts: 10 bytes and a share of a pass each. The
ledger decides a step at a time: its start does not depend on the length of the run, and a sample
is located when it is drawn. Every figure is a median over rounds; both are timed in every round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_acodm.blending import Ledger
from megatron_acodm.help_format import HelpFormatter

_LOCATED = 10_000_000  # samples of the run that are located for the rate
_CHUNK = 1_000_000


def _weights(num_domains: int) -> np.ndarray:
    weights = 1.0 / np.arange(1, num_domains + 1)
    return weights / weights.sum()


def _time_megatron(samples: int, weights: np.ndarray) -> dict[str, float]:
    """Seconds and bytes of Megatron's index for the whole run."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    from megatron.core.datasets import helpers

    start = time.perf_counter()
    domain = np.zeros(samples, dtype=np.int16)
    position = np.zeros(samples, dtype=np.int64)
    helpers.build_blending_indices(domain, position, weights.tolist(), len(weights), samples, False)
    seconds = time.perf_counter() - start
    return {"megatron_start_s": seconds, "megatron_bytes": float(domain.nbytes + position.nbytes)}


def _time_ledger(samples: int, weights: np.ndarray, stage: int, granule: int) -> dict[str, float]:
    """Start-up, an append, the rate of locating, and the bytes that the whole run will hold."""
    start = time.perf_counter()
    ledger = Ledger([1_000_003] * len(weights), granule, seed=1)
    for _ in range(2):
        ledger.append(weights, stage)
    ledger.epoch_and_index(*ledger.locate(np.arange(stage)))
    started = time.perf_counter() - start

    stages = max(2, min(samples, _LOCATED) // stage)
    start = time.perf_counter()
    for _ in range(stages - 2):
        ledger.append(weights, stage)
    appended = (time.perf_counter() - start) / max(stages - 2, 1)

    located = 0.0
    for first in range(0, ledger.num_samples, _CHUNK):
        indices = np.arange(first, min(first + _CHUNK, ledger.num_samples))
        start = time.perf_counter()
        ledger.epoch_and_index(*ledger.locate(indices))
        located += time.perf_counter() - start
    row_bytes = ledger.state_dict()["rows"].nbytes / (ledger.num_stages + 1)
    return {
        "ledger_start_s": started,
        "append_s": appended,
        "located_per_s": ledger.num_samples / located,
        "ledger_bytes": row_bytes * (samples / stage + 1),
    }


def measure(samples: int, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds for a run of ``samples``."""
    weights = _weights(args.domains)
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        figures = _time_ledger(samples, weights, args.stage, args.granule)
        if samples <= args.megatron_up_to:
            figures |= _time_megatron(samples, weights)
        rounds.append(figures)
    return {"samples": samples} | {
        name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]
    }


def _print(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'samples':>13} | {'Megatron: start':>15} {'memory':>9} | {'ledger: start':>13} "
        f"{'memory':>9} {'append':>9} {'located':>11}"
    )
    for row in rows:
        megatron = f"{'-':>15} {'-':>9}"
        if "megatron_start_s" in row:
            megatron = f"{row['megatron_start_s']:13.2f} s {row['megatron_bytes'] / 1e6:6,.0f} MB"
        print(
            f"{row['samples']:13,} | {megatron} | {row['ledger_start_s'] * 1e3:10.2f} ms "
            f"{row['ledger_bytes'] / 1e6:6,.1f} MB {row['append_s'] * 1e6:6.0f} us "
            f"{row['located_per_s'] / 1e6:7.1f} M/s"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--samples", type=float, nargs="+", default=[1e6, 1e7, 1e8, 1e9], help="lengths of runs"
    )
    parser.add_argument("--domains", type=int, default=22, help="how many")
    parser.add_argument("--stage", type=int, default=1152, help="samples a step")
    parser.add_argument("--granule", type=int, default=8, help="samples a micro-batch")
    parser.add_argument("--rounds", type=int, default=3, help="that medians are over")
    parser.add_argument(
        "--megatron-up-to", type=float, default=1e8, help="longest run that Megatron is given"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args(arguments)
    rows = [measure(int(samples), args) for samples in args.samples]
    print(f"{platform.processor() or platform.machine()}, numpy {np.__version__}, one thread")
    print(f"{args.domains} domains, {args.stage} samples a stage, granules of {args.granule}")
    _print(rows)
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args), "rows": rows}, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
