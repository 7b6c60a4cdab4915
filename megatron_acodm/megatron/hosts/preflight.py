"""Checks a run before it starts: its data, its first mixture, what it goes on from, its folders."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_acodm.blending import DataExhausted
from megatron_acodm.config import AcodmConfig
from megatron_acodm.megatron.builder import checksum_of, domain_name, training_blend
from megatron_acodm.megatron.compat import UnsupportedHostError
from megatron_acodm.megatron.decisions import Decisions
from megatron_acodm.megatron.run import RunShape
from megatron_acodm.megatron.sidecar import FOLDER, restore_decisions


class Problems:
    """What was found wrong; the checks go on."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, *problems: str) -> None:
        """Note problems, each once."""
        self.found += [problem for problem in problems if problem not in self.found]

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what is raised within, if it is meant for the user."""
        try:
            yield
        except (ValueError, OSError, UnsupportedHostError, DataExhausted) as error:
            self.add(str(error))


@dataclass(frozen=True)
class DomainData:
    """What the files of a domain hold of its training split."""

    name: str
    tokens: int
    sequences: int  # an epoch
    checksum: int


def read_domains(builder: Any, problems: Problems) -> list[DomainData]:
    """Open each domain's files, and count as Megatron would; no index is built.

    Args:
        builder: a ``BlendedMegatronDatasetBuilder`` with training data.
        problems: takes what is wrong with a domain, which is then left out.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset

    blend = training_blend(builder.config)
    assert blend is not None
    if not issubclass(builder.cls, GPTDataset):
        problems.add(
            f"{builder.cls.__name__} is no GPTDataset: its sequences cannot be counted without "
            "building it, so its data was not checked"
        )
        return []
    split = builder.config.split_matrix
    train_range = (0.0, 1.0) if split is None else split[0]
    if train_range is None:
        problems.add(f"the split {builder.config.split!r} leaves nothing for training")
        return []
    domains = []
    for prefix in blend[0]:
        with problems.noted():
            domains.append(_read_domain(builder, prefix, train_range))
    return domains


def _read_domain(builder: Any, prefix: str, train_range: tuple[float, float]) -> DomainData:
    config = builder.config
    refuse_missing(prefix)
    try:
        dataset = builder.cls.build_low_level_dataset(prefix, config)
        documents = builder.cls.numel_low_level_dataset(dataset)
        indices = np.arange(*(round(bound * float(documents)) for bound in train_range))
        tokens = int(dataset.sequence_lengths[indices].sum(dtype=np.int64))
        checksum = checksum_of(_Split(indices, dataset))
    except Exception as error:  # whatever a damaged file leads Megatron's reader to
        kind = type(error).__name__
        raise ValueError(f"{prefix}.idx or .bin cannot be read ({kind}: {error})") from error
    name = domain_name(prefix)
    sequences = (tokens - config.add_extra_token_to_sequence) // config.sequence_length
    if sequences < 1:
        raise ValueError(
            f"domain {name!r} has no training sequence of {config.sequence_length} tokens, but "
            f"{tokens} tokens; each domain needs at least 1 sequence: remove it, or add text"
        )
    return DomainData(name, tokens, sequences, checksum)


def refuse_missing(prefix: str) -> None:
    """Refuse a dataset prefix without files.

    Raises:
        ValueError: naming the first that is not there.
    """
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            raise ValueError(f"{prefix}{suffix} does not exist; check the data paths")


@dataclass(frozen=True)
class _Split:
    indices: Any
    dataset: Any


@dataclass(frozen=True)
class Checkpoint:
    """What a run would go on from."""

    folder: Path
    iteration: int


@dataclass
class Plan:
    """What would run, as far as it could be found out."""

    config: AcodmConfig
    run: RunShape
    sequence_length: int
    layout: str
    domains: list[DomainData]
    decisions: Decisions
    starts: str = "from scratch"
    outputs: list[str] = field(default_factory=list)
    consumed: int = 0

    def __str__(self) -> str:
        mixing, blending = self.config.mixing, self.config.blending
        run, ledger = self.run, self.decisions.ledger
        sequences = run.train_samples
        weights = self.decisions.weights_of(self.consumed)
        drawn = self.decisions.samples_of_step(self.consumed)
        natural = np.array([domain.tokens for domain in self.domains], dtype=np.float64)
        natural /= natural.sum()
        width = max(len("domain"), *(len(domain.name) for domain in self.domains))
        table = [
            f"  {'domain':<{width}} {'tokens':>17} {'sequences':>13} {'share':>8} "
            f"{'next step':>9} {'drawn':>6} {'epochs':>8}"
        ]
        for i, domain in enumerate(self.domains):
            epochs = sequences * weights[i] / domain.sequences
            table.append(
                f"  {domain.name:<{width}} {domain.tokens:>17,} {domain.sequences:>13,} "
                f"{natural[i]:>8.2%} {weights[i]:>9.2%} {drawn[i]:>6,} {epochs:>8.3g}"
            )
        ramp_up = f", ramped up from {run.rampup_batch_size[0]}" if run.rampup_batch_size else ""
        lines = [
            f"layout: {self.layout}",
            f"run: {run.train_iters:,} steps of {run.global_batch_size:,} sequences{ramp_up} of "
            f"{self.sequence_length:,} tokens, {sequences * self.sequence_length:,} tokens in all; "
            f"it starts {self.starts}",
            f"policy: {mixing.policy}{self._objective()}, decision lag {blending.decision_lag}, "
            f"{blending.repetition} on repetition; a {blending.granule} of {ledger.granule_size} "
            "is of one domain",
            f"measuring: {self._cost()}",
            *self.outputs,
            f"data: {len(self.domains)} domains (epochs: of the whole run, at the next step's "
            "weights)",
            *table,
        ]
        return "\n".join(lines)

    def _objective(self) -> str:
        agent = self.config.mixing.agent
        if self.config.mixing.policy != "acodm":
            return ""
        return f", objective {agent.objective}, reward {agent.reward}"

    def _cost(self) -> str:
        if not self.decisions.needs_alignment:
            return "losses alone"
        alignment, domains = self.config.alignment, len(self.domains)
        if alignment.estimator == "exact":
            return f"gradients in full: {domains} times the parameters that are compared"
        rows = 4 * domains * alignment.sketch_size
        copies = 2 if self.decisions.needs_affinity else 1
        return (
            f"gradients by estimator {alignment.estimator}: {copies * rows / 2**20:,.1f} MiB of "
            f"device memory a rank for {domains} x {alignment.sketch_size:,} numbers, of which "
            f"{rows / 2**20:,.1f} MiB are summed over data-parallel ranks in a step"
        )


def plan(
    config: AcodmConfig,
    run: RunShape,
    builder: Any,
    domains: list[DomainData],
    layout: str,
) -> Plan:
    """What a run would do first.

    Raises:
        ValueError: for domains, settings and data that do not fit together.
    """
    blend = training_blend(builder.config)
    assert blend is not None
    names = [domain.name for domain in domains]
    if len(set(names)) != len(names):
        raise ValueError(f"domain names must differ, got {', '.join(names)}")
    decisions = Decisions(
        config,
        run,
        names,
        [domain.sequences for domain in domains],
        blend[1],
        [domain.checksum for domain in domains],
    )
    return Plan(config, run, builder.config.sequence_length, layout, domains, decisions)


def resume(plan: Plan, checkpoint: Checkpoint, *, adopt: bool, model_parallel_size: int) -> None:
    """Go on from a checkpoint as the run would.

    Raises:
        ValueError: when its sidecar is damaged, or of a run that differs.
    """
    iteration, folder = checkpoint.iteration, checkpoint.folder / FOLDER
    consumed = plan.run.samples_before(iteration)
    if not checkpoint.folder.is_dir():
        raise ValueError(f"{checkpoint.folder} is announced, but not there")
    if iteration >= plan.run.train_iters:
        raise ValueError(
            f"the checkpoint is of step {iteration}, and the run ends with step "
            f"{plan.run.train_iters}: nothing is left to train; raise the steps"
        )
    plan.starts = f"after step {iteration} of {checkpoint.folder}, "
    if not folder.is_dir():
        plan.decisions.ledger.restart_at(iteration, consumed, [0] * len(plan.domains), 0)
        plan.starts += "which has no policy: it starts afresh, and every domain at its beginning"
    else:
        restore_decisions(plan.decisions, folder, iteration, consumed, adopt=adopt)
        plan.starts += "with its policy"
        parts = len(list(folder.glob("gradients_*.safetensors")))
        if plan.decisions.needs_affinity and 0 < parts < model_parallel_size:
            plan.starts += f" (averages of gradients: {parts} of {model_parallel_size} parts)"
    plan.decisions.continue_from(consumed, control=None)
    plan.consumed = consumed


def refuse_unwritable(what: str, path: str | Path, problems: Problems) -> None:
    """Note a folder that could not be made, or in which no file can be."""
    folder = Path(path).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problems.add(f"{what} {path} cannot be written: {error.strerror} ({folder})")
