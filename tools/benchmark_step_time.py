#!/usr/bin/env python3
"""Times a Megatron-Core training step under each way of mixing against Megatron's static blend.

One model, built as the trainer builds it, is trained by all candidates in turns, in an order drawn
anew for every round; ratios are taken within a round. A candidate is hooked into Megatron only for
its own turn; its agent and ledger go on from its last one. A turn is two steps without a pause, of
which the second is timed: what follows from the first one happens beside it, as in a run. Data is
made up and lies on the device before the clock starts, as loading workers see to in a run.

Further flags are the trainer's and override the shape's: --num-layers, --seq-length,
--micro-batch-size, --vocab-size, --no-bf16, --overlap-grad-reduce, --acodm-config, ... Processes of
torchrun are data parallel, unless --tensor-model-parallel-size and the like say otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import logging
import math
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import megatron_acodm
from megatron_acodm import AcodmConfig, Mixer, RunShape, ops
from megatron_acodm.arguments import build_parser, check_arguments, check_batch
from megatron_acodm.config import ESTIMATORS
from megatron_acodm.help_format import HelpFormatter
from megatron_acodm.megatron.decisions import StepReport
from megatron_acodm.megatron.mixer import Step
from megatron_acodm.metrics import describe_hardware, installed_versions
from megatron_acodm.mixing import Observation
from megatron_acodm.mixing.transfer import save_policy

SHAPES = {  # layers, hidden size, attention heads
    "pythia-14m": (6, 128, 4),
    "pythia-70m": (6, 512, 8),
    "pythia-160m": (12, 768, 12),
    "pythia-1b": (16, 2048, 16),
}
LEARNER = "acodm, sketch"  # the candidate whose policy drives candidate frozen
NO_HOOKS: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
TRAIN_ITERS = 41_667  # of the run that the steps are taken from, the paper's
WARM_UP_ROUNDS = 2
MIN_ROUNDS = 6  # fewer leave no 95% interval of a median
BUDGETS = {  # most that a step may take over the static blend
    ("pythia-70m", "cpu", "acodm, sketch"): 0.015,
    ("pythia-70m", "cpu", "frozen"): 0.005,
    ("pythia-1b", "cuda", "acodm, sketch"): 0.001,
    ("pythia-1b", "cuda", "acodm, exact"): 0.004,
}


class SyntheticDomain:
    """A one-epoch dataset of random sequences, whose tokens lie in the domain's half of all ids."""

    def __init__(self, domain: int, K: int, numbers: int, vocabulary: int) -> None:
        self._domain, self._numbers, self._vocabulary = domain, numbers, vocabulary
        self._first = vocabulary * domain // K

    def __len__(self) -> int:
        return 10_000 * (self._domain + 1)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng([self._domain, index])
        ids = self._first + generator.integers(self._vocabulary // 2, size=self._numbers)
        return {"text": ids % self._vocabulary}


@dataclass
class Candidate:
    """A way of mixing, its place in its own run, and what its timed steps showed."""

    name: str
    mixer: Mixer | None  # None: plain Megatron
    sample: Callable[[int], dict[str, Any]]  # of its run, by index
    iteration: int = 0
    step_s: list[float] = field(default_factory=list)  # those of the warm-up first
    waits_s: list[tuple[float, float]] = field(default_factory=list)  # for mixing; of it, in hooks
    report: StepReport | None = None  # of its last step
    bytes: dict[str, int] = field(default_factory=dict)


def candidate_configs(base: AcodmConfig, folder: Path) -> dict[str, AcodmConfig]:
    """How each candidate but the static blend mixes, by name; ``frozen`` reads from ``folder``."""

    def with_policy(policy: str, estimator: str | None = None, **mixing: Any) -> AcodmConfig:
        config = replace(base, mixing=replace(base.mixing, policy=policy, weights=None, **mixing))
        if estimator is None:
            return config
        # Estimator captured is for micro-batches of several domains.
        granule = "sequence" if estimator == "captured" else "micro-batch"
        return replace(
            config,
            blending=replace(base.blending, granule=granule),
            alignment=replace(base.alignment, estimator=estimator, coordinates=None),
        )

    configs = {"static under the mixer": with_policy("static")}
    configs |= {f"acodm, {name}": with_policy("acodm", name) for name in ESTIMATORS}
    configs["frozen"] = with_policy("frozen", policy_file=str(folder / "policy"))
    configs |= {"odm": with_policy("odm"), "ado": with_policy("ado")}
    return configs | {"pike, sketch": with_policy("pike", "sketch")}


def build_candidates(
    args: argparse.Namespace, K: int, wanted: Sequence[str] | None = None
) -> list[Candidate]:
    """The static blend first, then the mixer with each ``wanted`` way of mixing (None: all)."""
    base = AcodmConfig.from_yaml(args.acodm_config) if args.acodm_config else AcodmConfig()
    data = [SyntheticDomain(k, K, args.seq_length + 1, args.vocab_size) for k in range(K)]
    candidates = [Candidate("the static blend", None, lambda index: data[index % K][index // K])]
    run = RunShape(TRAIN_ITERS, args.global_batch_size, args.micro_batch_size, args.seed)
    names = [f"domain {k}" for k in range(K)]
    with tempfile.TemporaryDirectory() as folder:
        configs = candidate_configs(base, Path(folder))
        if unknown := sorted(set(wanted or ()) - set(configs)):
            raise ValueError(f"no candidate {unknown[0]!r}; they are {'; '.join(configs)}")
        for name, config in configs.items():
            if wanted and name not in wanted and name != LEARNER:
                continue
            mixer = Mixer(config, run, {})
            dataset: Any = mixer.bind(names, list(map(len, data)), None, data, [0] * K)
            teach(mixer)
            if name == LEARNER and mixer.controller is not None:  # rank 0
                save_policy(Path(folder) / "policy", mixer.controller.policy.exported({}))
            if not wanted or name in wanted:
                candidates.append(Candidate(name, mixer, dataset.__getitem__))
    return candidates


def teach(mixer: Mixer) -> None:
    """Show the agent made-up steps until its replay fills a batch: every timed step shall learn."""
    controller, D = mixer.controller, mixer.config.alignment.num_probes
    if controller is None or not controller.needs_alignment:
        return
    weights = controller.initial_weights
    samples = np.ones(len(weights), dtype=np.int64)
    numbers = np.random.default_rng(0).random
    for i in range(1, mixer.config.mixing.agent.replay_batch_size + 2):
        K = len(weights)
        measured = [*numbers((3, K)), numbers((K, K)), *numbers((2, D))]
        controller.decide(Observation(i, i / TRAIN_ITERS, weights, samples, samples > 0, *measured))


def forward_step(by_sequence: bool, batches: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
    """Megatron's forward step over the next micro-batch."""
    from megatron_acodm.megatron.losses import loss_func

    text = next(batches)
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    output = model(tokens, positions, None, labels=labels)
    mask = torch.ones(tokens.shape, device=tokens.device)
    return output, functools.partial(loss_func, mask, by_sequence=by_sequence)


class Trainer:
    """The model that all candidates train, and a step of each."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        from megatron.core import parallel_state

        from megatron_acodm.megatron.model import build_model, check_installation

        check_installation(args)
        self.args, self.device = args, device
        self.model = build_model(args, args.vocab_size)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()

    def measure(self, candidate: Candidate) -> float:
        """Let the candidate take its turn; seconds of the timed step on the slowest rank."""
        mixer = candidate.mixer
        batches = [self._batches(candidate, candidate.iteration + ahead) for ahead in (0, 1)]
        torch.cuda.reset_peak_memory_stats()  # on the CPU: nothing
        with self._hooked(mixer):
            dist.barrier()
            torch.cuda.synchronize()
            for own in batches:
                start = time.perf_counter()
                consumed = candidate.iteration * self.args.global_batch_size
                candidate.iteration += 1
                hooks = mixer.step(candidate.iteration, consumed) if mixer else NO_HOOKS
                with hooks as step:
                    self._update(own, mixer)
            torch.cuda.synchronize()
            seconds = torch.tensor(time.perf_counter() - start, device=self.device)
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            candidate.step_s.append(seconds.item())
            candidate.bytes["peak_bytes"] = torch.cuda.max_memory_allocated()
            if step is not None:
                take_report(candidate, step)
        return candidate.step_s[-1]

    def _batches(self, candidate: Candidate, iteration: int) -> list[Tensor]:
        """Tokens ``[micro-batch size, sequence + 1]`` of this rank's micro-batches of a step."""
        size, count = self.args.micro_batch_size, self.args.global_batch_size
        samples = np.arange(count) + iteration * count
        mine = samples.reshape(-1, self.data_size, size)[:, self.data_rank]
        return [
            torch.from_numpy(np.stack([candidate.sample(i)["text"] for i in row])).to(self.device)
            for row in mine.tolist()
        ]

    @contextlib.contextmanager
    def _hooked(self, mixer: Mixer | None) -> Iterator[None]:
        """Megatron patched and the model hooked for this mixer, and as they were afterwards."""
        if mixer is None:
            yield
            return
        # Every patch comes with a new mixer; that one hands losses to this one's measurement.
        patched: Any = megatron_acodm.patch(mixer.config, mixer.run)
        mixer.attach(self.model.chunks)
        patched.measurement = mixer.measurement
        try:
            yield
        finally:
            mixer.detach()
            megatron_acodm.unpatch()

    def _update(self, batches: Sequence[Tensor], mixer: Mixer | None) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        model = self.model
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        model.optimizer.zero_grad()
        by_sequence = mixer is not None and mixer.config.blending.granule == "sequence"
        iterators = [iter(batches) for _ in model.chunks]
        get_forward_backward_func()(
            forward_step_func=functools.partial(forward_step, by_sequence),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=model.chunks,
            num_microbatches=len(batches),
            seq_length=self.args.seq_length,
            micro_batch_size=self.args.micro_batch_size,
            forward_only=False,
        )
        succeeded, grad_norm, _ = model.optimizer.step()
        assert succeeded, f"the gradient norm is {grad_norm}"
        model.scheduler.step(increment=self.args.global_batch_size)


def take_report(candidate: Candidate, step: Step) -> None:
    """Note what the mixer says of the step that has just ended; its policy must have taken part."""
    mixer = candidate.mixer
    assert mixer is not None and mixer.measurement is not None
    report = candidate.report = step.report()
    figures = report.diagnostics
    if figures.get("dropped_steps") or figures.get("policy_failures"):
        raise RuntimeError(f"{candidate.name}: the policy took no part in a step: {figures}")
    candidate.waits_s.append((step.mixing_seconds, mixer.measurement.seconds))
    candidate.bytes["reduced_bytes"] = report.statistics.reduced_bytes
    candidate.bytes["estimator_bytes"] = tensor_bytes(mixer.measurement.estimator)
    candidate.bytes["agent_bytes"] = tensor_bytes(mixer.controller)


def tensor_bytes(owner: Any) -> int:
    """Bytes of the tensors that an object holds, each storage once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    found = [owner]
    while found:
        item = found.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            found += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            found += item
        else:
            found += getattr(item, "__dict__", {}).values()
    return sum(storages.values())


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Order statistics that enclose the median with at least 95% confidence, from 6 values on."""
    ordered, n = sorted(values), len(values)
    outside, tail = 0, 0.5**n  # tail: probability that the median lies beyond, on one side
    while tail <= 0.025:
        outside += 1
        tail += math.comb(n, outside) * 0.5**n
    if outside == 0:
        raise ValueError(f"{n} values leave no 95% interval of a median; take {MIN_ROUNDS} or more")
    return ordered[outside - 1], ordered[n - outside]


def summarize(candidates: Sequence[Candidate], shape: str, device: str) -> list[dict[str, Any]]:
    """Figures of each candidate; ``over_static`` is the ratio within a round, less 1."""
    rows, blend = [], np.array(candidates[0].step_s[WARM_UP_ROUNDS:])
    for candidate in candidates:
        step = np.array(candidate.step_s[WARM_UP_ROUNDS:])
        row: dict[str, Any] = {"candidate": candidate.name, "median_step_s": float(np.median(step))}
        if candidate.mixer is not None:
            over = step / blend - 1.0
            mixing, measuring = np.median(candidate.waits_s[WARM_UP_ROUNDS:], axis=0).tolist()
            low, high = median_interval(over.tolist())
            row |= {"over_static": float(np.median(over)), "over_static_95": [low, high]}
            row |= {"mixing_s": mixing, "measuring_s": measuring, "ends_s": mixing - measuring}
            row["mixing_share"] = mixing / row["median_step_s"]
            if budget := BUDGETS.get((shape, device, candidate.name)):
                verdict = "met" if high <= budget else "missed" if low > budget else "within noise"
                row |= {"budget": budget, "verdict": verdict}
        extra = candidate.bytes["peak_bytes"] - candidates[0].bytes["peak_bytes"]
        rows.append(row | candidate.bytes | {"extra_peak_bytes": extra, "steps_s": step.tolist()})
    return rows


def show(rows: Sequence[dict[str, Any]], device: str) -> None:
    """Print the table; memory is the device's peak over the baseline's, or counted from tensors."""
    own = "extra_peak_bytes" if device == "cuda" else "estimator_bytes"
    memory = ("reduced_bytes", own, "agent_bytes")
    print(f"\n{'':32}      over the static blend        mixing waits, ms    MB:")
    print(
        f"{'':22}   step ms   median      95% interval  in hooks the rest of step"
        "  reduced   memory    agent  budget"
    )
    for row in rows:
        line = f"{row['candidate']:22} {1e3 * row['median_step_s']:9.2f}"
        if "over_static" in row:
            interval = "{:+.2%} {:+.2%}".format(*row["over_static_95"])
            line += f"  {row['over_static']:+7.2%} {interval:>17}"
            line += f"  {1e3 * row['measuring_s']:9.3f} {1e3 * row['ends_s']:8.3f}"
            line += f" {row['mixing_share']:7.2%}"
            line += "".join(f" {row[key] / 1e6:8.2f}" for key in memory)
        print(line + (f"  {row['budget']:.1%}: {row['verdict']}" if "budget" in row else ""))
    if device == "cuda":
        print("Mixing waits include what the device had to do before, such as the model's update.")


def parse_arguments(words: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The benchmark's own arguments, and the trainer's."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="pythia-70m", help="of the model")
    parser.add_argument("--micro-batches", type=int, default=18, help="of a step and replica")
    parser.add_argument("--domains", type=int, default=22, metavar="K", help="how many")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--candidates", nargs="+", metavar="NAME",
                        help="only these and the static blend, as 'acodm, sketch'")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="that medians are over")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds of all rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    options, further = parser.parse_known_args(words)
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds is {options.rounds}; a 95% interval needs {MIN_ROUNDS} or more")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    elif not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device; use --device cpu")
    layers, hidden, heads = SHAPES[options.shape]
    flags: list[Any] = ["--num-layers", layers, "--hidden-size", hidden]
    flags += ["--num-attention-heads", heads, "--seq-length", 1024, "--micro-batch-size", 8]
    flags += ["--global-batch-size", 1, "--train-iters", TRAIN_ITERS, "--lr", 1e-5, "--min-lr", 0]
    flags += ["--lr-warmup-fraction", 0, "--vocab-size", 50_304, "--data-path", "none"]
    flags += ["--run-dir", "none", "--untie-embeddings-and-output-weights", *further]
    args = build_parser().parse_args(list(map(str, flags)))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    model_parallel = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    replicas = max(1, world_size // max(1, model_parallel))
    args.global_batch_size = args.micro_batch_size * options.micro_batches * replicas
    try:
        check_arguments(args)
        check_batch(args, world_size)
    except ValueError as error:
        parser.error(str(error))
    return options, args


def run_rounds(trainer: Trainer, candidates: list[Candidate], options: argparse.Namespace) -> None:
    """Warm up, then let every candidate take a step a round; alike on every rank."""
    for candidate in candidates * WARM_UP_ROUNDS:
        trainer.measure(candidate)
    order, spent = random.Random(0), 0.0
    gc.disable()  # between rounds instead
    for done in range(options.rounds):
        if done >= MIN_ROUNDS and spent * (done + 1) / done > options.time_limit:
            break
        gc.collect()
        for candidate in order.sample(candidates, len(candidates)):
            spent += trainer.measure(candidate)
    gc.enable()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; see ``--help``."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    logging.getLogger("megatron_acodm").setLevel(logging.ERROR)
    options, args = parse_arguments(arguments)
    from megatron_acodm.megatron.groups import initialize_distributed

    model_parallel = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    initialize_distributed(*model_parallel, args.seed, args.distributed_timeout_minutes)
    try:
        candidates = build_candidates(args, options.domains, options.candidates)
        trainer = Trainer(args, torch.device(options.device))
        run_rounds(trainer, candidates, options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    report = {
        "hardware": describe_hardware(),
        "versions": installed_versions(),
        "fused_kernels": ops.has_fused_kernels(options.device),
        "processes": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "shape": options.shape,
        "parameters": sum(p.numel() for chunk in trainer.model.chunks for p in chunk.parameters()),
        "domains": options.domains,
        "arguments": vars(args),
        "candidates": summarize(candidates, options.shape, options.device),
    }
    if dist.get_rank() == 0:
        print(", ".join(f"{key} {value}" for key, value in [*report.items()][:-2]))
        show(report["candidates"], options.device)
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
