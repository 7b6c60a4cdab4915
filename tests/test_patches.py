"""Patching the host: without a policy nothing changes, and unpatching restores it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Corpus
from host import start_megatron

import megatron_acodm
from megatron_acodm import AcodmConfig, RunShape
from megatron_acodm.config import BlendingConfig, MixingConfig
from megatron_acodm.megatron import builder, compat
from megatron_acodm.megatron.shim import install_cpu_shim, uninstall_cpu_shim
from megatron_acodm.megatron.tokenizer import build_tokenizer

RUN = RunShape(train_iters=10, global_batch_size=8, micro_batch_size=2)


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    megatron_acodm.unpatch()


def _prefixes(corpus: Corpus) -> list[str]:
    domains = json.loads(corpus.manifest.read_text(encoding="utf-8"))["domains"]
    return [str(corpus.manifest.parent / domain["prefix"]) for domain in domains]


def _build(corpus: Corpus, cache: Path, **blend: Any) -> list[Any]:
    start_megatron()
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=32,
        path_to_cache=str(cache),
        tokenizer=build_tokenizer("ByteLevelTokenizer"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **blend,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [80, 16, 8], lambda: True, config).build()


def _assert_same_samples(left: Any, right: Any) -> None:
    assert len(left) == len(right)
    for index in range(len(left)):
        for key, value in left[index].items():
            np.testing.assert_array_equal(np.asarray(value), np.asarray(right[index][key]))


BLENDS = {
    "one blend, weighted": lambda p: {"blend": (p, [0.5, 0.3, 0.2]), "split": "80,10,10"},
    "one blend, unweighted": lambda p: {"blend": (p, None), "split": "80,10,10"},
    "one dataset": lambda p: {"blend": (p[:1], None), "split": "80,10,10"},
    "a blend a split": lambda p: {
        "blend_per_split": [(p, [0.5, 0.3, 0.2]), (p[:2], [0.5, 0.5]), None]
    },
}


@pytest.mark.parametrize("kind", BLENDS)
def test_without_a_policy_the_builder_is_stock_index_for_index(
    corpus: Corpus, tmp_path: Path, kind: str
) -> None:
    blend = BLENDS[kind](_prefixes(corpus))
    stock = _build(corpus, tmp_path / "stock", **blend)
    assert megatron_acodm.patch(None) is None
    patched = _build(corpus, tmp_path / "patched", **blend)
    for left, right in zip(stock, patched, strict=True):
        assert type(left) is type(right)
        if left is not None:
            _assert_same_samples(left, right)


@pytest.mark.parametrize("kind", BLENDS)
def test_with_a_policy_validation_and_test_splits_are_stock(
    corpus: Corpus, tmp_path: Path, kind: str
) -> None:
    blend = BLENDS[kind](_prefixes(corpus))
    stock = _build(corpus, tmp_path / "stock", **blend)
    config = AcodmConfig(mixing=MixingConfig(policy="uniform"))
    mixer = megatron_acodm.patch(config, RUN)
    assert mixer is not None
    online = _build(corpus, tmp_path / "online", **blend)
    assert mixer.is_bound and len(online[0]) == 80
    for left, right in zip(stock[1:], online[1:], strict=True):
        assert type(left) is type(right)
        if left is not None:
            _assert_same_samples(left, right)


def test_a_node_with_other_data_than_rank_0s_is_named() -> None:
    start_megatron()
    rank_0s = [(10, 111), (5, 222)]
    builder._refuse_other_data([(10, 111), None], rank_0s, ["web", "code"])
    with pytest.raises(ValueError, match="rank 0 reads other data for domain 'code' than rank 0"):
        builder._refuse_other_data([(10, 111), (5, 333)], rank_0s, ["web", "code"])


def test_the_online_dataset_delivers_the_ledgers_domains(corpus: Corpus, tmp_path: Path) -> None:
    prefixes = _prefixes(corpus)
    names = {prefixes[0]: "first"}
    config = AcodmConfig(
        mixing=MixingConfig(policy="uniform"), blending=BlendingConfig(decision_lag=3)
    )
    mixer = megatron_acodm.patch(config, RUN, domain_names=names)
    assert mixer is not None
    train = _build(corpus, tmp_path, blend=(prefixes, [6.0, 3.0, 1.0]), split="80,10,10")[0]
    named = json.loads(corpus.manifest.read_text(encoding="utf-8"))["domains"]
    assert mixer.domains == ["first", *[domain["name"] for domain in named[1:]]]
    decided = np.arange(4 * RUN.global_batch_size)  # the first step and a lag of three
    domains, _ = mixer.ledger.locate(decided)
    assert [int(train[i]["dataset_id"]) for i in decided] == domains.tolist()
    assert mixer.ledger.weights_at(0).tolist() == pytest.approx([1 / 3] * 3)


def test_domains_are_named_by_the_manifest_beside_them_or_by_their_files(
    corpus: Corpus, tmp_path: Path
) -> None:
    prefix = Path(_prefixes(corpus)[2])
    assert builder.domain_name(str(prefix)) == "Python Code"
    assert builder.domain_name(str(tmp_path / prefix.name)) == "Python_Code"


def test_the_data_of_another_model_chunk_follows_the_same_ledger(
    corpus: Corpus, tmp_path: Path
) -> None:
    mixer = megatron_acodm.patch(AcodmConfig(mixing=MixingConfig(policy="uniform")), RUN)
    assert mixer is not None
    blend: dict[str, Any] = {"blend": (_prefixes(corpus), None), "split": "80,10,10"}
    first = _build(corpus, tmp_path, **blend)[0]
    second = _build(corpus, tmp_path, **blend)[0]
    decided = mixer.ledger.num_samples
    _assert_same_samples([first[i] for i in range(decided)], [second[i] for i in range(decided)])
    other = _build(corpus, tmp_path, blend=(_prefixes(corpus)[:2], None), split="80,10,10")[0]
    assert type(other).__name__ == "BlendedDataset"


def test_the_hosts_blend_weights_are_the_natural_ones(corpus: Corpus, tmp_path: Path) -> None:
    config = AcodmConfig(mixing=MixingConfig(policy="static"))
    mixer = megatron_acodm.patch(config, RUN)
    assert mixer is not None
    _build(corpus, tmp_path, blend=(_prefixes(corpus), [6.0, 3.0, 1.0]), split="80,10,10")
    assert mixer.ledger.weights_at(0).tolist() == pytest.approx([0.6, 0.3, 0.1])


def test_a_domain_of_less_than_a_sequence_is_named(corpus: Corpus, tmp_path: Path) -> None:
    megatron_acodm.patch(AcodmConfig(mixing=MixingConfig(policy="uniform")), RUN)
    with pytest.raises(ValueError, match=r"has no training sequence of 32 tokens; .*--seq-length"):
        _build(corpus, tmp_path, blend=(_prefixes(corpus), None), split="0.0001,99,0.9")


def test_unpatch_restores_every_host_function(corpus: Corpus) -> None:
    start_megatron()
    from megatron_acodm.megatron import patches

    paths = list(patches._REPLACEMENTS)
    before = [compat.host_symbol(path)[2] for path in paths]
    megatron_acodm.patch(None)
    patched = [compat.host_symbol(path)[2] for path in paths]
    megatron_acodm.patch(None)  # idempotent: not wrapped twice
    assert [compat.host_symbol(path)[2] for path in paths] == patched
    assert all(now is not then for now, then in zip(patched, before, strict=True))
    megatron_acodm.unpatch()
    assert [compat.host_symbol(path)[2] for path in paths] == before


def test_patching_with_another_configuration_is_refused() -> None:
    start_megatron()
    megatron_acodm.patch(None)
    with pytest.raises(ValueError, match="unpatch"):
        megatron_acodm.patch(AcodmConfig(), RUN)


@pytest.mark.parametrize("version", ["0.15.3", "0.21.0", "1.0.0"])
def test_an_unsupported_host_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    start_megatron()
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", version)
    with pytest.raises(
        compat.UnsupportedHostError, match=rf"{version} is installed; .*>=0.16,<0.21"
    ):
        megatron_acodm.patch(None)


def test_a_missing_host_symbol_is_named() -> None:
    with pytest.raises(compat.UnsupportedHostError, match="schedules.no_such_step is not in the"):
        compat.host_symbol("megatron.core.pipeline_parallel.schedules.no_such_step")


def test_a_failed_patch_leaves_the_host_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    start_megatron()
    from megatron_acodm.megatron import patches

    monkeypatch.setitem(patches._REPLACEMENTS, "megatron.core.no_such_thing", lambda f: f)
    before = compat.host_symbol(patches._FORWARD_STEP)[2]
    with pytest.raises(compat.UnsupportedHostError):
        megatron_acodm.patch(None)
    assert compat.host_symbol(patches._FORWARD_STEP)[2] is before


def test_the_cpu_shim_can_be_taken_off() -> None:
    start_megatron()
    assert torch.empty(1, device="cuda").device.type == "cpu"
    uninstall_cpu_shim()
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            torch.empty(1, device="cuda")
    finally:
        install_cpu_shim()
    assert torch.cuda.current_device() == torch.device("cpu")
