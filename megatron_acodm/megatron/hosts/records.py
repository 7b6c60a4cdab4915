"""What a run of Megatron-LM shows of its mixture: our files, and the host's own outputs."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_acodm.megatron.mixer import Mixer
from megatron_acodm.megatron.records import (
    FinishedStep,
    heaviest,
    mixing_metrics,
    record_if_decided,
    write_step,
)
from megatron_acodm.metrics import MetricsWriter, RunInfo, write_run_info

_SHOWN = ("weight", "loss", "reward")
"""What the host's own writers show of a domain; the reward where rank 0 is the last rank too."""


def default_run_dir(args: Namespace) -> Path | None:
    """Where ``metrics.jsonl`` goes when nobody says: into ``--save``, or ``--tensorboard-dir``."""
    parent = getattr(args, "save", None) or getattr(args, "tensorboard_dir", None)
    return Path(parent) / "acodm" if parent else None


class HostRecorder:
    """Records each step when the next one is over: what mixing makes of it is known then.

    Rank 0 writes ``metrics.jsonl``; the rank that has the host's TensorBoard and Weights & Biases
    writers, its last one, shows weights and losses there.

    Args:
        args: Megatron-LM's.
        mixer: of the run.
        run_dir: for our files; None: none.
        tensorboard: the host's writer, on the rank that has it.
        wandb: likewise.
        resume_from: the iteration that the run goes on from; 0 for a new one.
    """

    def __init__(
        self,
        args: Namespace,
        mixer: Mixer,
        run_dir: Path | None,
        tensorboard: Any,
        wandb: Any,
        resume_from: int,
    ) -> None:
        self._args, self._mixer = args, mixer
        self._tensorboard, self._wandb = tensorboard, wandb
        self._last: FinishedStep | None = None
        self._writer: MetricsWriter | None = None
        if run_dir is None or dist.get_rank() != 0:
            return
        info = RunInfo(
            domains=mixer.domains,
            sequence_length=args.seq_length,
            global_batch_size=args.global_batch_size,
            train_iters=args.train_iters,
            policy=mixer.config.mixing.policy,
            config={"arguments": dict(vars(args)), "acodm": mixer.config.to_dict()},
        )
        write_run_info(run_dir, info)
        self._writer = MetricsWriter(run_dir, tensorboard=False, resume_from=resume_from)

    def step(self, step: FinishedStep) -> None:
        """Take a finished step; record the one before."""
        self.flush()
        self._last = step

    def flush(self) -> None:
        """Record the last finished step, if it is not yet; waits for what mixing makes of it."""
        step, self._last = self._last, None
        shows = self._writer or self._tensorboard or self._wandb
        if step is None or step.mixing is None or not shows:
            return
        report = step.mixing.report()
        domains, extra = mixing_metrics(self._mixer.domains, report)
        if self._writer is not None:
            loss = report.statistics.mean_loss
            write_step(self._writer, self._mixer.run, step, loss, domains, extra)
        if step.iteration % (getattr(self._args, "tensorboard_log_interval", 1) or 1) == 0:
            self._show(step.iteration, domains, step.mixing.mixing_seconds)

    def _show(
        self, iteration: int, domains: dict[str, dict[str, Any]], mixing_seconds: float
    ) -> None:
        # Few of the values: each takes the host's writer 25 microseconds.
        values = {"acodm/mixing_time_s": mixing_seconds}
        for name, entry in domains.items():
            for quantity in _SHOWN:
                value = entry[quantity]
                if value is not None and math.isfinite(value):
                    values[f"acodm/{quantity}/{name}"] = value
        if self._tensorboard is not None:
            for tag, value in values.items():
                self._tensorboard.add_scalar(tag, value, iteration)
        if self._wandb is not None:
            self._wandb.log(values, iteration)

    def columns(self) -> str:
        """What mixing adds to the host's line of the last finished step; nothing is waited for."""
        step = self._last
        if step is None or step.mixing is None:
            return ""
        first = self._mixer.run.samples_before(step.iteration - 1)
        weights = self._mixer.decisions.weights_of(first).tolist()
        named = heaviest(dict(zip(self._mixer.domains, weights, strict=True)))
        return f" mixing (ms): {1000 * step.mixing.mixing_seconds:.1f}{named} |"

    def close(self) -> None:
        """Record the last step, unless it would have to be waited for, and close the files."""
        record_if_decided(self._last, self.flush)
        if self._writer is not None:
            self._writer.close()
