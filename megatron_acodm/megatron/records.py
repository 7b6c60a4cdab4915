"""What the trainer writes down: a line a step and a validation, in files and on the console."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_acodm.megatron.decisions import StepReport
from megatron_acodm.megatron.mixer import Mixer, Step
from megatron_acodm.megatron.run import RunShape
from megatron_acodm.metrics import (
    MetricsWriter,
    RunInfo,
    domain_metrics,
    mean_perplexities,
    write_run_info,
)


@dataclass(frozen=True)
class FinishedStep:
    """A step of the trainer, and the mixer's part in it."""

    iteration: int
    num_samples: int
    loss: float  # nan with a mixer, which knows it
    grad_norm: float
    learning_rate: float
    seconds: float
    timing: dict[str, float]  # seconds of its parts
    mixing: Step | None


class Recorder:
    """Records steps and validations; rank 0 writes, the others only keep up.

    A step is recorded when the next one is over, or ``flush`` asks for it: what mixing makes of a
    step is known only then.

    Args:
        args: the trainer's arguments.
        run: sizes of the run.
        mixer: None for Megatron's static blend.
        domains: names of the domains.
        natural_weights: their shares in all training tokens.
        resume_from: the iteration that the run goes on from; 0 for a new one.
    """

    def __init__(
        self,
        args: Namespace,
        run: RunShape,
        mixer: Mixer | None,
        domains: list[str],
        natural_weights: Mapping[str, float],
        resume_from: int,
    ) -> None:
        self._args, self._run, self._mixer = args, run, mixer
        self._natural_weights = natural_weights
        self._unrecorded: FinishedStep | None = None
        self._writer: MetricsWriter | None = None
        if dist.get_rank() != 0:
            return
        config = {"arguments": vars(args)}
        if mixer is not None:
            config["acodm"] = mixer.config.to_dict()
        info = RunInfo(
            domains=domains,
            sequence_length=args.seq_length,
            global_batch_size=args.global_batch_size,
            train_iters=args.train_iters,
            policy=mixer.config.mixing.policy if mixer else "none",
            config=config,
        )
        write_run_info(args.run_dir, info)
        self._writer = MetricsWriter(
            args.run_dir, wandb_project=args.wandb_project, resume_from=resume_from
        )

    def step(self, step: FinishedStep) -> None:
        """Take a finished step; record the one before."""
        self.flush()
        self._unrecorded = step
        if step.mixing is None:
            self.flush()

    def flush(self) -> None:
        """Record the last finished step, if it is not yet; waits for what mixing makes of it."""
        step, self._unrecorded = self._unrecorded, None
        if step is not None and self._writer is not None:
            self._write(step, self._writer)

    def _write(self, step: FinishedStep, writer: MetricsWriter) -> None:
        args, loss, mixing_seconds = self._args, step.loss, 0.0
        domains: dict[str, dict[str, Any]] = {}
        extra: dict[str, Any] = {}
        if step.mixing is not None and self._mixer is not None:
            report, mixing_seconds = step.mixing.report(), step.mixing.mixing_seconds
            loss = report.statistics.mean_loss
            domains, extra = mixing_metrics(self._mixer.domains, report)
        write_step(writer, self._run, step, loss, domains, extra)
        if step.iteration % args.log_interval == 0 or step.iteration == 1:
            tokens = step.num_samples * args.seq_length
            log(
                f"step {step.iteration}/{args.train_iters} | loss {loss:.4f} | lr "
                f"{step.learning_rate:.2e} | {step.seconds:.2f} s | {tokens / step.seconds:,.0f} "
                f"tokens/s | mixing {mixing_seconds / step.seconds:.1%}"
                + heaviest({name: values["weight"] for name, values in domains.items()})
            )

    def validation(self, iteration: int, losses: Mapping[str, float], seconds: float) -> None:
        """Record the mean token loss of each domain's validation text."""
        self.flush()
        means = mean_perplexities(losses, self._natural_weights)
        figures = ", ".join(f"{name} {value:,.4g}" for name, value in means.items())
        log(
            f"validation after step {iteration}: mean perplexity over {len(losses)} domains "
            f"{figures} ({seconds:.1f} s)"
        )
        if self._writer is not None:
            self._writer.validation(iteration, losses, self._natural_weights)

    def close(self) -> None:
        """Record the last step, unless it would have to be waited for, and close the files."""
        record_if_decided(self._unrecorded, self.flush)
        if self._writer is not None:
            self._writer.close()


def log(message: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(message, flush=True)


def write_step(
    writer: MetricsWriter,
    run: RunShape,
    step: FinishedStep,
    loss: float,
    domains: dict[str, dict[str, Any]],
    extra: dict[str, Any],
) -> None:
    """Write the line of a step; ``domains`` and ``extra`` are those of ``mixing_metrics``."""
    writer.step(
        step.iteration,
        consumed_samples=run.samples_before(step.iteration),
        lm_loss=loss,
        step_time_s=step.seconds,
        mixing_time_s=step.mixing.mixing_seconds if step.mixing is not None else 0.0,
        domains=domains,
        grad_norm=step.grad_norm,
        learning_rate=step.learning_rate,
        timing=step.timing,
        **extra,
    )


def record_if_decided(step: FinishedStep | None, flush: Callable[[], None]) -> None:
    """At the end of a run: record its last step, unless that would have to be waited for."""
    if step is not None and step.mixing is not None and step.mixing.is_decided:
        with contextlib.suppress(Exception):  # what ended the run is told elsewhere
            flush()


def heaviest(weights: Mapping[str, float]) -> str:
    """Column of a console line: the three domains of the greatest weights, if there are any."""
    ranked = sorted(weights.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} {weight:.3f}" for name, weight in ranked)
    return f" | most: {named}" if named else ""


def mixing_metrics(
    domains: list[str], report: StepReport
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """A step's entry ``domains`` in ``metrics.jsonl``, and the other entries that mixing adds."""
    extra = {
        "alignment_bytes": report.statistics.reduced_bytes,
        "diagnostics": report.diagnostics,
    }
    if report.statistics.gram is not None:
        extra["gram"] = report.statistics.gram
    entries = domain_metrics(
        domains,
        report.weights.tolist(),
        report.samples.tolist(),
        report.statistics.loss.tolist(),
        None if report.rewards is None else report.rewards.tolist(),
        report.epochs.tolist(),
    )
    return entries, extra
