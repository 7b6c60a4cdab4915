"""From micro-batches to losses: what training, validation and evaluation share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_acodm.megatron.data import ValidationSet, get_batch, reads_data
from megatron_acodm.megatron.measurement import SEQUENCE_LOSSES


def loss_func(
    loss_mask: torch.Tensor | None, output: torch.Tensor, by_sequence: bool = False
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Token losses ``[micro-batch, sequence]`` to Megatron's triple: loss sum, tokens, report.

    The report holds both, and with ``by_sequence`` also those of each sequence.
    """
    assert loss_mask is not None  # Megatron calls it on the last stage, which has the mask
    losses = output.float() * loss_mask
    loss, tokens = losses.sum(), loss_mask.sum()
    report = {"lm loss": torch.stack([loss.detach(), tokens])}
    if by_sequence:
        report[SEQUENCE_LOSSES] = torch.stack([losses.detach().sum(1), loss_mask.sum(1)], dim=1)
    return loss, tokens.int(), report


def forward(
    model: Any, batch: dict[str, torch.Tensor], by_sequence: bool = False
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """One micro-batch of ``get_batch`` through the model, as Megatron's schedules want it."""
    tokens = batch.get("tokens")
    positions = None
    if tokens is not None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    output = model(tokens, positions, None, labels=batch.get("labels"))
    return output, functools.partial(loss_func, batch.get("loss_mask"), by_sequence=by_sequence)


def sum_over_ranks(
    reports: Sequence[dict[str, torch.Tensor]], rows: Sequence[int], num_rows: int
) -> torch.Tensor:
    """``[num_rows, 2]`` loss sums and tokens, of each row, over all ranks; collective."""
    from megatron.core import parallel_state

    sums = torch.zeros(num_rows, 2, dtype=torch.float64, device="cuda")
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        for row, report in zip(rows, reports, strict=False):
            sums[row] += report["lm loss"].double()
    dist.all_reduce(sums)
    return sums.cpu()


def validation_sums(
    chunks: Sequence[Any],
    data: ValidationSet,
    *,
    micro_batch_size: int,
    seq_length: int,
    max_sequences: int,
) -> dict[str, tuple[float, int]]:
    """Loss sum and tokens of every domain's validation text, all in one pass; collective.

    Args:
        chunks: the model's chunks on this rank; they are left in evaluation mode.
        data: the validation text.
        micro_batch_size: sequences.
        seq_length: tokens a sequence.
        max_sequences: of each domain, its first ones.

    Returns:
        Those of the domains that have any; the loss in nats.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    batches = data.micro_batches(
        micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        max_sequences,
    )
    if not batches:
        return {}

    def forward_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        return forward(model, get_batch(iterator, micro_batch_size, seq_length, None))

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data.iterate(batches) if reads_data() else None,
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
        )
    sums = sum_over_ranks(reports, [domain for domain, _ in batches], len(data.names))
    return {
        name: (float(loss), int(tokens))
        for name, (loss, tokens) in zip(data.names, sums.tolist(), strict=True)
        if tokens > 0
    }
