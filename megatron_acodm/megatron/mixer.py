"""The mixer: one object that takes a training run's steps from measurement to next mixture."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_acodm.blending import DataExhausted, Ledger, OnlineBlendedDataset
from megatron_acodm.config import AcodmConfig
from megatron_acodm.megatron.builder import domain_name
from megatron_acodm.megatron.capture import build_capture
from megatron_acodm.megatron.groups import ParallelGroups, check_layout
from megatron_acodm.megatron.measurement import StepMeasurement, StepStatistics
from megatron_acodm.megatron.parameters import make_probes, select_parameters
from megatron_acodm.megatron.quota import granule_size, minimum_quota, warn_of_small_domains
from megatron_acodm.megatron.run import RunShape
from megatron_acodm.mixing import POLICIES, MixingController, Observation, Policy, build_policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """What a finished step tells the metrics; K domains."""

    statistics: StepStatistics
    weights: np.ndarray  # [K] that drew this step's batch
    samples: np.ndarray  # [K] sequences in this step's batch
    epochs: np.ndarray  # [K] how often each domain has been gone through, this batch included
    rewards: np.ndarray | None  # [K], nan where unknown; only on rank 0
    diagnostics: dict[str, float]  # of the policy; only on rank 0
    mixing_seconds: float  # that this rank waited for mixing in this step


class Mixer:
    """Drives one run: ``bind`` (by the patched builder), ``attach``, then a ``step`` a step.

    Every rank holds the ledger; rank 0 alone holds the policy and broadcasts its decisions.
    """

    def __init__(self, config: AcodmConfig, run: RunShape, domain_names: Mapping[str, str]) -> None:
        self.config = config
        self.run = run
        self.measurement: StepMeasurement | None = None
        self.domains: list[str] = []
        self.sizes: list[int] = []
        self._domain_names = dict(domain_names)
        self._controller: MixingController | None = None
        self._report: StepReport | None = None
        self.exhausted: DataExhausted | None = None
        """Why no more than the decided samples can be drawn, once that is so."""

    # Set-up -----------------------------------------------------------------------------------

    @property
    def is_bound(self) -> bool:
        """Whether the training datasets are built."""
        return bool(self.domains)

    @property
    def report(self) -> StepReport:
        """The last finished step."""
        if self._report is None:
            raise RuntimeError("no step has finished yet")
        return self._report

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
        self.domains, self.sizes, self._checksums = list(domains), list(sizes), list(checksums)
        blending, policy_class = self.config.blending, POLICIES[self.config.mixing.policy]
        self._needs_alignment = policy_class.needs_alignment
        self._granule_size = granule_size(
            blending, self.config.alignment, self.run, self._needs_alignment
        )
        self._minimum = minimum_quota(
            blending,
            len(self.domains),
            self.run.global_batch_size // self._granule_size,
            self._needs_alignment,
        )
        # Every rank builds the policy, so that bad settings fail on every rank alike; only rank 0
        # keeps it.
        controller = MixingController(self._build_policy(weights))
        self._controller = controller if _rank() == 0 else None
        self.ledger = Ledger(
            self.sizes,
            self._granule_size,
            self.run.seed,
            names=self.domains,
            max_epochs=blending.max_epochs,
            stop_at_cap=blending.repetition == "error",
        )
        self._append_ahead(0, controller.initial_weights)
        if self.ledger.num_samples == 0:
            raise ValueError(
                f"there is not enough data for the first step: {self.exhausted}; lower the "
                "batch size, or change blending.repetition"
            )
        warn_of_small_domains(self.ledger, blending)
        if any(dataset is None for dataset in datasets):
            return None
        return OnlineBlendedDataset(
            list(datasets),
            self.ledger.reader(self.config.blending.stage_timeout_s),
            size=self.run.train_samples,
            names=self.domains,
        )

    def _build_policy(self, weights: Sequence[float] | None) -> Policy:
        return build_policy(
            self.config.mixing,
            self.domains,
            np.asarray(self.sizes if weights is None else weights, dtype=np.float64),
            self.config.alignment.num_probes,
            self.run.train_iters,
            self.run.seed,
            lowest_share=self._minimum * self._granule_size / self.run.global_batch_size,
        )

    def attach(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        """Hook the model; collective, after the model is wrapped in Megatron's DDP.

        Raises:
            ValueError: for a layout or layer type that cannot be measured, or batch sizes that
                do not divide over the data-parallel ranks.
        """
        from megatron.core.utils import get_model_config

        if not self.is_bound:
            raise RuntimeError(
                "no training dataset was built under the mixer; patch before the datasets are "
                "built, and train on --data-path or --train-data-path"
            )
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
        alignment = self.config.alignment
        parameters = (
            select_parameters(model_chunks, num_layers, alignment) if self._needs_alignment else []
        )
        num_domains = len(self.domains)
        self.measurement = StepMeasurement(
            build_capture(
                alignment,
                model_chunks,
                parameters,
                num_domains,
                StepMeasurement.NUM_EXTRA * num_domains,
                device,
            ),
            make_probes(model_chunks, num_layers, alignment),
            alignment.num_probes,
            num_domains,
            self._needs_alignment,
            self._groups,
            device,
        )

    def detach(self) -> None:
        """Remove the hooks from the model and let waiting data-loading workers go."""
        if self.measurement is not None:
            self.measurement.detach()
            self.measurement = None
        if self.is_bound:
            self.ledger.close()

    # A step -----------------------------------------------------------------------------------

    def num_samples(self, consumed_samples: int) -> int:
        """Sequences of the step that starts at this sample; 0 when nothing is left to draw.

        Raises:
            RuntimeError: when no step of the ledger starts there.
        """
        if consumed_samples == self.ledger.num_samples and self.exhausted is not None:
            return 0
        first, count = self.ledger.stage_at(consumed_samples)
        if first != consumed_samples:
            raise RuntimeError(
                f"a step starts at sample {consumed_samples}, the ledger's at {first} and "
                f"{first + count}; give the mixer the batch sizes (and the ramp-up) of the host"
            )
        return count

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
        return self.ledger.locate(mine.reshape(-1))[0].reshape(-1, size)

    @contextlib.contextmanager
    def step(self, iteration: int, consumed_samples: int) -> Iterator[None]:
        """One training step, from zeroed gradients to the optimizer's update; collective.

        Args:
            iteration: number of the step, counted from 1.
            consumed_samples: samples drawn before it.
        """
        if self.measurement is None:
            raise RuntimeError("the mixer is not attached to a model; call mixer.attach(model)")
        if self.num_samples(consumed_samples) == 0:
            raise RuntimeError(f"step {iteration} has no samples left: {self.exhausted}")
        start = time.perf_counter()
        config = self._model_config
        finalize = config.finalize_model_grads_func
        config.finalize_model_grads_func = self.measurement.around_finalize(finalize)
        scale = config.grad_scale_func
        self.measurement.begin(
            self.micro_batch_domains(consumed_samples),
            self._one if scale is None else scale(self._one),
            bool(config.calculate_per_token_loss),
        )
        seconds = time.perf_counter() - start
        try:
            yield
        finally:
            config.finalize_model_grads_func = finalize
        self._finish(iteration, consumed_samples, seconds)

    def _finish(self, iteration: int, consumed_samples: int, seconds: float) -> None:
        assert self.measurement is not None
        start = time.perf_counter()
        weights = self.ledger.weights_at(consumed_samples)
        count = self.num_samples(consumed_samples)
        samples = self.ledger.counts(consumed_samples, count)
        measured_before = self.measurement.seconds
        statistics = self.measurement.finish()
        decision = np.zeros(len(self.domains))
        rewards, diagnostics = None, {}
        if self._controller is not None:
            observation = Observation(
                iteration=iteration,
                progress=min(1.0, iteration / self.run.train_iters),
                weights=weights,
                samples=samples,
                available=self.ledger.drawable(),
                loss=statistics.loss,
                alignment=statistics.alignment,
                grad_sq_norm=statistics.grad_sq_norm,
                weight_norm=statistics.weight_norm,
                weight_delta_norm=statistics.weight_delta_norm,
            )
            decision = self._controller.decide(observation)
            rewards, diagnostics = self._controller.rewards, self._controller.diagnostics()
        self._append_ahead(consumed_samples + count, self._agree_on(decision))
        seconds += time.perf_counter() - start + measured_before
        self._report = StepReport(
            statistics,
            weights,
            samples,
            self.ledger.epochs(before=consumed_samples + count),
            rewards,
            diagnostics,
            seconds,
        )

    def _append_ahead(self, consumed_samples: int, weights: np.ndarray) -> None:
        """Decide all steps up to the lag behind the one that starts here, where they are not.

        Other weights may be possible where the last ones were not: each call tries anew, as the
        first one of a resumed run does.
        """
        self.exhausted = None
        end = consumed_samples
        for _ in range(1 + self.config.blending.decision_lag):
            end += self.run.batch_size(end)
        while self.ledger.num_samples < end and self.exhausted is None:
            count = self.run.batch_size(self.ledger.num_samples)
            fits = self._minimum * len(self.domains) * self._granule_size <= count
            try:
                self.ledger.append(weights, count, minimum=self._minimum if fits else 0)
            except DataExhausted as error:
                self.exhausted = error

    def _agree_on(self, decision: np.ndarray) -> np.ndarray:
        """Rank 0's decision, on every rank; also checks that the ledgers are still the same."""
        message = torch.from_numpy(np.append(decision, float(self.ledger.digest)))
        dist.broadcast(message, src=0, group=self._groups.control)
        if int(message[-1]) != self.ledger.digest:
            raise RuntimeError(
                f"the ledger of rank {_rank()} differs from rank 0's (digest "
                f"{self.ledger.digest}, rank 0 has {int(message[-1])}); ranks would train on "
                "wrong domains. Resume from the last checkpoint"
            )
        return message[:-1].numpy()

    # Checkpoint -------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a resumed run to draw the same samples."""
        fingerprint = {
            "domains": {
                name: {"sequences": size, "checksum": checksum}
                for name, size, checksum in zip(
                    self.domains, self.sizes, self._checksums, strict=True
                )
            },
            "policy": self.config.mixing.policy,
            "mixing.weights": self.config.mixing.weights,
            # Rewards of other gradients must not be averaged with the saved ones.
            "alignment": asdict(self.config.alignment),
            "decision lag": self.config.blending.decision_lag,
            "granule": self.config.blending.granule,
            "minimum quota": self.config.blending.minimum_quota,
            **{
                name.replace("_", " "): value
                for name, value in asdict(self.run).items()
                if name != "train_iters"  # a run may be extended
            },
        }
        return json.loads(json.dumps(fingerprint))  # as it will be read back

    def continue_from(self, consumed_samples: int) -> None:
        """Decide what is not decided yet after ledger and policy were restored; collective.

        That is nothing, unless the run was saved when its data was used up, or has other data now.
        """
        weights = np.zeros(len(self.domains))
        if self._controller is not None:
            weights = self._controller.weights_to_resume_with()
        self._append_ahead(consumed_samples, self._agree_on(weights))

    @property
    def control_group(self) -> dist.ProcessGroup:
        """All ranks, over gloo."""
        return self._groups.control

    @property
    def controller(self) -> MixingController | None:
        """The policy behind its guard rails; only on rank 0."""
        return self._controller


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
