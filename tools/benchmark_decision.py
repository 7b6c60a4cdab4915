#!/usr/bin/env python3
"""Times a policy's decision: what rank 0 does beside a training step, from measurements to weights.

Each policy is shown made-up steps of its own run, first until the agent's replay fills a batch, so
that every timed decision learns. Rounds take the policies in an order drawn anew, and the floor
beside them: the matrix products alone of what the agent's networks compute in a decision. Times are
of one thread; a decision is a pass over code and networks that have cooled while the others ran.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_acodm.config import AgentConfig, MixingConfig
from megatron_acodm.help_format import HelpFormatter
from megatron_acodm.metrics import describe_hardware, installed_versions
from megatron_acodm.mixing import MixingController, Observation, build_policy
from megatron_acodm.mixing.transfer import save_policy

BUDGET_S = 2e-3  # of a decision of the default agent, on one core
TRAIN_ITERS = 41_667  # the paper's
PAPER_NETWORKS = {"hidden_size": 1024, "num_layers": 5}
FLOOR = "acodm's matrix products alone"


def observations(K: int, D: int, seed: int) -> Iterator[Observation]:
    """Made-up steps in which every domain is drawn."""
    rng = np.random.default_rng(seed)
    drawn = np.full(K, 4, dtype=np.int64)
    weights = np.full(K, 1.0 / K)
    for i in range(1, TRAIN_ITERS + 1):
        loss = 2.0 + rng.random(K)
        products = (rng.random(K), 1.0 + rng.random(K), rng.standard_normal((K, K)))
        yield Observation(
            i, i / TRAIN_ITERS, weights, drawn, drawn > 0, loss, *products, *rng.random((2, D))
        )


def candidates(K: int, D: int) -> dict[str, Callable[[], Any]]:
    """A decision of each policy, and the floor, by name."""

    def controller(**mixing: Any) -> MixingController:
        config = MixingConfig(initial_weights="uniform", **mixing)
        names = [f"domain {k}" for k in range(K)]
        policy = build_policy(config, names, np.ones(K), D, TRAIN_ITERS, seed=1)
        return MixingController(policy, config)

    with tempfile.TemporaryDirectory() as folder:
        agent = controller()
        save_policy(Path(folder) / "policy", agent.policy.exported({}))
        controllers = {
            "acodm": agent,
            "acodm, 5 x 1024 (the paper's)": controller(agent=AgentConfig(**PAPER_NETWORKS)),
            "frozen": controller(policy="frozen", policy_file=str(Path(folder) / "policy")),
            **{name: controller(policy=name) for name in ("odm", "ado", "pike")},
        }
    decisions: dict[str, Callable[[], Any]] = {}
    for name, one in controllers.items():
        steps = observations(K, D, seed=len(decisions))
        for _ in range(AgentConfig().replay_batch_size + 2):
            one.decide(next(steps))
        decisions[name] = functools.partial(decide, one, steps)
    return decisions | {FLOOR: matrix_products(agent.policy)}


def decide(controller: MixingController, steps: Iterator[Observation]) -> None:
    """One decision; none may fail, or its time would be that of the guard rails."""
    controller.decide(next(steps))
    if controller.policy_failures or controller.dropped_steps:
        raise RuntimeError("the policy failed on a made-up step")


def matrix_products(policy: Any) -> Callable[[], None]:
    """The products of a decision, layer by layer.

    The actor's: forward for the target, for its loss, and of one row to act; backward to weights
    and, but for the first layer, to inputs. The critic's: forward for the target, for its own loss
    and for the actor's; backward to weights for its own, and to inputs for both, but for its own
    not to those of the first layer.
    """
    products: list[tuple[Tensor, Tensor]] = []
    batch = policy.config.replay_batch_size
    for learner, is_actor in ((policy.agent.actor, True), (policy.agent.critic, False)):
        weights = [weight for weight in learner.network.parameters() if weight.ndim == 2]
        for layer, weight in enumerate(weights):
            inputs, errors = (torch.zeros(batch, size) for size in reversed(weight.shape))
            forward = [inputs, inputs, inputs[:1] if is_actor else inputs]
            products += [(rows, weight.t()) for rows in forward]
            products += [(errors.t(), inputs)]
            products += [(errors, weight)] * ((layer > 0) + (not is_actor))

    def multiply() -> None:
        for left, right in products:
            torch.mm(left, right)

    return multiply


def measure(K: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of each candidate for ``K`` domains; ratios are within a round."""
    decisions = candidates(K, args.probes)
    times: dict[str, list[float]] = {name: [] for name in decisions}
    order = random.Random(0)
    for _ in range(args.rounds):
        for name in order.sample(list(decisions), len(decisions)):
            start = time.perf_counter()
            for _ in range(args.decisions):
                decisions[name]()
            times[name].append((time.perf_counter() - start) / args.decisions)
    floor = np.array(times[FLOOR])
    return [
        {
            "domains": K,
            "candidate": name,
            "median_s": float(np.median(seconds)),
            "quartiles_s": np.percentile(seconds, [25, 75]).tolist(),
            "over_floor": float(np.median(np.array(seconds) / floor)),
        }
        for name, seconds in times.items()
    ]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'K':>4}  {'':32} {'median':>9} {'quartiles':>19} {'over floor':>11}")
    for row in rows:
        low, high = (1e3 * value for value in row["quartiles_s"])
        line = f"{row['domains']:4}  {row['candidate']:32} {1e3 * row['median_s']:6.2f} ms"
        line += f" {low:8.2f} to {high:5.2f} ms {row['over_floor']:10.1f}x"
        if row["candidate"] == "acodm":
            verdict = "met" if row["median_s"] <= BUDGET_S else "missed"
            line += f"  budget {1e3 * BUDGET_S:g} ms: {verdict}"
        print(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--domains", type=int, nargs="+", default=[7, 22, 64], metavar="K", help="how many"
    )
    parser.add_argument("--probes", type=int, default=4, metavar="D", help="probed layers")
    parser.add_argument("--rounds", type=int, default=15, help="that medians are over")
    parser.add_argument("--decisions", type=int, default=20, help="of each policy and round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(arguments)
    for name in ("probes", "rounds", "decisions"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if min(args.domains) < 2:
        parser.error(f"--domains has {min(args.domains)}; a mixture is of at least 2")
    torch.set_num_threads(1)
    rows = [row for K in args.domains for row in measure(K, args)]
    report = {
        "hardware": describe_hardware(),
        "versions": installed_versions(),
        "load_average": os.getloadavg()[0],
        "rows": rows,
    }
    print(", ".join(f"{key} {value}" for key, value in [*report.items()][:-1]))
    show(rows)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
