"""The mixer: one object that takes a training run's steps from measurement to next mixture."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_acodm.alignment import AverageGradients
from megatron_acodm.blending import DataExhausted, Ledger, OnlineBlendedDataset
from megatron_acodm.config import AcodmConfig
from megatron_acodm.megatron.background import Background
from megatron_acodm.megatron.builder import domain_name
from megatron_acodm.megatron.capture import build_capture
from megatron_acodm.megatron.decisions import Decisions, StepReport
from megatron_acodm.megatron.groups import (
    ParallelGroups,
    abandon_control_group,
    check_layout,
)
from megatron_acodm.megatron.measurement import StepMeasurement
from megatron_acodm.megatron.parameters import gathers_late, make_probes, select_parameters
from megatron_acodm.megatron.run import RunShape
from megatron_acodm.mixing import MixingController


class Step:
    """A training step in the hands of the mixer."""

    def __init__(self) -> None:
        self.mixing_seconds = 0.0
        """What this rank waited for mixing in the step, once that is over."""

        self._future: Future[StepReport] | None = None

    @property
    def is_decided(self) -> bool:
        """Whether ``report`` would not have to wait."""
        return self._future is not None and self._future.done()

    def report(self) -> StepReport:
        """What the step showed; waits until the decision that follows from it is made.

        Raises:
            RuntimeError: the step is not over, or ranks do not agree on its decision.
        """
        if self._future is None:
            raise RuntimeError("the step is not over")
        return self._future.result()


class Mixer:
    """Drives one run: ``bind`` (by the patched builder), ``attach``, then a ``step`` a step.

    Every rank holds the ledger; rank 0 alone holds the policy and broadcasts its decisions.

    What follows from a step (sums, the policy's update, the broadcast, the ledger's next stage)
    happens in a thread while the next step runs, and is waited for at that step's end; with a
    decision lag of 0, at once. Which samples are drawn does not depend on how long it takes. Who
    asks for the ledger or the policy from outside a step gets them with all of that done.
    """

    def __init__(self, config: AcodmConfig, run: RunShape, domain_names: Mapping[str, str]) -> None:
        self.config = config
        self.run = run
        self.measurement: StepMeasurement | None = None
        self._decisions: Decisions | None = None
        self._domain_names = dict(domain_names)
        self._background: Background | None = None
        self._pending: Future[StepReport] | None = None
        self._has_begun = False
        self.training_prefixes: list[str] = []
        """Of the training data, in the order of the domains, once that is built."""

    # Set-up -----------------------------------------------------------------------------------

    @property
    def is_bound(self) -> bool:
        """Whether the training datasets are built."""
        return self._decisions is not None

    @property
    def decisions(self) -> Decisions:
        """What is decided so far, and how it goes on.

        Raises:
            RuntimeError: the training datasets are not built.
        """
        if self._decisions is None:
            raise RuntimeError(
                "no training dataset was built under the mixer; patch before the datasets are "
                "built, and train on --data-path or --train-data-path"
            )
        return self._decisions

    @property
    def domains(self) -> list[str]:
        """Names of the K domains, in the order that every array of the run follows."""
        return self.decisions.domains

    def wants(self, prefixes: Sequence[str]) -> bool:
        """Whether a builder of this training data builds the run's.

        The first one does, and until the first step those of the same data: under virtual
        pipeline parallelism hosts build once a model chunk.
        """
        if not self.is_bound:
            return True
        return not self._has_begun and list(prefixes) == self.training_prefixes

    def name_of_prefix(self, prefix: str) -> str:
        """The domain that a dataset prefix stands for."""
        return self._domain_names.get(prefix) or domain_name(prefix)

    def bind(
        self,
        domains: Sequence[str],
        sizes: Sequence[int],
        weights: Sequence[float] | None,
        datasets: Sequence[Any],
        checksums: Sequence[int],
    ) -> OnlineBlendedDataset | None:
        """Take the domains of the run; called by the patched builder on every rank.

        Args:
            domains: names of the K domains, in the order that every array of the run follows.
            sizes: sequences an epoch of each.
            weights: the host's own blend weights, which then stand for the natural ones, or None.
            datasets: one-epoch datasets; None entries on ranks that read no data.
            checksums: of each domain's data, to know it by when the run is resumed.

        Returns:
            The training dataset, or None on ranks that read no data.

        Raises:
            ValueError: for domains, settings and data that do not fit together.
        """
        if len(set(domains)) != len(domains):
            raise ValueError(f"domain names must differ, got {', '.join(domains)}")
        self._decisions = Decisions(self.config, self.run, domains, sizes, weights, checksums)
        return self.online_dataset(datasets)

    def online_dataset(self, datasets: Sequence[Any]) -> OnlineBlendedDataset | None:
        """The training dataset over the domains' data; None on ranks that read no data."""
        if any(dataset is None for dataset in datasets):
            return None
        return OnlineBlendedDataset(
            list(datasets),
            self.decisions.ledger.reader(self.config.blending.stage_timeout_s),
            size=self.run.train_samples,
            names=self.domains,
        )

    def attach(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        """Hook the model; collective, after the model is wrapped in Megatron's DDP.

        Raises:
            ValueError: for a layout or layer type that cannot be measured, or batch sizes that
                do not divide over the data-parallel ranks.
        """
        from megatron.core.utils import get_model_config

        decisions = self.decisions
        if self.measurement is not None:
            raise RuntimeError("the mixer is attached to a model already; detach it first")
        check_layout(model_chunks)
        self._groups = ParallelGroups.from_parallel_state()
        self._model_config = get_model_config(model_chunks[0])
        self.run.check_divisible(
            self.run.micro_batch_size * self._groups.data_size,
            f"micro-batch size x data-parallel size = {self.run.micro_batch_size} x "
            f"{self._groups.data_size}",
        )
        num_layers = self._model_config.num_layers
        device = next(model_chunks[0].parameters()).device
        self._one = torch.ones(1, device=device)
        alignment, needs_alignment = self.config.alignment, decisions.needs_alignment
        parameters = (
            select_parameters(model_chunks, num_layers, alignment) if needs_alignment else []
        )
        num_domains = len(decisions.domains)
        capture = build_capture(
            alignment,
            model_chunks,
            parameters,
            num_domains,
            StepMeasurement.NUM_EXTRA * num_domains,
            device,
        )
        averages = None
        if decisions.needs_affinity:
            row_length = capture.estimator.rows.shape[1]
            averages = AverageGradients(num_domains, row_length, alignment.smoothing, device)
        needs_probes = decisions.needs_probes
        self.measurement = StepMeasurement(
            capture,
            make_probes(model_chunks, num_layers, alignment) if needs_probes else [],
            needs_probes and gathers_late(model_chunks),
            alignment.num_probes if needs_probes else 0,
            num_domains,
            needs_alignment,
            averages,
            alignment.gram_interval,
            self._groups,
            device,
        )
        control = self._groups.control
        self._background = Background(device, lambda: abandon_control_group(control))

    def detach(self) -> None:
        """Remove the hooks from the model; ``attach`` can hook it again."""
        if self.measurement is not None:
            self.measurement.detach()
            self.measurement = None
        if self._background is not None:
            self._background.stop()
            self._background = None

    def close(self) -> None:
        """End the run: no hooks, and data-loading workers that wait for a stage are let go."""
        self.detach()
        if self._decisions is not None:
            self._decisions.ledger.close()

    # A step -----------------------------------------------------------------------------------

    def num_samples(self, consumed_samples: int) -> int:
        """Sequences of the step that starts at this sample; 0 when nothing is left to draw.

        Raises:
            RuntimeError: when no step of the ledger starts there.
        """
        if not self.decisions.is_decided(consumed_samples):
            self._settle()
        return self.decisions.num_samples(consumed_samples)

    def micro_batch_domains(self, consumed_samples: int) -> np.ndarray:
        """Domain of each sequence of this rank's micro-batches in the step that starts here.

        Megatron's sampler deals micro-batches of consecutive samples to the data-parallel ranks
        in turn: no message is needed.

        Returns:
            ``[micro-batches, micro-batch size]`` int32.
        """
        size, groups = self.run.micro_batch_size, self._groups
        count = self.num_samples(consumed_samples)
        samples = np.arange(consumed_samples, consumed_samples + count, dtype=np.int64)
        mine = samples.reshape(-1, groups.data_size, size)[:, groups.data_rank]
        return self.decisions.domains_of(mine.reshape(-1)).reshape(-1, size)

    @contextlib.contextmanager
    def step(self, iteration: int, consumed_samples: int) -> Iterator[Step]:
        """One training step, from zeroed gradients to the optimizer's update; collective.

        Args:
            iteration: number of the step, counted from 1.
            consumed_samples: samples drawn before it.

        Yields:
            The step, whose report can be asked for when it is over.
        """
        if self.measurement is None:
            raise RuntimeError("the mixer is not attached to a model; call mixer.attach(model)")
        if self.num_samples(consumed_samples) == 0:
            raise RuntimeError(f"step {iteration} has no samples left: {self.exhausted}")
        self._has_begun = True
        step = Step()
        start = time.perf_counter()
        config = self._model_config
        finalize = config.finalize_model_grads_func
        config.finalize_model_grads_func = self.measurement.around_finalize(finalize)
        scale = config.grad_scale_func
        self.measurement.begin(
            iteration,
            self.micro_batch_domains(consumed_samples),
            self.decisions.samples_of_step(consumed_samples),
            self._one if scale is None else scale(self._one),
            bool(config.calculate_per_token_loss),
        )
        step.mixing_seconds = time.perf_counter() - start
        try:
            yield step
        except BaseException:
            self.measurement.abandon()
            raise
        finally:
            config.finalize_model_grads_func = finalize
        start = time.perf_counter()
        step.mixing_seconds += self.measurement.seconds
        self._finish(step, iteration, consumed_samples)
        step.mixing_seconds += time.perf_counter() - start

    def skip_step(self, consumed_samples: int) -> None:
        """Pass over the step that starts here: its samples count as drawn; collective."""
        self._has_begun = True
        count = self.num_samples(consumed_samples)
        self._settle()
        self.continue_from(consumed_samples + count)

    def _finish(self, step: Step, iteration: int, consumed_samples: int) -> None:
        assert self.measurement is not None and self._background is not None
        fetch = self.measurement.finish()
        step._future = self._pending  # if that failed, so has this step
        self._settle()
        step._future = self._pending = self._background.submit(
            lambda: self.decisions.follow_up(
                iteration, consumed_samples, fetch(), self._groups.control
            )
        )
        if self.config.blending.decision_lag == 0:
            self._settle()

    def _settle(self) -> None:
        """Wait for what follows from the last step.

        Raises:
            RuntimeError: ranks do not agree on its decision.
        """
        if self._pending is not None:
            self._pending.result()

    # From outside a step ----------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """Which domain, and which sequence of it, every sample of the run is."""
        self._settle()
        return self.decisions.ledger

    @property
    def controller(self) -> MixingController | None:
        """The policy behind its guard rails; only on rank 0."""
        self._settle()
        return self.decisions.controller

    @property
    def exhausted(self) -> DataExhausted | None:
        """Why no more than the decided samples can be drawn, once that is so."""
        self._settle()
        return self.decisions.exhausted

    @property
    def averages(self) -> AverageGradients | None:
        """This rank's part of the averages that gradients are compared with, if they are."""
        return self.measurement.averages if self.measurement is not None else None

    @property
    def measured_parameters(self) -> list[str]:
        """Names of the parameters whose gradients this rank compares."""
        return list(self.measurement.parameters) if self.measurement is not None else []

    @property
    def model_parallel_sizes(self) -> list[int]:
        """Tensor, pipeline and virtual pipeline sizes."""
        return list(self._groups.model_sizes)

    @property
    def model_rank(self) -> int:
        """This rank's place among those that hold different parts of the model."""
        return dist.get_rank(self._groups.model)

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank is of the first of the data-parallel replicas."""
        return dist.get_rank(self._groups.data) == 0

    @property
    def control_group(self) -> dist.ProcessGroup:
        """All ranks, over gloo."""
        self._settle()
        return self._groups.control

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a resumed run to draw the same samples."""
        return self.decisions.fingerprint()

    def continue_from(self, consumed_samples: int) -> None:
        """Decide what is not decided yet after ledger and policy were restored; collective."""
        self.decisions.continue_from(consumed_samples, self._groups.control)
