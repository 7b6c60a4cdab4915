"""A one-process Megatron for tests that look inside: process group, tiny GPT, micro-batches."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_acodm.arguments import build_parser, check_arguments
from megatron_acodm.megatron.model import TrainingModel, build_model

SEQUENCE, VOCABULARY = 16, 64


@functools.cache
def start_megatron() -> None:
    """Initialise torch.distributed and Megatron's parallel state, once a test process."""
    from megatron_acodm.megatron.groups import initialize_distributed

    os.environ.setdefault("MASTER_PORT", "0")
    initialize_distributed(1, 1, seed=1234, timeout_minutes=5)


def tiny_model(*arguments: str, vocabulary: int = VOCABULARY) -> TrainingModel:
    """A GPT of 4 layers in Megatron's DDP with its optimizer."""
    start_megatron()
    torch.manual_seed(7)
    args = build_parser().parse_args(
        [
            *("--num-layers", "4", "--hidden-size", "16", "--num-attention-heads", "2"),
            *("--seq-length", str(SEQUENCE), "--micro-batch-size", "2"),
            *("--global-batch-size", "12", "--train-iters", "10", "--run-dir", "unused"),
            *("--lr", "1e-2", "--lr-warmup-fraction", "0"),
            *("--data-path", "unused", "--make-vocab-size-divisible-by", "64", *arguments),
        ]
    )
    check_arguments(args)
    args.bf16, args.transformer_impl = bool(args.bf16), "local"
    return build_model(args, vocabulary)


def micro_batches(count: int, seed: int) -> list[torch.Tensor]:
    """Token sequences ``[2, SEQUENCE + 1]`` a micro-batch."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, SEQUENCE + 1)
    return [torch.randint(0, VOCABULARY, shape, generator=generator) for _ in range(count)]


def forward_step(
    iterator: Iterator[torch.Tensor], model: Any
) -> tuple[torch.Tensor, functools.partial[Any]]:
    """A Megatron forward step over the next micro-batch."""
    from megatron_acodm.megatron.losses import loss_func

    text = next(iterator)
    positions = torch.arange(SEQUENCE).expand(2, -1)
    output = model(text[:, :-1], positions, None, labels=text[:, 1:])
    return output, functools.partial(loss_func, torch.ones(2, SEQUENCE))


def forward_backward(model: TrainingModel, batches: Sequence[torch.Tensor]) -> Any:
    """Zero the gradients and run Megatron's schedule over the micro-batches."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model.chunks[0].zero_grad_buffer()
    model.optimizer.zero_grad()
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model.chunks,
        num_microbatches=len(batches),
        seq_length=SEQUENCE,
        micro_batch_size=2,
        forward_only=False,
    )
