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

from megatron_acodm.alignment import (
    AverageGradients,
    mean_gradient_affinity,
    mean_gradient_gram,
    mean_gradient_scores,
)
from megatron_acodm.megatron.capture import Capture
from megatron_acodm.megatron.groups import ParallelGroups
from megatron_acodm.megatron.parameters import WeightProbe

SEQUENCE_LOSSES = "sequence lm losses"
"""Entry of a loss report that tells a micro-batch's sequences apart."""

_PROBE_BYTES = 3 * 8
"""Of what a probe measures: three float64."""


@dataclass(frozen=True)
class StepStatistics:
    """What one step showed, the same on every rank; K domains, D probes (may be 0)."""

    loss: np.ndarray  # [K] mean token loss, nan where no token was seen
    tokens: np.ndarray  # [K] tokens that counted in the loss
    alignment: np.ndarray | None  # [K] w_i, nan where the domain was not drawn
    grad_sq_norm: np.ndarray | None  # [K]
    affinity: np.ndarray | None  # [K, K] <g_i, m_j>, m_j the averages of the steps before
    weight_norm: np.ndarray  # [D] root mean square of the probed weights
    weight_delta_norm: np.ndarray  # [D] root mean square of their change in this step
    gram: np.ndarray | None  # [K, K] products of mean gradients, in the steps that ask for them
    reduced_bytes: int  # that this rank put into the step's reductions, and into gathering

    @property
    def mean_loss(self) -> float:
        """Mean loss over all tokens of the step."""
        seen = self.tokens > 0
        return (
            float(np.average(self.loss[seen], weights=self.tokens[seen])) if seen.any() else np.nan
        )


class StepMeasurement:
    """Attributes gradients and losses of the micro-batches of a step to their domains.

    A parameter's k-th backward pass of a step belongs to the k-th micro-batch of its model chunk:
    pipeline schedules, interleaved ones too, run a chunk's backward passes in order.

    Args:
        capture: what shows the gradients of the selected parameters.
        probes: weights whose norms the statistics hold.
        probes_are_sharded: whether each data-parallel rank has a part of the new weights.
        num_probes: D, probes of all pipeline stages; may be 0.
        num_domains: K.
        measure_gradients: whether gradients are to be compared.
        averages: what a step's gradients are compared with beside each other, or None.
        gram_interval: steps between Gram matrices in the statistics; 0: none.
        groups: who sums what with whom.
        device: where the model lives.
    """

    NUM_EXTRA = 3
    """Numbers a domain that travel with the estimator's: loss sum, tokens, share of the batch."""

    def __init__(
        self,
        capture: Capture,
        probes: Sequence[WeightProbe],
        probes_are_sharded: bool,
        num_probes: int,
        num_domains: int,
        measure_gradients: bool,
        averages: AverageGradients | None,
        gram_interval: int,
        groups: ParallelGroups,
        device: torch.device,
    ) -> None:
        self._capture = capture
        self.estimator = capture.estimator
        self._probes = probes
        self._probes_are_sharded = probes_are_sharded
        self._num_probes = num_probes
        self._num_domains = num_domains
        self._measure_gradients = measure_gradients
        self.averages = averages
        self.parameters: Sequence[str] = capture.names
        self._gram_interval = gram_interval if measure_gradients else 0
        self._groups = groups
        self._device = device
        self._active = False
        self._store: Sequence[Any] | None = None
        self._work: dist.Work | None = None
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.seconds = 0.0
        self._handles = capture.register(lambda: self._active, self._on_backward)

    def begin(
        self,
        iteration: int,
        domains: np.ndarray,
        samples: np.ndarray,
        grad_scale: torch.Tensor,
        per_token: bool,
    ) -> None:
        """Start a step whose micro-batches on this rank are of the given domains, in order.

        Args:
            iteration: number of the step.
            domains: ``[micro-batches, micro-batch size]`` domain of each sequence.
            samples: [K] sequences of each domain in the whole batch.
            grad_scale: factor that the host multiplies losses with before the backward pass.
            per_token: whether the host sums token losses (``calculate_per_token_loss``).
        """
        self.seconds = 0.0
        self._with_gram = self._gram_interval > 0 and iteration % self._gram_interval == 0
        self._num_micro_batches = len(domains)
        self._samples = samples
        self._domains: list[list[int]] = domains.tolist()
        self._is_pure = bool((domains == domains[:, :1]).all())
        if self._groups.owns_loss:
            self._domains_on_device = _to_device(torch.from_numpy(domains).long(), self._device)
        self._grad_scale = grad_scale
        self._per_token = per_token
        self._store = None
        self._reset()
        self._active = True

    def _reset(self) -> None:
        if self._work is not None:  # the rows are still being summed
            self._work.wait()
            self._work = None
        self._calls = [0] * len(self._capture.names)
        self._reports: list[Any] = []  # losses of the micro-batches so far
        self._reduced = False
        self._capture.sent_bytes = 0
        self.estimator.begin_step()

    def _on_backward(self, index: int, *tensors: torch.Tensor) -> None:
        if not self._active:
            return
        start = time.perf_counter()
        micro_batch = self._calls[index]
        self._calls[index] += 1
        if micro_batch < self._num_micro_batches:
            self._capture.add(index, self._domains[micro_batch], *tensors)
        self.seconds += time.perf_counter() - start

    def on_forward(self, forward_data_store: Sequence[Any], num_microbatches: int) -> None:
        """Take the loss that the host has just stored for a micro-batch, if this rank has it.

        Args:
            forward_data_store: the list that a run of the host's schedule stores reports in. Other
                chunks of a virtual pipeline do not store any.
            num_microbatches: of the schedule.
        """
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
        if self._store is not forward_data_store:
            if self._store is not None:
                self._reset()  # the host runs the step again (its rerun state machine)
            self._store = forward_data_store
        if self._groups.owns_loss and len(forward_data_store) > len(self._reports):
            self._reports.append(_loss_and_tokens(report) if self._is_pure else sequences)
        self.seconds += time.perf_counter() - start

    def _add_losses(self) -> None:
        """Sum the losses of the step's micro-batches by domain, all at once."""
        if any(report is None for report in self._reports):
            raise RuntimeError(
                "blending.granule is 'sequence', so losses must be told apart by sequence: let "
                f"the loss function report {SEQUENCE_LOSSES!r} as well, [micro-batch size, 2] "
                "loss sums and token counts, or use the granule 'micro-batch'"
            )
        # [micro-batches, sequences or 1, (loss sum, tokens)]
        losses = torch.stack([report.detach().float() for report in self._reports])
        losses = losses.to(self._device)
        if not self._is_pure and losses.shape[1:] != (len(self._domains[0]), 2):
            raise ValueError(
                f"the loss function reports {SEQUENCE_LOSSES!r} as {list(losses.shape[1:])}; give "
                f"[{len(self._domains[0])}, 2]: loss sum and token count of each sequence"
            )
        losses = losses.view(len(losses), -1, 2)
        # The host divides each micro-batch's loss by the tokens in it.
        share = losses[..., 1:] / losses[..., 1].sum(1).clamp(min=1.0)[:, None, None]
        values = torch.cat([losses, share], dim=-1).flatten(0, 1)[..., None]
        domains = self._domains_on_device[:, : losses.shape[1]].reshape(-1, 1, 1)
        belongs = domains == torch.arange(self._num_domains, device=self._device)
        # Not by index_add_, which sums in another order each time on CUDA; nor by a product, which
        # would spread a loss that is not finite to every domain.
        sums = torch.where(belongs, values, 0.0).sum(0)
        self.estimator.extra.copy_(sums.flatten())

    def around_finalize(self, finalize: Callable[..., None] | None) -> Callable[..., None]:
        """Wrap the host's ``finalize_model_grads``: our reduction starts before the host's.

        It goes on beside the host's reduction and optimizer, until ``finish``.
        """
        host = finalize or (lambda *args, **kwargs: None)

        @functools.wraps(host)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            if not self._active:
                return host(*args, **kwargs)
            start = time.perf_counter()
            self._check_complete()
            if self._reports:
                self._add_losses()
            self._work = dist.all_reduce(
                self.estimator.packed(), group=self._groups.data, async_op=True
            )
            self.seconds += time.perf_counter() - start
            host(*args, **kwargs)
            start = time.perf_counter()
            for probe in self._probes:
                probe.before_update()
            self._reduced = True
            self.seconds += time.perf_counter() - start
            return None

        return wrapped

    def _check_complete(self) -> None:
        expected = self._num_micro_batches
        for name, calls in zip(self._capture.names, self._calls, strict=True):
            if calls != expected:
                raise RuntimeError(
                    f"{name} received a gradient in {calls} of {expected} micro-batches; "
                    "select parameters that every micro-batch uses"
                )

    def abandon(self) -> None:
        """Forget a step that was broken off."""
        self._active = False
        self._store = None

    def finish(self) -> Callable[[], StepStatistics]:
        """Start to sum over the model's shards, after the host's optimizer step; collective.

        Returns:
            What waits for the sums, in any thread, and gives the statistics. Nothing else waits
            for them: the host goes on, and so does what its device was given to do. (Sharded probes
            are added up first, which both wait for.)
        """
        if not self._reduced:
            raise RuntimeError("the step ended without finalize_model_grads; nothing was measured")
        self._active = False
        self._store = None
        assert self._work is not None
        self._work.wait()
        self._work = None
        vector = self._local_vector()
        fetch = _sum_in_background(vector, self._groups.model, self._side_stream)
        reduced = self.estimator.packed_bytes + vector.nbytes + self._capture.sent_bytes
        if self._probes_are_sharded:
            reduced += self._num_probes * _PROBE_BYTES
        num_micro_batches, per_token = self._num_micro_batches, self._per_token
        samples = int(self._samples.sum())
        return lambda: self._unpack(fetch(), num_micro_batches, samples, per_token, reduced)

    def _local_vector(self) -> torch.Tensor:
        sums, sq_norms = self.estimator.products()
        losses = self.estimator.extra.double()
        scale = self._grad_scale.double().reshape(1).to(self._device)
        if not self._groups.owns_loss:
            losses, scale = torch.zeros_like(losses), torch.zeros_like(scale)
        probes = torch.zeros(self._num_probes, 3, dtype=torch.float64, device=self._device)
        for probe in self._probes:
            probes[probe.index] = probe.after_update()
        if self._probes_are_sharded:
            dist.all_reduce(probes, group=self._groups.data)
        parts = [sums, sq_norms, losses, probes.flatten(), scale]
        if self.averages is not None:
            parts.append(self._compare_with(self.averages).flatten())
        if self._with_gram:
            parts.append(self.estimator.gram().flatten())
        return torch.cat(parts)

    def _compare_with(self, averages: AverageGradients) -> torch.Tensor:
        # Every rank knows the shares by sequence; those by token are on the last stages only.
        # Where the host sums over tokens, averages are of a sequence's tokens.
        share = self._samples / self._samples.sum()
        per_token, samples = self._per_token, int(self._samples.sum())
        replicas = samples if per_token else dist.get_world_size(self._groups.data)
        return averages.compare(self.estimator.rows, share, self._grad_scale.reshape(1) * replicas)

    def _unpack(
        self,
        vector: np.ndarray,
        num_micro_batches: int,
        samples: int,
        per_token: bool,
        reduced_bytes: int,
    ) -> StepStatistics:
        k = self._num_domains
        sums, sq_norms, loss_sum, tokens, shares = vector[: 5 * k].reshape(5, k)
        end = 5 * k + 3 * self._num_probes
        probes, grad_scale = vector[5 * k : end].reshape(self._num_probes, 3), float(vector[end])
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = np.where(tokens > 0, loss_sum / tokens, np.nan)
            norms = np.sqrt(probes[:, :2] / probes[:, 2:])
        alignment = grad_sq_norm = affinity = gram = None
        end += 1
        if self._measure_gradients:
            # The host averages over micro-batches and data-parallel ranks, or over tokens.
            if per_token:
                total = max(tokens.sum(), 1.0)
                share, scale = tokens / total, grad_scale * total
            else:
                replicas = dist.get_world_size(self._groups.data)
                share = np.minimum(shares / (replicas * num_micro_batches), 1.0)
                scale = grad_scale * replicas
            alignment, grad_sq_norm = mean_gradient_scores(sums, sq_norms, share, scale)
            if self.averages is not None:
                products = vector[end : end + k * k].reshape(k, k)
                tokens_a_sequence = total / samples if per_token else 1.0
                affinity = mean_gradient_affinity(products, share, scale * tokens_a_sequence)
                end += k * k
            if len(vector) > end:
                gram = mean_gradient_gram(vector[end:].reshape(k, k), share, scale)
        return StepStatistics(
            loss,
            tokens,
            alignment,
            grad_sq_norm,
            affinity,
            norms[:, 0],
            norms[:, 1],
            gram,
            reduced_bytes,
        )

    def detach(self) -> None:
        """Remove every hook from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _sum_in_background(
    vector: torch.Tensor, group: dist.ProcessGroup, side_stream: torch.cuda.Stream | None
) -> Callable[[], np.ndarray]:
    """Start an all-reduce; the result waits for it and gives the sums on the host."""
    work = dist.all_reduce(vector, group=group, async_op=True)
    if side_stream is None:

        def fetch() -> np.ndarray:
            work.wait()
            return vector.numpy()

        return fetch
    on_host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
    arrived = torch.cuda.Event(blocking=True)
    with torch.cuda.stream(side_stream):
        work.wait()  # this stream waits: neither the host nor the stream that it trains on
        on_host.copy_(vector, non_blocking=True)
        arrived.record()
    vector.record_stream(side_stream)

    def fetch_from_device() -> np.ndarray:
        arrived.synchronize()
        return on_host.numpy()

    return fetch_from_device


def _loss_and_tokens(report: Any) -> torch.Tensor:
    """Read the loss report that a host's loss function stores for a micro-batch: [2].

    Megatron-LM stores ``{"lm loss": [loss sum, tokens]}``; older loops store the mean loss alone.

    Raises:
        ValueError: the report is neither.
    """
    value = report
    if isinstance(report, dict) and ("lm loss" in report or len(report) == 1):
        value = report.get("lm loss", next(iter(report.values())))
    if isinstance(value, (tuple, list)):
        value = torch.stack([torch.as_tensor(part).float() for part in value])
    if isinstance(value, (torch.Tensor, float)):
        value = torch.as_tensor(value).detach().float().reshape(-1)
        if value.numel() == 2:
            return value
        if value.numel() == 1:
            return torch.cat([value, torch.ones_like(value)])
    found = list(value.shape) if isinstance(value, torch.Tensor) else report
    raise ValueError(
        f"the loss function reports {found} of a micro-batch; report {{'lm loss': [loss sum, "
        "tokens]}, or the mean loss alone"
    )
