#!/usr/bin/env python3
"""Measures how far each alignment estimator is off, on the gradients of a model in training.

Trains a small GPT on a preprocessed corpus, every domain alike. At some steps it takes the gradient
of each domain over a batch and compares every estimator and size with float64; further batches of
the same text at the same weights say how much of that matters. Also: what another choice of
parameters would have ranked. Writes study.json, study.md and study.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_acodm import ops
from megatron_acodm.alignment import (
    CapturedEstimator,
    Estimator,
    ExactEstimator,
    GradientEstimator,
    SampledEstimator,
    SketchEstimator,
)
from megatron_acodm.arguments import build_parser, check_arguments
from megatron_acodm.config import AlignmentConfig
from megatron_acodm.help_format import HelpFormatter
from megatron_acodm.megatron.groups import initialize_distributed
from megatron_acodm.megatron.indexed import token_dtype
from megatron_acodm.megatron.parameters import SelectedParameter, layer_of, select_parameters
from megatron_acodm.preprocess.manifest import Manifest

SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
WIDTHS = (16, 32, 64, 128, 256, 512)
LINEAR = ("decoder.layers.*.linear_*.weight",)
SELECTIONS: dict[str, AlignmentConfig] = {
    "fc2, depths 0.75 to 1 (default)": AlignmentConfig(),
    "fc2, depths 0.17 to 0.5": AlignmentConfig(depths=(1 / 6, 1 / 3, 0.5)),
    "fc2, all layers": AlignmentConfig(parameters=("*.linear_fc2.weight",)),
    "fc1, depths 0.75 to 1": AlignmentConfig(kind="fc1"),
    "qkv, depths 0.75 to 1": AlignmentConfig(kind="qkv"),
    "proj, depths 0.75 to 1": AlignmentConfig(kind="proj"),
    "all linear weights": AlignmentConfig(parameters=LINEAR),
}
DEFAULT = next(iter(SELECTIONS))


class Texts:
    """Random sequences of each domain of a corpus."""

    def __init__(self, manifest: Manifest, length: int, seed: int) -> None:
        dtype = token_dtype(manifest.tokenizer.vocab_size)
        self.names = [domain.name for domain in manifest.domains]
        self._tokens = [np.memmap(f"{d.prefix}.bin", dtype, "r") for d in manifest.domains]
        self._length = length
        self._random = np.random.default_rng(seed)
        for domain, tokens in zip(manifest.domains, self._tokens, strict=True):
            if len(tokens) <= length:
                raise ValueError(
                    f"domain {domain.name} has {len(tokens)} tokens; --seq-length must be less"
                )

    def draw(self, domain: int, count: int) -> Tensor:
        """``[count, length + 1]`` token ids."""
        tokens = self._tokens[domain]
        starts = self._random.integers(0, len(tokens) - self._length, count)
        return torch.from_numpy(
            np.stack([tokens[s : s + self._length + 1] for s in starts]).astype(np.int64)
        )


@dataclass
class BackwardPasses:
    """By the names of parameters: a list over micro-batches."""

    gradients: dict[str, list[Tensor]]
    sides: dict[str, list[tuple[Tensor, Tensor]]]  # inputs and output gradients of the layers


class Host:
    """A GPT in Megatron's DDP, on one process."""

    def __init__(self, options: argparse.Namespace, vocab_size: int) -> None:
        from megatron_acodm.megatron.model import build_model

        initialize_distributed(1, 1, options.seed, timeout_minutes=10)
        args = build_parser().parse_args(
            [
                *("--num-layers", str(options.num_layers), "--num-attention-heads", "4"),
                *("--hidden-size", str(options.hidden_size), "--lr", str(options.lr)),
                *("--seq-length", str(options.seq_length), "--lr-warmup-fraction", "0.1"),
                *("--micro-batch-size", "1", "--global-batch-size", "1", "--run-dir", "unused"),
                *("--data-path", "unused", "--train-iters", str(max(options.steps))),
            ]
        )
        check_arguments(args)
        args.bf16, args.transformer_impl = False, "local"
        self.model = build_model(args, vocab_size)
        self.num_layers = options.num_layers

    def accumulate(self, batches: Sequence[Tensor]) -> float:
        """Forward and backward over micro-batches; returns their mean loss."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_acodm.megatron.losses import loss_func

        def forward_step(iterator: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
            text = next(iterator)
            positions = torch.arange(text.shape[1] - 1).expand(len(text), -1)
            output = model(text[:, :-1], positions, None, labels=text[:, 1:])
            return output, partial(loss_func, torch.ones(output.shape))

        self.model.chunks[0].zero_grad_buffer()
        self.model.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=self.model.chunks,
            num_microbatches=len(batches),
            seq_length=batches[0].shape[1] - 1,
            micro_batch_size=len(batches[0]),
            forward_only=False,
        )
        sums = torch.stack([report["lm loss"] for report in reports]).sum(0)
        return float(sums[0] / sums[1])

    def update(self, batches: Sequence[Tensor]) -> float:
        """One step of training."""
        loss = self.accumulate(batches)
        self.model.optimizer.step()
        self.model.scheduler.step(increment=1)
        return loss

    def backward_passes(self, batches: Sequence[Tensor]) -> BackwardPasses:
        """What a run's hooks see of each linear weight in each micro-batch."""
        found = BackwardPasses({}, {})
        handles = []
        for selected in self.select(AlignmentConfig(parameters=LINEAR)):
            gradients = found.gradients.setdefault(selected.name, [])
            sides = found.sides.setdefault(selected.name, [])

            def forward(
                module: Any, inputs: Any, output: Any, sides: list[tuple[Tensor, Tensor]] = sides
            ) -> None:
                output[0].register_hook(lambda grad: sides.append((inputs[0].detach(), grad)))

            handles += [
                selected.parameter.register_hook(
                    lambda g, gradients=gradients: gradients.append(g.clone())
                ),
                layer_of(selected, self.model.chunks).register_forward_hook(forward),
            ]
        self.accumulate(batches)
        for handle in handles:
            handle.remove()
        return found

    def select(self, config: AlignmentConfig) -> list[SelectedParameter]:
        """The parameters that a selection names."""
        return select_parameters(self.model.chunks, self.num_layers, config)


def reference_gram(
    gradients: dict[str, list[Tensor]], names: Sequence[str], domains: Sequence[int], K: int
) -> np.ndarray:
    """``[K, K]`` products of the domains' summed gradients, in float64 throughout."""
    gram = np.zeros((K, K))
    for name in names:
        rows = torch.zeros(K, gradients[name][0].numel(), dtype=torch.float64)
        for domain, grad in zip(domains, gradients[name], strict=True):
            rows[domain] += grad.flatten()
        gram += (rows @ rows.T).numpy()
    return gram


def alignment(gram: np.ndarray) -> np.ndarray:
    """``[K]`` product of each row with the sum of the others."""
    return gram.sum(1) - np.diag(gram)


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau: agreeing pairs less disagreeing ones, as a share of all."""
    i, j = np.triu_indices(len(a), 1)
    return float(np.mean(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])))


def compare(gram: np.ndarray, W: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """How far a Gram matrix and a W are from the expected Gram matrix."""
    right = alignment(expected)
    top = min(3, len(W))
    return {
        "W": float(np.linalg.norm(W - right) / np.linalg.norm(right)),
        "gram": float(np.linalg.norm(gram - expected) / np.linalg.norm(expected)),
        "kendall": kendall(W, right),
        "top3": len({*np.argsort(W)[-top:]} & {*np.argsort(right)[-top:]}) / top,
    }


def estimators(
    shapes: Sequence[Sequence[int]], K: int, seed: int
) -> dict[tuple[str, int], Estimator]:
    """Every estimator and size, under one seed."""
    numels = [math.prod(shape) for shape in shapes]
    total = sum(numels)
    found: dict[tuple[str, int], Estimator] = {}
    if seed == 0:
        found["exact", total] = ExactEstimator(numels, K, 0, "cpu")
    for size in (size for size in SIZES if size < total):
        found["sketch", size] = SketchEstimator(numels, K, 0, "cpu", size, seed)
        found["coordinates", size] = SampledEstimator(numels, K, 0, "cpu", size / total, seed)
    m = AlignmentConfig.sketch_size
    for width in (width for width in WIDTHS if width < max(max(shape) for shape in shapes)):
        estimator = CapturedEstimator(shapes, K, 0, "cpu", m, width, seed)
        found[f"captured, width {width}", m] = estimator
    return found


def add_step(
    estimator: Estimator, passes: BackwardPasses, names: Sequence[str], domains: Sequence[int]
) -> None:
    """Give an estimator all micro-batches of a step."""
    estimator.begin_step()
    for micro_batch, domain in enumerate(domains):
        for index, name in enumerate(names):
            if isinstance(estimator, CapturedEstimator):
                inputs, output_grad = passes.sides[name][micro_batch]
                estimator.add_sides(
                    index,
                    [domain] * inputs.shape[1],
                    estimator.fold_input(index, inputs),
                    estimator.fold_output_grad(index, output_grad),
                )
            else:
                assert isinstance(estimator, GradientEstimator)
                estimator.add_gradient(index, domain, passes.gradients[name][micro_batch])


def study_estimators(
    passes: BackwardPasses,
    names: Sequence[str],
    domains: Sequence[int],
    expected: np.ndarray,
    seeds: int,
) -> list[dict[str, Any]]:
    """A line an estimator and size: medians over seeds of ``compare``, seconds, bytes."""
    shapes, K = [passes.gradients[name][0].shape for name in names], len(expected)
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed in range(seeds):
        for key, estimator in estimators(shapes, K, seed).items():
            start = time.perf_counter()
            add_step(estimator, passes, names, domains)
            W = estimator.products()[0].numpy()
            seconds = time.perf_counter() - start
            result = compare(ops.gram(estimator.rows).numpy(), W, expected)
            result |= {"seconds": seconds, "bytes": estimator.packed_bytes}
            runs.setdefault(key, []).append(result)
    lines = []
    for (name, size), results in runs.items():
        values = {key: [result[key] for result in results] for key in results[0]}
        line = {key: float(np.median(own)) for key, own in values.items()}
        line |= {"W_worst": max(values["W"]), "kendall_worst": min(values["kendall"])}
        lines.append({"estimator": name, "size": size} | line)
    return lines


def study_step(host: Host, texts: Texts, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one point of the training."""
    K = len(texts.names)
    domains = [domain for domain in range(K) for _ in range(options.micro_batches)]
    parameters = {name: host.select(config) for name, config in SELECTIONS.items()}
    names = {key: [selected.name for selected in own] for key, own in parameters.items()}
    grams: dict[str, list[np.ndarray]] = {key: [] for key in SELECTIONS}
    lines: list[dict[str, Any]] = []
    for batch in range(options.batches):
        drawn = [texts.draw(domain, options.micro_batch_size) for domain in domains]
        passes = host.backward_passes(drawn)
        for key in SELECTIONS:
            grams[key].append(reference_gram(passes.gradients, names[key], domains, K))
        if batch == 0:
            expected = grams[DEFAULT][0]
            lines = study_estimators(passes, names[DEFAULT], domains, expected, options.seeds)
    first = grams[DEFAULT][0]
    noise = [compare(gram, alignment(gram), first) for gram in grams[DEFAULT][1:]]
    return {
        "estimators": lines,
        "another_batch": {key: float(np.median([n[key] for n in noise])) for key in noise[0]},
        "W": alignment(first).tolist(),
        "selections": {
            key: {"numbers": sum(selected.parameter.numel() for selected in own)}
            | _agreement(grams[key], grams[DEFAULT])
            for key, own in parameters.items()
        },
    }


def _agreement(own: Sequence[np.ndarray], default: Sequence[np.ndarray]) -> dict[str, float]:
    """Kendall's tau with the default selection on the same batch, and with itself on another."""
    same = [kendall(alignment(a), alignment(b)) for a, b in zip(own, default, strict=True)]
    other = [kendall(alignment(own[0]), alignment(a)) for a in own[1:]]
    return {"with_default": float(np.mean(same)), "with_another_batch": float(np.mean(other))}


def markdown(report: dict[str, Any]) -> str:
    """The two tables; where a cell has several figures, they are those of the measured steps."""
    points = report["points"]

    def cells(rows: Sequence[dict[str, Any]], *columns: str) -> str:
        digits = {"W": ".2g", "W_worst": ".2g", "gram": ".2g"}
        form = {key: digits.get(key, ".2f") for key in columns}
        return " | ".join(
            " / ".join(format(row[key], form[key]) for row in rows) for key in columns
        )

    lines = [
        f"At steps {' / '.join(str(point['step']) for point in points)}:",
        "",
        "| estimator | numbers a domain | error of W | of the worst seed | of the Gram matrix | "
        "Kendall's tau | top 3 | bytes reduced | time |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for rows in zip(*(point["estimators"] for point in points), strict=True):
        first, seconds = rows[0], np.median([row["seconds"] for row in rows])
        lines.append(
            f"| {first['estimator']} | {first['size']:,} | "
            f"{cells(rows, 'W', 'W_worst', 'gram', 'kendall', 'top3')} | "
            f"{first['bytes']:,.0f} | {1e3 * seconds:.1f} ms |"
        )
    noise = [point["another_batch"] for point in points]
    rest = cells(noise, "gram", "kendall", "top3")
    lines.append(f"| another batch | | {cells(noise, 'W')} | | {rest} | | |")
    lines += ["", "| selection | numbers | tau with the default | with itself, another batch |"]
    lines += ["|---|--:|--:|--:|"]
    for name in SELECTIONS:
        rows = [point["selections"][name] for point in points]
        agreement = cells(rows, "with_default", "with_another_batch")
        lines.append(f"| {name} | {rows[0]['numbers']:,} | {agreement} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Error of W and agreement of the ranking against the numbers kept; a panel a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = report["points"]
    figure, axes = plt.subplots(
        *(2, len(points)), figsize=(3.0 * len(points) + 0.8, 5.2), squeeze=False,
        sharex=True, sharey="row", layout="constrained",
    )  # fmt: skip
    marks = {"sketch": ("sketch", "#0072B2", "o"),
             "coordinates": ("random coordinates", "#D55E00", "s")}  # fmt: skip
    for point, (top, bottom) in zip(points, axes.T, strict=True):
        for name, (label, colour, mark) in marks.items():
            rows = [row for row in point["estimators"] if row["estimator"] == name]
            sizes = [row["size"] for row in rows]
            style = {"color": colour, "marker": mark, "markersize": 4, "linewidth": 1.5}
            top.loglog(sizes, [row["W"] for row in rows], label=label, **style)
            bottom.semilogx(sizes, [row["kendall"] for row in rows], **style)
        for axis, key in ((top, "W"), (bottom, "kendall")):
            axis.axhline(
                point["another_batch"][key], color="#57606a", linestyle=(0, (4, 2)), linewidth=1.2,
                label="another batch of the same text, in full",
            )  # fmt: skip
            axis.grid(color="#eaeef2")
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        top.set_title(f"step {point['step']}", fontsize=10)
        ticks = list(SIZES[::2])
        bottom.set_xticks(ticks, [f"{size // 1024} k" for size in ticks])
        bottom.minorticks_off()
        bottom.set_xlabel("numbers kept a domain")
    axes[0, 0].set_ylabel("relative error of W (median)")
    axes[1, 0].set_ylabel("Kendall's tau with float64")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.add_argument("--manifest", required=True, help="of a corpus by tools/preprocess_pile.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 30, 150], metavar="STEP",
                        help="where to measure; the last ends the training")  # fmt: skip
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=4, help="a domain, when measuring")
    parser.add_argument("--batches", type=int, default=3, help="measured at a step, at least 2")
    parser.add_argument("--seeds", type=int, default=16, help="maps drawn of each estimator")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the training")
    parser.add_argument("--seed", type=int, default=1234, help="of weights and text")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    options = parser.parse_args(arguments)
    options.steps = sorted(set(options.steps))
    if min(*options.steps, options.micro_batches, options.seeds, options.batches - 1) < 1:
        parser.error("--steps, --micro-batches and --seeds must be at least 1, --batches 2")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; see ``--help``."""
    options = parse_arguments(arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    try:
        manifest = Manifest.load(options.manifest)
        texts = Texts(manifest, options.seq_length, options.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    host = Host(options, manifest.tokenizer.vocab_size)
    report: dict[str, Any] = {
        "options": {key: str(value) for key, value in vars(options).items()},
        "domains": texts.names,
        "points": [],
    }
    for step in range(1, max(options.steps) + 1):
        if step in options.steps:
            point = {"step": step, **study_step(host, texts, options)}
            report["points"].append(point)
        domains = range(len(texts.names))
        loss = host.update([texts.draw(domain, options.micro_batch_size) for domain in domains])
        if step in options.steps or step % 10 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    table = markdown(report)
    for name, text in (("study.json", json.dumps(report, indent=1) + "\n"), ("study.md", table)):
        (options.output / name).write_text(text, encoding="utf-8")
    plot(report, options.output / "study.png")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
