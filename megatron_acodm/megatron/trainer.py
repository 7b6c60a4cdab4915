"""The compact Megatron-Core trainer: the loop between data, schedules, optimizer and mixer."""

from __future__ import annotations

import contextlib
import logging
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_acodm.arguments import run_shape
from megatron_acodm.blending import DataExhausted
from megatron_acodm.config import AcodmConfig
from megatron_acodm.door import ignore_sigterm
from megatron_acodm.megatron.checkpoint import load_checkpoint, save_checkpoint
from megatron_acodm.megatron.data import (
    build_training_dataset,
    build_training_iterator,
    build_validation_datasets,
    get_batch,
)
from megatron_acodm.megatron.groups import timeout
from megatron_acodm.megatron.losses import forward, sum_over_ranks, validation_sums
from megatron_acodm.megatron.model import TrainingModel, build_model
from megatron_acodm.megatron.patches import patch, unpatch
from megatron_acodm.megatron.policy_file import save_learned_policy
from megatron_acodm.megatron.records import FinishedStep, Recorder, log
from megatron_acodm.megatron.signals import ExitSignal
from megatron_acodm.megatron.sources import DataSources, natural_weights

logger = logging.getLogger(__name__)


class Trainer:
    """One training run on this rank, from its arguments to its last checkpoint."""

    def __init__(self, args: Namespace, config: AcodmConfig | None, sources: DataSources) -> None:
        """Build data, model and mixer, and load the checkpoint; collective.

        Raises:
            ValueError: for whatever of these does not fit together.
        """
        from megatron.core import parallel_state

        self.args = args
        self.sources = sources
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.run = run_shape(args)
        names = dict(zip(sources.prefixes, sources.names, strict=True))
        self.mixer = patch(config, self.run, domain_names=names)
        shares = natural_weights(sources.prefixes)
        self.natural_weights = dict(zip(sources.names, shares, strict=True))
        weights = sources.weights
        if self.mixer is None and weights is None:
            weights = shares
        tokenizer = sources.tokenizer
        self.train_data = build_training_dataset(args, tokenizer, sources.prefixes, weights)
        self.valid_data = build_validation_datasets(
            args, tokenizer, sources.valid_names, sources.valid_prefixes
        )
        self.model: TrainingModel = build_model(args, tokenizer.vocab_size)
        if self.mixer is not None:
            self.mixer.attach(self.model.chunks)
        self.iteration = 0
        if args.load:
            self.iteration = load_checkpoint(
                args.load, self.model, self.mixer, self._fingerprint(), adopt=args.acodm_adopt
            )
            if self.iteration == 0:
                log(f"no checkpoint in {args.load}: starting from scratch")
        if args.acodm_save_policy and dist.get_rank() == 0:
            Path(args.acodm_save_policy).parent.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}
        self._exit_signal: ExitSignal | None = None

    def _fingerprint(self) -> dict[str, Any]:
        """What decides which samples a step draws, and must be the same when it is resumed."""
        args = self.args
        names = ["seed", "global_batch_size", "rampup_batch_size", "seq_length", "split"]
        if self.mixer is None:
            names.append("train_iters")  # Megatron shuffles a static blend for its length
        settings = {name.replace("_", " "): getattr(args, name) for name in names}
        policy = "none" if self.mixer is None else self.mixer.config.mixing.policy
        return {"policy": policy, "domains": self.sources.names, **settings}

    # The loop ---------------------------------------------------------------------------------

    def train(self) -> None:
        """Train from the current iteration to the last; collective."""
        args = self.args
        log(
            f"{'resuming after' if self.iteration else 'starting at'} step {self.iteration} of "
            f"{args.train_iters}: {len(self.sources.names)} domains, policy "
            f"{self.mixer.config.mixing.policy if self.mixer else 'none'}, "
            f"{args.global_batch_size} sequences a step on {self.data_size} data-parallel ranks"
        )
        records = None
        try:
            records = Recorder(
                args, self.run, self.mixer, self.sources.names, self.natural_weights, self.iteration
            )
            if self.iteration == 0 and args.eval_interval:
                self._validate(records)
            if args.save:
                self._exit_signal = ExitSignal(dist.new_group(backend="gloo", timeout=timeout()))
            iterator = build_training_iterator(args, self.train_data, self.consumed_samples)
            while self._samples_to_come():
                if self._exit_signal is not None:
                    self._exit_signal.begin_step()
                self._step(iterator, records)
                done = not self._samples_to_come()
                last = done or _due(args.exit_interval, self.iteration)
                if args.eval_interval and (last or _due(args.eval_interval, self.iteration)):
                    self._validate(records)
                if self._exit_signal is not None and self._exit_signal.came() and not last:
                    log(f"SIGTERM came: training ends after step {self.iteration}")
                    last = True
                save = args.save and (last or _due(args.save_interval, self.iteration))
                if save:
                    records.flush()
                    self._save()
                if args.acodm_save_policy and (last or save):
                    assert self.mixer is not None  # acodm_config sees to it
                    save_learned_policy(self.mixer, args.acodm_save_policy, args, self.iteration)
                if last:
                    break
            records.flush()
            self._explain_early_end()
        except BaseException:
            ignore_sigterm()  # before the rest takes time
            raise
        finally:
            unpatch()
            if records is not None:
                records.close()
        if self._exit_signal is not None:
            self._exit_signal.close()

    @property
    def consumed_samples(self) -> int:
        """Sequences of the steps so far."""
        return self.run.samples_before(self.iteration)

    def _samples_to_come(self) -> int:
        """Sequences of the next step; 0 when the run, or its data, is at its end."""
        if self.iteration >= self.args.train_iters:
            return 0
        if self.mixer is None:
            return self.run.batch_size(self.consumed_samples)
        return self.mixer.num_samples(self.consumed_samples)

    def _explain_early_end(self) -> None:
        """Say why training ended before its last step, if for want of data.

        Raises:
            DataExhausted: when the user wants that to be an error.
        """
        if self.mixer is None or self._samples_to_come() or self.mixer.exhausted is None:
            return
        if self.iteration >= self.args.train_iters:
            return
        reason = f"training ended after step {self.iteration}: {self.mixer.exhausted}"
        kept = f"saved in {self.args.save}" if self.args.save else "nothing is saved without --save"
        if self.mixer.config.blending.repetition == "error":
            raise DataExhausted(f"{reason} ({kept})")
        log(f"{reason} ({kept})")

    def _step(self, iterator: Any, records: Recorder) -> None:
        start = time.perf_counter()
        self.seconds = {"data_s": 0.0}
        consumed, count = self.consumed_samples, self._samples_to_come()
        self.iteration += 1
        mixing = None
        if self.mixer is None:
            loss, grad_norm = self._update(iterator, count, None)
        else:
            domains = self.mixer.micro_batch_domains(consumed).tolist()
            with self.mixer.step(self.iteration, consumed) as mixing:
                loss, grad_norm = self._update(iterator, count, domains)
        records.step(
            FinishedStep(
                self.iteration,
                count,
                loss,
                grad_norm,
                self.model.optimizer.param_groups[0]["lr"],
                time.perf_counter() - start,
                self.seconds,
                mixing,
            )
        )

    def _update(
        self, iterator: Any, count: int, domains: list[list[int]] | None
    ) -> tuple[float, float]:
        model = self.model
        for chunk in model.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        model.optimizer.zero_grad()
        start = time.perf_counter()
        micro_batches = count // (self.args.micro_batch_size * self.data_size)
        reports = self._forward_backward(iterator, micro_batches, domains)
        self.seconds["forward_backward_s"] = time.perf_counter() - start
        start = time.perf_counter()
        succeeded, grad_norm, _ = model.optimizer.step()
        if succeeded:
            model.scheduler.step(increment=count)
        else:
            log(
                f"step {self.iteration}: the gradient norm is {grad_norm}; the update was skipped "
                "and the weights left as they were"
            )
        if model.averages is not None:
            model.averages.update(self.iteration)
        self.seconds["optimizer_s"] = time.perf_counter() - start
        loss = self._mean_loss(reports) if domains is None else float("nan")
        return loss, float(grad_norm or 0.0)

    def _forward_backward(
        self,
        iterator: Any,
        num_microbatches: int,
        domains: list[list[int]] | None,
    ) -> list[dict[str, torch.Tensor]]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        expected = iter(domains or ())
        by_sequence = self.mixer is not None and self.mixer.config.blending.granule == "sequence"

        def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            start = time.perf_counter()
            args = self.args
            batch = get_batch(
                data_iterator, args.micro_batch_size, args.seq_length, next(expected, None)
            )
            self.seconds["data_s"] = self.seconds.get("data_s", 0.0) + time.perf_counter() - start
            return forward(model, batch, by_sequence)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterator,
            model=self.model.chunks,
            num_microbatches=num_microbatches,
            seq_length=self.args.seq_length,
            micro_batch_size=self.args.micro_batch_size,
            forward_only=False,
        )

    def _mean_loss(self, reports: list[dict[str, torch.Tensor]]) -> float:
        sums = sum_over_ranks(reports, [0] * len(reports), 1)[0]
        return float(sums[0] / sums[1])

    # Validation -------------------------------------------------------------------------------

    def _validate(self, records: Recorder) -> None:
        """Mean loss of every domain's validation text, all in one pass; collective."""
        args = self.args
        if not any(self.valid_data.sizes):
            return
        records.flush()
        start = time.perf_counter()
        averages = self.model.averages
        with averages.in_place() if averages else contextlib.nullcontext():
            sums = validation_sums(
                self.model.chunks,
                self.valid_data,
                micro_batch_size=args.micro_batch_size,
                seq_length=args.seq_length,
                max_sequences=args.eval_iters * args.global_batch_size,
            )
        losses = {name: loss / tokens for name, (loss, tokens) in sums.items()}
        records.validation(self.iteration, losses, time.perf_counter() - start)

    # What is kept -----------------------------------------------------------------------------

    def _save(self) -> None:
        start = time.perf_counter()
        folder = save_checkpoint(
            self.args.save, self.iteration, self.model, self.mixer, self._fingerprint()
        )
        log(f"saved {folder} in {time.perf_counter() - start:.1f} s")


def _due(interval: int | None, iteration: int) -> bool:
    return bool(interval) and iteration % (interval or 1) == 0
