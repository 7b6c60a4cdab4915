"""Measures each domain's loss and gradient in one training step, whatever the parallel layout."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_acodm.alignment import build_estimator, mean_gradient_scores
from megatron_acodm.config import AlignmentConfig
from megatron_acodm.megatron.groups import ParallelGroups
from megatron_acodm.megatron.parameters import SelectedParameter, WeightProbe

SEQUENCE_LOSSES = "sequence lm losses"
"""Entry of a loss report that tells a micro-batch's sequences apart."""


@dataclass(frozen=True)
class StepStatistics:
    """What one step showed, the same on every rank; K domains, D probes."""

    loss: np.ndarray  # [K] mean token loss, nan where no token was seen
    tokens: np.ndarray  # [K] tokens that counted in the loss
    alignment: np.ndarray | None  # [K] w_i, nan where the domain was not drawn
    grad_sq_norm: np.ndarray | None  # [K]
    weight_norm: np.ndarray  # [D] root mean square of the probed weights
    weight_delta_norm: np.ndarray  # [D] root mean square of their change in this step

    @property
    def mean_loss(self) -> float:
        """Mean loss over all tokens of the step."""
        seen = self.tokens > 0
        return (
            float(np.average(self.loss[seen], weights=self.tokens[seen])) if seen.any() else np.nan
        )


class StepMeasurement:
    """Attributes gradients and losses of the micro-batches of a step to their domains.

    A tensor hook on each selected parameter receives the micro-batch's gradient before the host
    adds it to ``main_grad``. A parameter's k-th hook call of a step belongs to the k-th
    micro-batch of its model chunk: pipeline schedules run a chunk's backward passes in order.
    That holds with activation recompute (the hook fires once, when the gradient is complete) and
    with ``overlap_grad_reduce`` (reduction starts after the hook). Where the host fuses the
    accumulation into the backward GEMM, the hook reads the growth of ``main_grad`` instead.
    """

    def __init__(
        self,
        config: AlignmentConfig,
        parameters: Sequence[SelectedParameter],
        probes: Sequence[WeightProbe],
        num_domains: int,
        measure_gradients: bool,
        groups: ParallelGroups,
        device: torch.device,
    ) -> None:
        self._num_domains = num_domains
        self._num_probes = config.num_probes
        self._measure_gradients = measure_gradients
        self._parameters = list(parameters) if measure_gradients else []
        self._probes = probes
        self._groups = groups
        self._device = device
        self.estimator = build_estimator(
            config,
            [selected.parameter.numel() for selected in self._parameters],
            num_domains,
            num_extra=2 * num_domains,  # loss sums and token counts travel along
            device=device,
        )
        self._handles = [
            selected.parameter.register_hook(functools.partial(self._on_gradient, index))
            for index, selected in enumerate(self._parameters)
        ]
        self._active = False
        self.seconds = 0.0

    @property
    def reduced_bytes(self) -> int:
        """Bytes that this rank puts into the two reductions of a step."""
        vector = 4 * self._num_domains + 3 * self._num_probes + 1
        return self.estimator.packed_bytes + 8 * vector

    def begin(self, domains: np.ndarray, grad_scale: torch.Tensor, per_token: bool) -> None:
        """Start a step whose micro-batches on this rank are of the given domains, in order.

        Args:
            domains: ``[micro-batches, micro-batch size]`` domain of each sequence; where gradients
                are measured, a micro-batch is of one domain.
            grad_scale: factor that the host multiplies losses with before the backward pass.
            per_token: whether the host sums token losses (``calculate_per_token_loss``).
        """
        self.seconds = 0.0
        self._num_micro_batches = len(domains)
        is_pure = (domains == domains[:, :1]).all()
        self._domains: list[int] | None = domains[:, 0].tolist() if is_pure else None
        self._sequence_domains = None
        if not is_pure:
            self._sequence_domains = torch.from_numpy(domains).long().to(self._device)
        self._grad_scale = grad_scale
        self._per_token = per_token
        self._reset()
        self._active = True

    def _reset(self) -> None:
        self._calls = [0] * len(self._parameters)
        self._forwards = 0
        self._reduced = False
        self.estimator.begin_step()

    def _on_gradient(self, index: int, grad: torch.Tensor) -> None:
        if not self._active:
            return
        start = time.perf_counter()
        if self._reduced:  # the host runs the step again (its rerun state machine)
            self._reset()
        micro_batch = self._calls[index]
        self._calls[index] += 1
        assert self._domains is not None  # the mixer allows no other granule with gradients
        if micro_batch < self._num_micro_batches:
            domain = self._domains[micro_batch]
            parameter = self._parameters[index].parameter
            if getattr(parameter, "grad_added_to_main_grad", False):
                self.estimator.add_growth(index, domain, parameter.main_grad)
            else:
                self.estimator.add_gradient(index, domain, grad)
        self.seconds += time.perf_counter() - start

    def on_forward(self, forward_data_store: Sequence[Any], num_microbatches: int) -> None:
        """Take the loss that the host has just stored for a micro-batch, if this rank has it."""
        report = forward_data_store[-1] if forward_data_store else None
        # Taken out, as Megatron-LM averages every entry that it finds.
        sequences = report.pop(SEQUENCE_LOSSES, None) if isinstance(report, dict) else None
        if not self._active:
            return
        start = time.perf_counter()
        if num_microbatches != self._num_micro_batches:
            raise RuntimeError(
                f"the host runs {num_microbatches} micro-batches a step on this rank, "
                f"{self._num_micro_batches} were planned; give the mixer the host's batch sizes"
            )
        if len(forward_data_store) == 1 and self._forwards > 0:
            self._reset()  # the host runs the step again
        if len(forward_data_store) > self._forwards:
            self._forwards = len(forward_data_store)
            if self._groups.owns_loss:
                self._add_losses(report, sequences, self._forwards - 1)
        self.seconds += time.perf_counter() - start

    def _add_losses(self, report: Any, sequences: torch.Tensor | None, micro_batch: int) -> None:
        loss_sums, tokens = self.estimator.extra.view(2, self._num_domains)
        if self._domains is not None:
            loss_sum, count = _loss_and_tokens(report)
            loss_sums[self._domains[micro_batch]] += loss_sum
            tokens[self._domains[micro_batch]] += count
            return
        assert self._sequence_domains is not None
        if sequences is None:
            raise RuntimeError(
                "blending.granule is 'sequence', so losses must be told apart by sequence: let "
                f"the loss function report {SEQUENCE_LOSSES!r} as well, [micro-batch size, 2] "
                "loss sums and token counts, or use the granule 'micro-batch'"
            )
        losses = sequences.detach().to(loss_sums.dtype)
        domains = self._sequence_domains[micro_batch]
        loss_sums.index_add_(0, domains, losses[:, 0])
        tokens.index_add_(0, domains, losses[:, 1])

    def around_finalize(self, finalize: Callable[..., None] | None) -> Callable[..., None]:
        """Wrap the host's ``finalize_model_grads``: our reduction runs while the host's does."""
        host = finalize or (lambda *args, **kwargs: None)

        @functools.wraps(host)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            if not self._active:
                return host(*args, **kwargs)
            start = time.perf_counter()
            self._check_complete()
            work = dist.all_reduce(self.estimator.packed(), group=self._groups.data, async_op=True)
            self.seconds += time.perf_counter() - start
            host(*args, **kwargs)
            start = time.perf_counter()
            work.wait()
            for probe in self._probes:
                probe.before_update()
            self._reduced = True
            self.seconds += time.perf_counter() - start
            return None

        return wrapped

    def _check_complete(self) -> None:
        expected = self._num_micro_batches
        for selected, calls in zip(self._parameters, self._calls, strict=True):
            if calls != expected:
                raise RuntimeError(
                    f"{selected.name} received a gradient in {calls} of {expected} micro-batches; "
                    "select parameters that every micro-batch uses"
                )

    def finish(self, share: np.ndarray) -> StepStatistics:
        """Sum over the model's shards, after the host's optimizer step; collective.

        Args:
            share: ``[K]`` realised share of each domain in the step's batch.
        """
        if not self._reduced:
            raise RuntimeError("the step ended without finalize_model_grads; nothing was measured")
        self._active = False
        start = time.perf_counter()
        vector = self._local_vector()
        dist.all_reduce(vector, group=self._groups.model)
        statistics = self._unpack(vector.cpu().numpy(), share)
        self.seconds += time.perf_counter() - start
        return statistics

    def _local_vector(self) -> torch.Tensor:
        k = self._num_domains
        sums, sq_norms = self.estimator.products()
        losses = self.estimator.extra.double()
        scale = self._grad_scale.double().reshape(1).to(self._device)
        if not self._groups.owns_loss:
            losses, scale = torch.zeros_like(losses), torch.zeros_like(scale)
        probes = torch.zeros(self._num_probes, 3, dtype=torch.float64, device=self._device)
        for probe in self._probes:
            probes[probe.index] = probe.after_update()
        vector = torch.cat([sums, sq_norms, losses, probes.flatten(), scale])
        assert vector.numel() == 4 * k + 3 * self._num_probes + 1
        return vector

    def _unpack(self, vector: np.ndarray, share: np.ndarray) -> StepStatistics:
        k = self._num_domains
        sums, sq_norms, loss_sum, tokens = vector[: 4 * k].reshape(4, k)
        probes = vector[4 * k : -1].reshape(self._num_probes, 3)
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = np.where(tokens > 0, loss_sum / tokens, np.nan)
            norms = np.sqrt(probes[:, :2] / probes[:, 2:])
        alignment = grad_sq_norm = None
        if self._measure_gradients:
            # The host averages over micro-batches and replicas, or sums over tokens.
            if self._per_token:
                share = tokens / max(tokens.sum(), 1.0)
                scale = float(vector[-1]) * max(tokens.sum(), 1.0)
            else:
                scale = float(vector[-1]) * self._groups.data_size
            alignment, grad_sq_norm = mean_gradient_scores(sums, sq_norms, share, scale)
        return StepStatistics(loss, tokens, alignment, grad_sq_norm, norms[:, 0], norms[:, 1])

    def detach(self) -> None:
        """Remove every hook from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _loss_and_tokens(report: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Read the loss report that a host's loss function stores for a micro-batch.

    Megatron-LM stores ``{"lm loss": [loss sum, tokens]}``; older loops store the mean loss alone.
    """
    value = report
    if isinstance(report, dict):
        value = report.get("lm loss", next(iter(report.values())))
    if isinstance(value, (tuple, list)):
        value = torch.stack([torch.as_tensor(part).float() for part in value])
    value = torch.as_tensor(value).detach().float().reshape(-1)
    if value.numel() == 2:
        return value[0], value[1]
    return value[0], 1.0
