"""Ids come sooner than from Megatron's tokenizers, and are the same for every text."""

from __future__ import annotations

import json
import pydoc_data.topics
import tracemalloc
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tiny_tokenizer import train_sentencepiece

from megatron_acodm.megatron.tokenizer import build_tokenizer
from megatron_acodm.preprocess import text_encoder, word_encoder
from megatron_acodm.preprocess.encoder import ChunkEncoder
from megatron_acodm.preprocess.reader import Chunk
from megatron_acodm.preprocess.text_encoder import build_text_encoder
from megatron_acodm.preprocess.word_encoder import WordEncoder

_VERBATIM = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}
MODELS: dict[str, dict[str, Any]] = {
    # As tools/train_tokenizer.py trains.
    "verbatim": {
        **_VERBATIM,
        "add_dummy_prefix": False,
        "split_by_unicode_script": False,
        "split_digits": True,
        "user_defined_symbols": ["\n"],
        "eos_piece": "<|endoftext|>",
    },
    # As Llama's.
    "prefix": {**_VERBATIM, "split_digits": True},
    # As Gemma's: symbols that are runs, or have spaces and punctuation.
    "symbols": {
        **_VERBATIM,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["\n", "\n\n", "\t\t", "▁▁", "▁▁▁", "<b>", "▁is", "end."],
    },
    # Leaves spaces out, and changes nothing else.
    "trimming": {"model_type": "bpe", "normalization_rule_name": "identity"},
    # Normalizes: sentencepiece's defaults.
    "normalizing": {"model_type": "bpe", "vocab_size": 800},
    "suffix": {"model_type": "bpe", "treat_whitespace_as_suffix": True},
}
# Of "suffix", some pieces end in a space, so that words are not independent.
INDEPENDENT = [name for name in MODELS if name != "suffix"]

_WORDS = " ".join(pydoc_data.topics.topics.values()).split(" ")[:4000]
_ODD = [
    *(" ", "  ", "     ", "▁", "▁▁", " ▁", "\n", "\n\n", "\n  ", "\t", "\t\t", "\r\n", "\0"),
    *("\v", "\f", "\x01", "\x1c", "\x7f", "\x85", "\u00a0", "\u2028", "\u3000", "\u200b", "\ufeff"),
    *("</s>", "<s>", "<unk>", "<0x0A>", "<0x00>", "<|endoftext|>", "<b>", "<pad>", "end.", "is"),
    *("é", "e\u0301", "\u0301", "ﬁ", "Å", "が", "が", "漢字", "😀", "👩\u200d👩\u200d👦", "한국어"),
    *("1", "23", "3.14", "1,000", "don't", "(self)", "__init__", "a" * 70, "=" * 40, "\ufffd"),
]
TEXTS = st.lists(
    st.one_of(st.sampled_from(_WORDS), st.sampled_from(_ODD), st.text(max_size=5)), min_size=1
).map("".join)
PROPERTY = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")
    return lru_cache(lambda name: train_sentencepiece(folder / name, **MODELS[name]))


def encoder_of(path: Path) -> WordEncoder:
    encoder = WordEncoder.for_model(str(path), np.dtype(np.uint16))
    assert encoder is not None
    return encoder


@pytest.mark.parametrize("name", INDEPENDENT)
def test_words_have_the_ids_that_they_have_in_the_text(
    name: str, model: Callable[[str], Path]
) -> None:
    tokenizer = build_tokenizer("SentencePieceTokenizer", model(name))
    encoder = build_text_encoder(tokenizer, "SentencePieceTokenizer", np.dtype(np.uint16))
    assert isinstance(encoder, WordEncoder)

    @PROPERTY
    @given(TEXTS.filter(bool))
    def check(text: str) -> None:
        ids = encoder(text)
        assert ids.dtype == np.uint16
        assert ids.tolist() == tokenizer.tokenize(text)

    check()


@pytest.mark.parametrize("name", INDEPENDENT)
def test_whole_documents_have_the_same_ids(name: str, model: Callable[[str], Path]) -> None:
    tokenizer = build_tokenizer("SentencePieceTokenizer", model(name))
    encoder = encoder_of(model(name))
    source = Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8")
    for text in (*pydoc_data.topics.topics.values(), source):
        assert encoder(text).tolist() == tokenizer.tokenize(text)


def test_long_texts_are_cut_in_blocks_and_have_the_same_ids(model: Callable[[str], Path]) -> None:
    plain = sentencepiece.SentencePieceProcessor(model_file=str(model("verbatim")))
    encoder = encoder_of(model("verbatim"))

    @PROPERTY
    @given(TEXTS.filter(bool), st.integers(1, 40))
    def check(text: str, block: int) -> None:
        with mock.patch.object(word_encoder, "_BLOCK", block):
            assert encoder(text).tolist() == plain.encode(text)

    check()


def test_the_known_words_take_no_more_memory_than_stated(model: Callable[[str], Path]) -> None:
    encoder = encoder_of(model("prefix"))
    letters = np.random.default_rng(1).integers(ord("a"), ord("z"), (60_000, 9), dtype=np.uint32)
    words = [word.tobytes().decode("utf-32") for word in letters]
    limit = 1 << 22
    with mock.patch.object(word_encoder, "CACHE_BYTES", limit):
        tracemalloc.start()
        most = 0
        for first in range(0, len(words), 500):
            encoder(" ".join([*words[first : first + 500], *["again"] * 1200]))
            most = max(most, tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert limit / 3 < most < limit


def test_ids_stay_right_when_the_known_words_are_forgotten(model: Callable[[str], Path]) -> None:
    plain = sentencepiece.SentencePieceProcessor(model_file=str(model("prefix")))
    encoder = encoder_of(model("prefix"))
    with mock.patch.object(word_encoder, "CACHE_BYTES", 2_000):
        for text in pydoc_data.topics.topics.values():
            assert encoder(text).tolist() == plain.encode(text)


UNSAFE: dict[str, dict[str, Any]] = {
    "adds up scores": {"model_type": "unigram"},
    "joins unknown characters": {**_VERBATIM, "byte_fallback": False, "character_coverage": 0.98},
    "a symbol spans words": {**_VERBATIM, "user_defined_symbols": ["of▁the"]},
    "a symbol has a space": {**_VERBATIM, "user_defined_symbols": ["of the"]},
    "spaces end words": MODELS["suffix"],
}


@pytest.mark.parametrize("options", UNSAFE.values(), ids=UNSAFE)
def test_a_model_whose_words_may_depend_on_each_other_is_asked_as_megatron_does(
    options: dict[str, Any], tmp_path: Path
) -> None:
    path = train_sentencepiece(tmp_path / "unsafe", **options)
    assert WordEncoder.for_model(str(path), np.dtype(np.uint16)) is None
    tokenizer = build_tokenizer("SentencePieceTokenizer", path)
    encoder = build_text_encoder(tokenizer, "SentencePieceTokenizer", np.dtype(np.uint16))
    for text in ("one of the", "☃☃ ☃", *list(pydoc_data.topics.topics.values())[:5]):
        assert encoder(text).tolist() == tokenizer.tokenize(text)


@pytest.mark.parametrize("change", ["unused piece", "spaces kept"])
def test_a_model_that_takes_pieces_apart_or_keeps_spaces_is_asked_as_megatron_does(
    change: str, model: Callable[[str], Path], tmp_path: Path
) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model("verbatim").read_bytes())
    if change == "unused piece":
        next(piece for piece in proto.pieces if len(piece.piece) == 3).type = 5
    else:
        proto.normalizer_spec.escape_whitespaces = False
    path = tmp_path / "changed.model"
    path.write_bytes(proto.SerializeToString())
    assert WordEncoder.for_model(str(path), np.dtype(np.uint16)) is None


def test_a_space_that_belongs_at_the_end_is_put_there(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model("verbatim").read_bytes())
    proto.normalizer_spec.add_dummy_prefix = True
    proto.trainer_spec.treat_whitespace_as_suffix = True
    path = tmp_path / "suffix.model"
    path.write_bytes(proto.SerializeToString())
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert encoder_of(path)("the end").tolist() == plain.encode("the end")


@PROPERTY
@given(TEXTS.filter(bool))
def test_bytes_are_ids(text: str) -> None:
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    encoder = build_text_encoder(tokenizer, "ByteLevelTokenizer", np.dtype(np.uint16))
    assert encoder(text).tolist() == tokenizer.tokenize(text)


@pytest.mark.parametrize("text", ["1 two 3", "1  2", "1 11", "-1", "1 99999999999999999999"])
def test_text_that_holds_no_ids_is_refused(text: str) -> None:
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=10)
    encoder = build_text_encoder(tokenizer, "NullTokenizer", np.dtype(np.uint16))
    assert encoder("1 9 10").tolist() == [1, 9, 10]
    with pytest.raises(ValueError, match="cannot read 'text'|ids outside"):
        encoder(text)


def test_a_document_ends_with_eod_unless_it_has_no_ids(model: Callable[[str], Path]) -> None:
    path = str(model("normalizing"))
    tokenizer = build_tokenizer("SentencePieceTokenizer", path)
    texts = ["one of a kind", "", "  ", "the end."]
    lines = "\n".join(json.dumps({"text": t, "meta": {"pile_set_name": "P"}}) for t in texts)
    chunk = Chunk("input", 1, lines.encode(), len(lines))
    documents = ChunkEncoder("SentencePieceTokenizer", path, None)(chunk).domains["P"]
    first, last = (tokenizer.tokenize(texts[i]) for i in (0, 3))
    assert tokenizer.tokenize("  ") == []
    assert documents.tokens.tolist() == [*first, tokenizer.eod, *last, tokenizer.eod]
    assert documents.lengths.tolist() == [len(first) + 1, 0, 0, len(last) + 1]


def huggingface_folder(folder: Path, kind: str) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    bpe = kind == "BPE"
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE() if bpe else tokenizers.models.WordPiece(unk_token="[UNK]")
    )
    before = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = (
        before.ByteLevel(add_prefix_space=False) if bpe else before.BertPreTokenizer()
    )
    trainer = (tokenizers.trainers.BpeTrainer if bpe else tokenizers.trainers.WordPieceTrainer)(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "[UNK]"],
        initial_alphabet=before.ByteLevel.alphabet() if bpe else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("    ", normalized=False), "__init__"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "unk_token": "[UNK]"}))
    return folder


@pytest.mark.parametrize("kind", ["BPE", "WordPiece"])
def test_huggingface_ids_need_no_way_through_text(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", huggingface_folder(tmp_path / "hf", kind))
    encoder = build_text_encoder(tokenizer, "HuggingFaceTokenizer", np.dtype(np.uint16))
    assert isinstance(encoder, text_encoder._PlainEncoder) == (kind != "BPE")

    @PROPERTY
    @given(TEXTS.filter(bool))
    def check(text: str) -> None:
        assert encoder(text).tolist() == tokenizer.tokenize(text)

    check()


def test_text_of_new_words_has_the_same_ids_and_is_remembered_every_fourth_time(
    model: Callable[[str], Path],
) -> None:
    plain = sentencepiece.SentencePieceProcessor(model_file=str(model("prefix")))
    encoder = encoder_of(model("prefix"))
    rng = np.random.default_rng(0)
    with mock.patch.object(word_encoder, "CACHE_BYTES", 1 << 20):
        for text in pydoc_data.topics.topics.values():
            encoder(text)
        grew = []
        for _ in range(8):
            known = len(encoder._cache)
            letters = rng.integers(ord("a"), ord("z"), 4000, dtype=np.uint32).tobytes()
            text = letters.decode("utf-32")
            text = " ".join(text[i : i + 60] for i in range(0, 4000, 60)) + "\n end. "
            assert encoder(text).tolist() == plain.encode(text)
            grew.append(len(encoder._cache) > known)
    assert grew == [False, False, False, True] * 2
