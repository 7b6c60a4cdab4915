"""Resolves the trainer's data flags: manifests or dataset prefixes, their names, the tokenizer."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_acodm.megatron.builder import domain_name
from megatron_acodm.megatron.tokenizer import build_tokenizer, resolve_tokenizer_model
from megatron_acodm.preprocess.manifest import Manifest


@dataclass(frozen=True)
class DataSources:
    """The datasets of a run; each list follows the order of the domains."""

    names: list[str]
    prefixes: list[str]
    weights: list[float] | None  # given with --data-path
    valid_names: list[str]
    valid_prefixes: list[str]
    tokenizer: Any  # Megatron's


def resolve_sources(args: Namespace) -> DataSources:
    """Read what the data flags name.

    Raises:
        ValueError: for files that are missing, damaged, or were made with different tokenizers.
    """
    names, prefixes, weights, manifest = _resolve("--data-path", args.data_path)
    valid_names, valid_prefixes = names, prefixes
    if args.valid_data_path:
        valid_names, valid_prefixes, _, valid_manifest = _resolve(
            "--valid-data-path", args.valid_data_path
        )
        if manifest and valid_manifest:
            _check_same_tokenizer(manifest, valid_manifest)
    return DataSources(
        names, prefixes, weights, valid_names, valid_prefixes, _tokenizer(args, manifest)
    )


def _resolve(
    flag: str, values: Sequence[str]
) -> tuple[list[str], list[str], list[float] | None, Manifest | None]:
    if len(values) == 1 and (values[0].endswith(".json") or Path(values[0]).is_dir()):
        manifest = Manifest.load(values[0])
        names = [domain.name for domain in manifest.domains]
        return names, [str(domain.prefix) for domain in manifest.domains], None, manifest
    from megatron.core.datasets.utils import get_blend_from_list

    try:
        prefixes, weights = get_blend_from_list(list(values))
    except AssertionError as error:
        raise ValueError(
            f"{flag} mixes weighted and unweighted datasets: {' '.join(values)}; give every "
            "prefix a weight, or none"
        ) from error
    for prefix in prefixes:
        for suffix in (".idx", ".bin"):
            if not Path(prefix + suffix).is_file():
                raise ValueError(
                    f"{flag}: {prefix}{suffix} does not exist; give prefixes as "
                    "tools/preprocess_pile.py writes them, without .bin or .idx"
                )
    if weights is not None and (min(weights) < 0 or sum(weights) <= 0):
        raise ValueError(f"{flag} has weights {weights}; they must be >= 0, not all 0")
    return [domain_name(prefix) for prefix in prefixes], prefixes, weights, None


def _tokenizer(args: Namespace, manifest: Manifest | None) -> Any:
    kind, model = args.tokenizer_type, args.tokenizer_model
    if manifest is None:
        if kind is None:
            raise ValueError("--tokenizer-type is needed when --data-path is not a manifest.json")
        return build_tokenizer(kind, model, args.vocab_size)
    if kind is not None:
        resolve_tokenizer_model(kind, model)  # a missing file is the first thing to say
        if kind != manifest.tokenizer.type:
            raise ValueError(
                f"--tokenizer-type is {kind}, the data was made with {manifest.tokenizer.type}; "
                "leave the flag out to use the manifest's tokenizer"
            )
    return manifest.build_tokenizer(model)


def _check_same_tokenizer(train: Manifest, valid: Manifest) -> None:
    if train.tokenizer.sha256 != valid.tokenizer.sha256 or (
        train.tokenizer.type != valid.tokenizer.type
    ):
        raise ValueError(
            f"training data was tokenized with {train.tokenizer.type} "
            f"({train.tokenizer.sha256}), validation data with {valid.tokenizer.type} "
            f"({valid.tokenizer.sha256}); preprocess both with the same tokenizer"
        )


def natural_weights(prefixes: Sequence[str]) -> list[float]:
    """Share of each dataset in all their tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    datasets = [IndexedDataset(prefix) for prefix in prefixes]  # their arrays are memory-mapped
    tokens = [int(dataset.sequence_lengths.sum()) for dataset in datasets]
    return [count / sum(tokens) for count in tokens]
