"""The tokenizers that preprocessing and training share."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from tiny_tokenizer import train_sentencepiece

from megatron_acodm.megatron.tokenizer import (
    build_tokenizer,
    tokenizer_files,
    tokenizer_sha256,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture
def huggingface_folder(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    pieces = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pieces.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pieces.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 5, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def dataset_config(tokenizer: object) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=1,
        sequence_length=8,
        split="1",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )


def test_every_type_has_what_megatron_datasets_ask_for(model: Path) -> None:
    for tokenizer in (
        build_tokenizer("SentencePieceTokenizer", model),
        build_tokenizer("ByteLevelTokenizer"),
        build_tokenizer("NullTokenizer", vocab_size=100),
    ):
        assert 0 <= tokenizer.eod < tokenizer.vocab_size
        json.dumps(tokenizer.unique_identifiers)
        assert dataset_config(tokenizer).tokenizer is tokenizer


def test_sentencepiece_documents_end_with_the_models_end_of_sequence(model: Path) -> None:
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(model))
    assert tokenizer.vocab_size == 400
    assert tokenizer.eod == tokenizer.eos_id == 2
    assert tokenizer.detokenize(tokenizer.tokenize("a class of its own")) == "a class of its own"


def test_no_byte_of_a_text_is_taken_for_the_end_of_a_document_or_padding() -> None:
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    every_byte = tokenizer.tokenize("".join(map(chr, range(128))) + "é漢😀")
    assert {0, 1} <= set(every_byte)
    special = {tokenizer.eod, tokenizer.pad}
    assert len(special) == 2
    assert all(256 <= token < tokenizer.vocab_size for token in special)
    assert tokenizer.vocab_size == 258


def test_byte_level_text_comes_back_without_the_special_ids() -> None:
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    ids = [*tokenizer.tokenize("naïve\n text"), tokenizer.eod, tokenizer.pad]
    assert tokenizer.detokenize(ids) == "naïve\n text"


def test_the_null_tokenizers_eod_follows_the_ids_it_is_given() -> None:
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=10)
    assert (tokenizer.vocab_size, tokenizer.eod) == (11, 10)
    assert tokenizer.tokenize("3 0 9") == [3, 0, 9]


def test_huggingface_reads_a_folder_or_the_file_in_it(huggingface_folder: Path) -> None:
    pytest.importorskip("transformers")
    file = huggingface_folder / "tokenizer.json"
    for place in (huggingface_folder, file):
        tokenizer = build_tokenizer("HuggingFaceTokenizer", place)
        assert tokenizer.eod == tokenizer.tokenize("<|endoftext|>")[0] == 0
        assert tokenizer.detokenize(tokenizer.tokenize("the mat")) == "the mat"
    (huggingface_folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        build_tokenizer("HuggingFaceTokenizer", file)


def test_huggingface_without_its_package_says_what_to_install(
    huggingface_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "transformers" else find_spec(name, *rest),
    )
    with pytest.raises(ValueError, match="pip install transformers"):
        build_tokenizer("HuggingFaceTokenizer", huggingface_folder)


def test_the_hash_of_a_huggingface_tokenizer_covers_its_special_tokens(
    huggingface_folder: Path,
) -> None:
    folder, kind = huggingface_folder, "HuggingFaceTokenizer"
    before = tokenizer_sha256(kind, folder)
    assert tokenizer_sha256(kind, folder / "tokenizer.json") == before
    (folder / "model.safetensors").write_bytes(b"weights")
    assert tokenizer_sha256(kind, folder) == before
    (folder / "tokenizer_config.json").write_text("{}")
    assert tokenizer_sha256(kind, folder) != before
    assert [file.name for file in tokenizer_files(kind, folder)] == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_hash_of_a_sentencepiece_model_is_that_of_its_file(model: Path) -> None:
    expected = hashlib.sha256(model.read_bytes()).hexdigest()
    assert tokenizer_sha256("SentencePieceTokenizer", model) == expected
    assert tokenizer_sha256("ByteLevelTokenizer", None) is None


def test_a_model_without_an_end_of_sequence_is_refused(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path / "endless", eos_id=-1)
    with pytest.raises(ValueError, match=r"endless\.model has no end-of-sequence token"):
        build_tokenizer("SentencePieceTokenizer", model)


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_a_missing_tokenizer_file_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lost/tokenizer\.json does not exist"):
        build_tokenizer(kind, tmp_path / "lost" / "tokenizer.json")
    with pytest.raises(ValueError, match="needs a file; name it with --tokenizer-model"):
        build_tokenizer(kind)


def test_a_damaged_tokenizer_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.model"
    file.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"broken\.model cannot be read as a sentencepiece"):
        build_tokenizer("SentencePieceTokenizer", file)


def test_contradictory_settings_are_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="'WordTokenizer'; the types are SentencePieceTokenizer"):
        build_tokenizer("WordTokenizer")
    with pytest.raises(ValueError, match="--vocab-size is 401, but the SentencePieceTokenizer has"):
        build_tokenizer("SentencePieceTokenizer", model, vocab_size=401)
    with pytest.raises(ValueError, match="ByteLevelTokenizer reads no file"):
        build_tokenizer("ByteLevelTokenizer", model)
    with pytest.raises(ValueError, match="--vocab-size is None; give the number of ids"):
        build_tokenizer("NullTokenizer")
    with pytest.raises(ValueError, match=r"reads a file named tokenizer\.json"):
        build_tokenizer("HuggingFaceTokenizer", model)


def test_naming_the_types_costs_no_import_of_torch_or_megatron() -> None:
    code = (
        "import sys; from megatron_acodm.megatron.tokenizer import TOKENIZER_TYPES; "
        "print({'torch', 'megatron'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


def test_byte_level_padding_is_masked_and_text_is_not(tmp_path: Path) -> None:
    """GPTDataset gives no loss where a label is the padding id; no text may hold that id."""
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    ids = [*tokenizer.tokenize("\x00\x01" * 20), tokenizer.eod]
    prefix = str(tmp_path / "data")
    builder = IndexedDatasetBuilder(prefix + ".bin")
    builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(prefix + ".idx")
    config = dataset_config(tokenizer)
    config.path_to_cache = str(tmp_path / "cache")
    samples = GPTDataset(IndexedDataset(prefix), prefix, np.arange(1), 1, Split.train, config)
    assert samples[0]["loss_mask"].tolist() == [1.0] * 8
