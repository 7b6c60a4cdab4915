"""Builds the online training dataset where Megatron would build its static blend."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from megatron_acodm.megatron.mixer import Mixer

_SUFFIX = "_text_document"


def domain_name(prefix: str) -> str:
    """The domain that a dataset prefix stands for: its file name without Megatron's suffix."""
    return os.path.basename(prefix).removesuffix(_SUFFIX)


def training_blend(config: Any) -> tuple[list[str], list[float] | None] | None:
    """Prefixes and weights (or None) of the training split of a Megatron dataset config."""
    if config.blend is not None:
        return config.blend
    if config.blend_per_split is not None:
        return config.blend_per_split[0]
    return None


def build_with_online_training_split(builder: Any, stock_build: Any, mixer: Mixer) -> list[Any]:
    """Build all splits: training under ``mixer``'s control, the others exactly as Megatron does.

    Args:
        builder: a ``BlendedMegatronDatasetBuilder``.
        stock_build: the unpatched ``BlendedMegatronDatasetBuilder.build``.
        mixer: the active mixer, which has no datasets yet.

    Raises:
        ValueError: for a split without training data, or a domain of less than one sequence.
    """
    blend = training_blend(builder.config)
    assert blend is not None
    prefixes, weights = blend
    split = builder.config.split_matrix
    train_range = (0.0, 1.0) if split is None else split[0]
    if train_range is None:
        raise ValueError(f"the split {builder.config.split!r} leaves nothing for training")
    datasets = _build_one_epoch(builder, prefixes, train_range)
    names = [mixer.name_of_prefix(prefix) for prefix in prefixes]
    sizes = _agree_on_sizes(datasets, names, builder.config)
    train = mixer.bind(names, sizes, weights, datasets)
    others = _stock_without_training(builder, stock_build)
    return [train, *others[1:]]


def _build_one_epoch(builder: Any, prefixes: list[str], train_range: Any) -> list[Any]:
    """One mid-level dataset a prefix, each exactly one epoch long (None where not built)."""
    sizes = [[None, None, None] for _ in prefixes]
    splits = builder._build_megatron_datasets_parallel(
        list(prefixes), [train_range, None, None], sizes
    )
    return splits[0]


def _agree_on_sizes(datasets: list[Any], names: list[str], config: Any) -> list[int]:
    """Sequences an epoch of each domain; rank 0, which always builds, tells the others."""
    sizes = [None if dataset is None else len(dataset) for dataset in datasets]
    if dist.is_initialized():
        message = [sizes]
        dist.broadcast_object_list(message, src=0)
        sizes = message[0]
    for name, size in zip(names, sizes, strict=True):
        if not size:
            raise ValueError(
                f"domain {name!r} has {size} training sequences of {config.sequence_length} "
                "tokens; each domain needs at least 1: remove it, add text, or lower --seq-length"
            )
    return [int(size) for size in sizes if size is not None]


def _stock_without_training(builder: Any, stock_build: Any) -> list[Any]:
    config = copy.copy(builder.config)
    if config.blend is not None:
        config.split_matrix = [None, *config.split_matrix[1:]]
    else:
        config.blend_per_split = [None, *config.blend_per_split[1:]]
    original, builder.config = builder.config, config
    try:
        return stock_build(builder)
    finally:
        builder.config = original
