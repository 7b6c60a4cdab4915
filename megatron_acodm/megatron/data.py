"""The trainer's data: Megatron datasets by domain, loaders, one pass over validation sets."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_acodm.megatron.builder import naming_cache
from megatron_acodm.megatron.signals import heed_parent_only

logger = logging.getLogger(__name__)

_KEYS = ("tokens", "labels", "loss_mask")


def reads_data() -> bool:
    """Whether this rank reads samples: one tensor-parallel rank of the first and last stages."""
    from megatron.core import parallel_state

    at_an_end = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    return at_an_end and parallel_state.get_tensor_model_parallel_rank() == 0


def dataset_config(args: Namespace, tokenizer: Any, **blend: Any) -> Any:
    """Megatron's GPT dataset config for this run; ``blend`` names the datasets."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        path_to_cache=args.data_cache_path,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        drop_last_partial_validation_sequence=False,  # padded instead: all its text counts
        num_dataset_builder_threads=2,
        **blend,
    )


def build_training_dataset(
    args: Namespace, tokenizer: Any, prefixes: Sequence[str], weights: Sequence[float] | None
) -> Any:
    """Build the training split through Megatron's (patched) builder; collective."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    blend = (list(prefixes), None if weights is None else list(weights))
    config = dataset_config(args, tokenizer, blend=blend, split=args.split)
    config.split_matrix = [config.split_matrix[0], None, None]  # validation is built by domain
    sizes = [args.train_samples, 0, 0]
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, reads_data, config).build()[0]


def build_validation_datasets(
    args: Namespace, tokenizer: Any, names: Sequence[str], prefixes: Sequence[str]
) -> ValidationSet:
    """Build one validation dataset a domain, each exactly one epoch long; collective.

    With ``--valid-data-path`` the files are validation text as a whole, else ``--split`` cuts a
    share off the training files. Domains without a single validation document are left out.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    blend = (list(prefixes), None)
    if args.valid_data_path:
        config = dataset_config(args, tokenizer, blend_per_split=[None, blend, None])
        share: tuple[float, float] | None = (0.0, 1.0)
    else:
        config = dataset_config(args, tokenizer, blend=blend, split=args.split)
        share = config.split_matrix[1]
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [None] * 3, reads_data, config)
    datasets: list[Any] = []
    for prefix in prefixes if share is not None else ():
        documents = GPTDataset.build_low_level_dataset(prefix, config).sequence_lengths.shape[0]
        low, high = (round(edge * documents) for edge in share or ())
        split = [None, share, None]
        with naming_cache(args.data_cache_path):
            datasets.append(
                builder._build_megatron_dataset_splits(prefix, split, [None] * 3)[1]
                if high > low
                else None
            )
    for dataset in filter(None, datasets):
        # GPTDataset caches its first sample's loss mask, which may be that of the padded one.
        dataset.masks_and_position_ids_are_cacheable = False
    sizes = [0 if dataset is None else len(dataset) for dataset in datasets]
    message = [sizes]
    dist.broadcast_object_list(message, src=0)
    sizes = message[0]
    for name, size in zip(names, sizes, strict=False):
        if size == 0:
            logger.warning("domain %s has no validation text and is not validated", name)
    return ValidationSet(list(names), datasets, sizes)


@dataclass(frozen=True)
class ValidationSet:
    """Validation data by domain; ``datasets`` is empty or None where this rank reads none."""

    names: list[str]
    datasets: list[Any]
    sizes: list[int]  # sequences of each domain, the same on every rank

    def micro_batches(
        self, micro_batch_size: int, data_rank: int, data_size: int, max_sequences: int
    ) -> list[tuple[int, list[int | None]]]:
        """This rank's micro-batches: (domain, indices), each of one domain, None for padding.

        Every data-parallel rank gets the same number. At most ``max_sequences`` of a domain.
        """
        batches: list[tuple[int, list[int | None]]] = []
        for domain, size in enumerate(self.sizes):
            indices: list[int | None] = list(range(min(size, max_sequences)))
            indices += [None] * (-len(indices) % micro_batch_size)
            batches += [
                (domain, indices[start : start + micro_batch_size])
                for start in range(0, len(indices), micro_batch_size)
            ]
        if batches:
            padding: tuple[int, list[int | None]] = (batches[-1][0], [None] * micro_batch_size)
            batches += [padding] * (-len(batches) % data_size)
        return batches[data_rank::data_size]

    def iterate(
        self, batches: Sequence[tuple[int, list[int | None]]]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The samples of micro-batches, collated."""
        for domain, indices in batches:
            yield torch.utils.data.default_collate([self.datasets[domain][i] for i in indices])


class ConsecutiveBatchSampler:
    """Yields this data-parallel rank's micro-batches of consecutive sample indices, in order."""

    def __init__(
        self, first: int, end: int, micro_batch_size: int, data_rank: int, data_size: int
    ) -> None:
        self._starts = range(
            first + data_rank * micro_batch_size, end, micro_batch_size * data_size
        )
        self._micro_batch_size = micro_batch_size

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts:
            yield list(range(start, start + self._micro_batch_size))


def build_training_iterator(args: Namespace, dataset: Any, consumed_samples: int) -> Any:
    """Iterate over the training dataset from a sample on; None where this rank reads no data."""
    from megatron.core import parallel_state

    if dataset is None:
        return None
    sampler = ConsecutiveBatchSampler(
        consumed_samples,
        args.train_samples,
        args.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=args.num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=args.num_workers > 0,
        worker_init_fn=heed_parent_only if args.save else None,
    )
    return iter(loader)


def get_batch(
    iterator: Any, micro_batch_size: int, seq_length: int, domains: Sequence[int] | None
) -> dict[str, torch.Tensor]:
    """The next micro-batch, on every tensor-parallel rank of the stages that use it.

    Args:
        iterator: yields collated samples; used on the one tensor-parallel rank that reads data.
        micro_batch_size: sequences.
        seq_length: tokens a sequence.
        domains: domain that each sequence must be of, or None if that is not known.

    Returns:
        ``tokens``, ``labels`` int64 and ``loss_mask`` float32, ``[micro_batch, sequence]``; empty
        on middle pipeline stages.

    Raises:
        RuntimeError: when the loader and the ledger disagree about the domains.
    """
    from megatron.core import parallel_state

    if not (parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()):
        return {}
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        sample = next(iterator)
        if domains is not None and sample["dataset_id"].tolist() != list(domains):
            raise RuntimeError(
                f"the loader delivered domains {sample['dataset_id'].tolist()} where the ledger "
                f"has {list(domains)}; the reward would be credited to the wrong domain"
            )
        packed = torch.cat([sample[key].long() for key in _KEYS], dim=1).cuda(non_blocking=True)
    else:
        shape = (micro_batch_size, len(_KEYS) * seq_length)
        packed = torch.empty(shape, dtype=torch.int64, device="cuda")
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.broadcast(
            packed,
            src=parallel_state.get_tensor_model_parallel_src_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
        )
    tokens, labels, mask = (part.contiguous() for part in packed.split(seq_length, dim=1))
    return {"tokens": tokens, "labels": labels, "loss_mask": mask.float()}
