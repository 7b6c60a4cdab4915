"""The trainer's data: all validation text counts, and every rank gets its own micro-batches."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Corpus
from host import start_megatron

from megatron_acodm.megatron.data import (
    ConsecutiveBatchSampler,
    ValidationSet,
    build_validation_datasets,
    get_batch,
)
from megatron_acodm.megatron.sources import natural_weights
from megatron_acodm.megatron.tokenizer import build_tokenizer


def _validation(corpus: Corpus, cache: Path, seed: int, sequence: int) -> ValidationSet:
    start_megatron()
    domains = json.loads(corpus.manifest.read_text(encoding="utf-8"))["domains"]
    args = Namespace(seed=seed, seq_length=sequence, data_cache_path=str(cache), split="98,2,0")
    args.valid_data_path = ["given"]
    return build_validation_datasets(
        args,
        build_tokenizer("ByteLevelTokenizer"),
        [domain["name"] for domain in domains],
        [str(corpus.manifest.parent / domain["prefix"]) for domain in domains],
    )


@pytest.mark.parametrize("seed", range(4))
def test_every_validation_token_is_counted_once(corpus: Corpus, tmp_path: Path, seed: int) -> None:
    sequence = 20_000  # few sequences a domain, the last of them padded
    data = _validation(corpus, tmp_path, seed, sequence)
    counted = np.zeros(3)
    batches = data.micro_batches(2, 0, 1, max_sequences=1000)
    for (domain, _), batch in zip(batches, data.iterate(batches), strict=True):
        counted[domain] += batch["loss_mask"].sum().item()
    domains = json.loads(corpus.manifest.read_text(encoding="utf-8"))["domains"]
    # The first token of a domain's text has nothing to predict it from.
    assert counted.tolist() == [domain["tokens"] - 1 for domain in domains]


def test_validation_is_dealt_to_the_ranks_without_loss_or_repetition() -> None:
    data = ValidationSet(["a", "b"], [None, None], [7, 3])
    ranks = [data.micro_batches(2, rank, 3, max_sequences=5) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    drawn = [
        (domain, index)
        for batches in ranks
        for domain, indices in batches
        for index in indices
        if index is not None
    ]
    assert sorted(drawn) == [(0, index) for index in range(5)] + [(1, index) for index in range(3)]


def test_ranks_draw_consecutive_micro_batches_in_turn() -> None:
    first, second = (list(ConsecutiveBatchSampler(8, 24, 2, rank, 2)) for rank in range(2))
    assert first == [[8, 9], [12, 13], [16, 17], [20, 21]]
    assert second == [[10, 11], [14, 15], [18, 19], [22, 23]]


def test_natural_weights_are_shares_of_tokens(corpus: Corpus) -> None:
    domains = json.loads(corpus.manifest.read_text(encoding="utf-8"))["domains"]
    tokens = np.array([domain["tokens"] for domain in domains])
    prefixes = [str(corpus.manifest.parent / domain["prefix"]) for domain in domains]
    assert natural_weights(prefixes) == pytest.approx((tokens / tokens.sum()).tolist())


def test_a_batch_of_another_domain_than_the_ledgers_is_refused() -> None:
    start_megatron()
    sample = {key: torch.ones(2, 4) for key in ("tokens", "labels", "loss_mask")}
    sample["dataset_id"] = torch.tensor([1, 1])
    assert get_batch(iter([sample]), 2, 4, domains=[1, 1])["tokens"].shape == (2, 4)
    with pytest.raises(RuntimeError, match=r"has \[1, 0\]; the reward would be credited"):
        get_batch(iter([sample]), 2, 4, domains=[1, 0])
