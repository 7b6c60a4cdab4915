"""Builds the online training dataset where Megatron would build its static blend."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_acodm.preprocess.manifest import MANIFEST_NAME, Manifest

if TYPE_CHECKING:
    from megatron_acodm.megatron.mixer import Mixer

logger = logging.getLogger(__name__)

_SUFFIX = "_text_document"
_CHECKED_DOCUMENTS = 16
_CHECKED_TOKENS = 1024


def domain_name(prefix: str) -> str:
    """The domain that a dataset prefix stands for.

    The name that a manifest beside the files gives it, else its file name without Megatron's
    suffix.
    """
    folder, name = os.path.split(os.path.abspath(prefix))
    return _manifest_names(folder).get(name) or name.removesuffix(_SUFFIX)


@functools.cache
def _manifest_names(folder: str) -> dict[str, str]:
    """Domain by file name of the prefix; empty without a manifest in the folder."""
    if not os.path.isfile(os.path.join(folder, MANIFEST_NAME)):
        return {}
    try:
        manifest = Manifest.read(folder)
    except ValueError as error:
        logger.warning("domains are named after their files: %s", error)
        return {}
    return {
        domain.prefix.name: domain.name
        for domain in manifest.domains
        if str(domain.prefix.parent) == folder
    }


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
        mixer: the active mixer, before its first step.

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
    if mixer.is_bound:  # by the builder of another model chunk
        names, known = mixer.domains, mixer.decisions.data
        _refuse_other_data([_described(dataset) for dataset in datasets], known, names)
        train: Any = mixer.online_dataset(datasets)
    else:
        names = [mixer.name_of_prefix(prefix) for prefix in prefixes]
        names, sizes, checksums = _agree_on_data(datasets, names, builder.config)
        train = mixer.bind(names, sizes, weights, datasets, checksums)
        mixer.training_prefixes = list(prefixes)
    others = _stock_without_training(builder, stock_build)
    return [train, *others[1:]]


def _build_one_epoch(builder: Any, prefixes: list[str], train_range: Any) -> list[Any]:
    """One mid-level dataset a prefix, each exactly one epoch long (None where not built)."""
    sizes = [[None, None, None] for _ in prefixes]
    with naming_cache(builder.config.path_to_cache):
        splits = builder._build_megatron_datasets_parallel(
            list(prefixes), [train_range, None, None], sizes
        )
    return splits[0]


@contextlib.contextmanager
def naming_cache(folder: str | None) -> Iterator[None]:
    """Name the folder of dataset indices when Megatron cannot write to it.

    Raises:
        ValueError: with the reason and the remedy.
    """
    try:
        yield
    except Exception as error:  # Megatron raises this very class
        reason = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(reason, OSError) or isinstance(reason, FileNotFoundError):
            raise
        raise ValueError(
            f"the dataset indices cannot be written to {folder or 'the folders of the data'}: "
            f"{reason}; make it writable, or give another folder with --data-cache-path"
        ) from error


def _agree_on_data(
    datasets: list[Any], names: list[str], config: Any
) -> tuple[list[str], list[int], list[int]]:
    """Name, sequences an epoch and checksum of each domain; rank 0, which always builds, tells all.

    Raises:
        ValueError: on every rank, when one reads other data, as a stale copy on its node may be.
    """
    mine = [_described(dataset) for dataset in datasets]
    found = mine
    if dist.is_initialized():
        message: list[Any] = [mine, names]
        dist.broadcast_object_list(message, src=0)
        found, names = message
        _refuse_other_data(mine, found, names)
    for name, data in zip(names, found, strict=True):
        if data is None or data[0] == 0:
            raise ValueError(
                f"domain {name!r} has no training sequence of {config.sequence_length} tokens; "
                "each domain needs at least 1: remove it, add text, or lower --seq-length"
            )
    return names, [size for size, _ in filter(None, found)], [crc for _, crc in filter(None, found)]


def _described(dataset: Any) -> tuple[int, int] | None:
    """Sequences an epoch and checksum of a domain's data; None where it is not built."""
    return None if dataset is None else (len(dataset), checksum_of(dataset))


def _refuse_other_data(mine: list[Any], rank_0s: list[Any], names: list[str]) -> None:
    nowhere = dist.get_world_size() * len(names)
    differing = (
        dist.get_rank() * len(names) + k
        for k, (ours, theirs) in enumerate(zip(mine, rank_0s, strict=True))
        if ours is not None and ours != theirs
    )
    first = torch.tensor([next(differing, nowhere)], device="cuda")
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    rank, domain = divmod(int(first), len(names))
    if int(first) < nowhere:
        raise ValueError(
            f"rank {rank} reads other data for domain {names[domain]!r} than rank 0; make the "
            "files of all nodes the same"
        )


def checksum_of(dataset: Any) -> int:
    """Checksum of the heads of a few documents: enough to notice that other data took its place."""
    indices = dataset.indices  # of the split's documents in the file
    checksum = zlib.crc32(str(len(indices)).encode())
    for i in range(min(len(indices), _CHECKED_DOCUMENTS)):
        document = int(indices[len(indices) * i // min(len(indices), _CHECKED_DOCUMENTS)])
        length = min(_CHECKED_TOKENS, int(dataset.dataset.sequence_lengths[document]))
        tokens = np.asarray(dataset.dataset.get(document, length=length), dtype=np.int64)
        checksum = zlib.crc32(tokens.tobytes(), checksum)
    return checksum


def _stock_without_training(builder: Any, stock_build: Any) -> list[Any]:
    config = copy.copy(builder.config)
    if config.blend is not None:
        config.split_matrix = [None, *config.split_matrix[1:]]
    else:
        config.blend_per_split = [None, *config.blend_per_split[1:]]
    original, builder.config = builder.config, config
    try:
        with naming_cache(config.path_to_cache):
            return stock_build(builder)
    finally:
        builder.config = original
