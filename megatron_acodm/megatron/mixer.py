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

from megatron_acodm.blending import Ledger, OnlineBlendedDataset
from megatron_acodm.config import AcodmConfig
from megatron_acodm.megatron.builder import domain_name
from megatron_acodm.megatron.groups import ParallelGroups, check_layout
from megatron_acodm.megatron.measurement import StepMeasurement, StepStatistics
from megatron_acodm.megatron.parameters import make_probes, select_parameters
from megatron_acodm.mixing import MixingController, Observation, build_policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunShape:
    """Sizes of a run that fix its data order and the state's progress."""

    train_iters: int
    global_batch_size: int  # sequences a step
    micro_batch_size: int  # sequences a micro-batch
    seed: int = 1234

    def __post_init__(self) -> None:
        for name in ("train_iters", "global_batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.global_batch_size % self.micro_batch_size != 0:
            raise ValueError(
                f"global batch size {self.global_batch_size} is not a multiple of the micro-batch "
                f"size {self.micro_batch_size}; change one of them"
            )


@dataclass(frozen=True)
class StepReport:
    """What a finished step tells the metrics; K domains."""

    statistics: StepStatistics
    weights: np.ndarray  # [K] that drew this step's batch
    samples: np.ndarray  # [K] sequences in this step's batch
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
    ) -> OnlineBlendedDataset | None:
        """Take the domains of the run; called by the patched builder on every rank.

        Args:
            domains: names of the K domains, in the order that every array of the run follows.
            sizes: sequences an epoch of each.
            weights: the host's own blend weights, which then stand for the natural ones, or None.
            datasets: one-epoch datasets; None entries on ranks that read no data.

        Returns:
            The training dataset, or None on ranks that read no data.
        """
        if len(set(domains)) != len(domains):
            raise ValueError(f"domain names must differ, got {', '.join(domains)}")
        natural = np.asarray(sizes if weights is None else weights, dtype=np.float64)
        # Every rank builds the policy, so that bad settings fail on every rank alike; only rank 0
        # keeps it.
        policy = build_policy(
            self.config.mixing,
            list(domains),
            natural,
            self.config.alignment.num_probes,
            self.run.train_iters,
            self.run.seed,
        )
        controller = MixingController(policy)
        self.domains, self.sizes = list(domains), list(sizes)
        self._needs_alignment = controller.needs_alignment
        self._controller = controller if _rank() == 0 else None
        self.ledger = Ledger(
            self.sizes, self.run.micro_batch_size, self.run.seed, names=self.domains
        )
        for _ in range(1 + self.config.blending.decision_lag):
            self.ledger.append(controller.initial_weights, self.run.global_batch_size)
        if any(dataset is None for dataset in datasets):
            return None
        return OnlineBlendedDataset(
            list(datasets),
            self.ledger.reader(self.config.blending.stage_timeout_s),
            size=self.run.train_iters * self.run.global_batch_size,
            names=self.domains,
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
        per_step = self.run.micro_batch_size * self._groups.data_size
        if self.run.global_batch_size % per_step != 0:
            raise ValueError(
                f"global batch size {self.run.global_batch_size} is not a multiple of micro-batch "
                f"size x data-parallel size = {self.run.micro_batch_size} x "
                f"{self._groups.data_size} = {per_step}; change one of them"
            )
        num_layers = self._model_config.num_layers
        device = next(model_chunks[0].parameters()).device
        self._one = torch.ones(1, device=device)
        self.measurement = StepMeasurement(
            self.config.alignment,
            select_parameters(model_chunks, num_layers, self.config.alignment),
            make_probes(model_chunks, num_layers, self.config.alignment),
            len(self.domains),
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

    def micro_batch_domains(self, consumed_samples: int) -> np.ndarray:
        """Domain of each of this rank's micro-batches in the step that starts here.

        Megatron's sampler deals micro-batches of consecutive samples to the data-parallel ranks
        in turn, and a granule of the ledger is one micro-batch: no message is needed.
        """
        run, groups = self.run, self._groups
        first = consumed_samples + groups.data_rank * run.micro_batch_size
        stride = groups.data_size * run.micro_batch_size
        end = consumed_samples + run.global_batch_size
        return self.ledger.locate(np.arange(first, end, stride, dtype=np.int64))[0]

    @contextlib.contextmanager
    def step(self, iteration: int, consumed_samples: int) -> Iterator[None]:
        """One training step, from zeroed gradients to the optimizer's update; collective.

        Args:
            iteration: number of the step, counted from 1.
            consumed_samples: samples drawn before it.
        """
        if self.measurement is None:
            raise RuntimeError("the mixer is not attached to a model; call mixer.attach(model)")
        expected = (iteration - 1) * self.run.global_batch_size
        if consumed_samples != expected:
            raise RuntimeError(
                f"step {iteration} starts at sample {consumed_samples}, the ledger expects "
                f"{expected}; a changing batch size is not supported with an online policy"
            )
        start = time.perf_counter()
        config = self._model_config
        finalize = config.finalize_model_grads_func
        config.finalize_model_grads_func = self.measurement.around_finalize(finalize)
        scale = config.grad_scale_func
        self.measurement.begin(
            self.micro_batch_domains(consumed_samples).tolist(),
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
        samples = self.ledger.counts(consumed_samples, self.run.global_batch_size)
        measured_before = self.measurement.seconds
        statistics = self.measurement.finish(samples / samples.sum())
        decision = np.zeros(len(self.domains))
        rewards, diagnostics = None, {}
        if self._controller is not None:
            observation = Observation(
                iteration=iteration,
                progress=min(1.0, iteration / self.run.train_iters),
                weights=weights,
                samples=samples,
                loss=statistics.loss,
                alignment=statistics.alignment,
                grad_sq_norm=statistics.grad_sq_norm,
                weight_norm=statistics.weight_norm,
                weight_delta_norm=statistics.weight_delta_norm,
            )
            decision = self._controller.decide(observation)
            rewards, diagnostics = self._controller.rewards, self._controller.diagnostics()
        self.ledger.append(self._agree_on(decision), self.run.global_batch_size)
        seconds += time.perf_counter() - start + measured_before
        self._report = StepReport(statistics, weights, samples, rewards, diagnostics, seconds)

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
        return {
            "domains": self.domains,
            "sequences per epoch": self.sizes,
            "policy": self.config.mixing.policy,
            "mixing.weights": self.config.mixing.weights,
            # Rewards of other gradients must not be averaged with the saved ones.
            "alignment": json.loads(json.dumps(asdict(self.config.alignment))),
            "decision lag": self.config.blending.decision_lag,
            **{
                name.replace("_", " "): value
                for name, value in asdict(self.run).items()
                if name != "train_iters"  # a run may be extended
            },
        }

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
