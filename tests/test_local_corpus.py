"""The quickstart's corpus is real, split without overlap, repeatable; its tokenizer is lossless."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import sentencepiece
import zstandard
from hypothesis import given
from hypothesis import strategies as st

TOOLS = Path(__file__).parents[1] / "tools"
MAX_BYTES = 400_000


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


local_corpus = load("build_local_corpus")
train_tokenizer = load("train_tokenizer")
Domain = local_corpus.Domain


def run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOLS / f"{tool}.py", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(TOOLS.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    result = run("build_local_corpus", "--output", folder, "--max-bytes-per-domain", str(MAX_BYTES))
    assert result.returncode == 0, result.stderr
    return folder


def records(path: Path) -> list[tuple[str, str]]:
    with zstandard.open(path, "rt", encoding="utf-8") as file:
        parsed = [json.loads(line) for line in file]
    return [(record["meta"]["pile_set_name"], record["text"]) for record in parsed]


def document(word: str, lines: int = 40) -> str:
    return "\n".join(f"{word} says something of its own in line {i}" for i in range(lines))


def domain(prefix: str, documents: int = 60) -> Domain:
    return Domain(lambda: [document(f"{prefix}-{i}") for i in range(documents)])


def test_this_machine_yields_at_least_six_domains_in_both_files(corpus: Path) -> None:
    train = Counter(name for name, _ in records(corpus / "train.jsonl.zst"))
    valid = Counter(name for name, _ in records(corpus / "valid.jsonl.zst"))
    assert len(train) >= 6
    assert train.keys() == valid.keys()


def test_no_document_is_in_both_files_or_twice_in_one(corpus: Path) -> None:
    train = [text for _, text in records(corpus / "train.jsonl.zst")]
    valid = [text for _, text in records(corpus / "valid.jsonl.zst")]
    assert len({*train, *valid}) == len(train) + len(valid)


def test_domains_stay_within_their_size_and_documents_are_readable(corpus: Path) -> None:
    sizes: Counter[str] = Counter()
    for name, text in records(corpus / "train.jsonl.zst") + records(corpus / "valid.jsonl.zst"):
        sizes[name] += len(text.encode())
        assert "\0" not in text
        assert max(map(len, text.split("\n"))) <= local_corpus.MAX_LINE_CHARACTERS
    assert max(sizes.values()) <= MAX_BYTES
    assert min(sizes.values()) >= local_corpus.MIN_DOMAIN_BYTES


def test_a_second_build_writes_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    run("build_local_corpus", "--output", tmp_path, "--max-bytes-per-domain", str(MAX_BYTES))
    for name in ("train.jsonl.zst", "valid.jsonl.zst"):
        assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes()


def test_a_domain_without_enough_text_is_left_out_with_a_note(
    capsys: pytest.CaptureFixture[str],
) -> None:
    domains = {name: domain(name) for name in "abc"} | {"Rare": domain("rare", documents=2)}
    assert list(local_corpus.collect(domains, 1_000_000)) == ["a", "b", "c"]
    assert "Rare is left out" in capsys.readouterr().out


def test_fewer_than_three_domains_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"2 domains \(a, b\); at least 3"):
        local_corpus.collect({name: domain(name) for name in "ab"}, 1_000_000)


def test_a_copy_with_another_name_on_it_is_a_near_duplicate() -> None:
    kept = local_corpus.DocumentFilter()
    licence = document("licence")
    assert kept.clean("Copyright (c) 2001 Ada\n" + licence) is not None
    assert kept.clean("Copyright (c) 2024 Grace Hopper\n" + licence) is None
    assert kept.clean(document("another")) is not None


@pytest.mark.parametrize(
    "text",
    ["", "too short", document("nul") + "\0", "x" * 10_000, document("bad") + "\ufffd"],
    ids=["empty", "short", "binary", "long line", "undecodable"],
)
def test_what_is_no_document_is_dropped(text: str) -> None:
    assert local_corpus.DocumentFilter().clean(text) is None


def test_a_long_document_is_cut_at_a_line() -> None:
    text = document("long", lines=5000)
    cut = local_corpus.DocumentFilter().clean(text)
    assert text.startswith(cut + "\n")
    assert len(cut.encode()) > 0.99 * local_corpus.MAX_DOCUMENT_BYTES


@given(st.sets(st.text(min_size=1), min_size=2, max_size=30))
def test_the_split_is_a_partition_that_ignores_order(documents: set[str]) -> None:
    train, valid = local_corpus.split(sorted(documents))
    assert train
    assert valid
    assert sorted(train + valid) == sorted(documents)
    assert local_corpus.split(sorted(documents, reverse=True)) == (train, valid)


def test_translations_are_read_from_a_compiled_catalog(tmp_path: Path) -> None:
    pairs = [("", "Content-Type: text/plain; charset=UTF-8\n"), ("file", "fichier"), ("été", "æ")]
    keys, values = ([text.encode() for text in column] for column in zip(*pairs, strict=True))
    tables, data, offset = [], b"", 28 + 16 * len(pairs)
    for texts in (keys, values):
        for text in texts:
            tables.append(struct.pack("<II", len(text), offset + len(data)))
            data += text + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    catalog = header + b"".join(tables) + data
    assert local_corpus._translated_messages(catalog) == ["fichier", "æ"]


@pytest.fixture(scope="module")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    result = run(
        "train_tokenizer",
        *("--input", corpus / "train.jsonl.zst", "--output", path, "--vocab-size", "2048"),
    )
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def test_the_tokenizer_has_the_special_ids_that_megatron_needs(
    tokenizer: sentencepiece.SentencePieceProcessor,
) -> None:
    assert tokenizer.get_piece_size() == 2048
    assert tokenizer.eos_id() == 0
    assert tokenizer.pad_id() == 2
    assert tokenizer.bos_id() == -1


def test_white_space_and_rare_characters_survive_the_tokenizer(
    tokenizer: sentencepiece.SentencePieceProcessor,
) -> None:
    text = "  def f(x):\n\t\treturn 12345  # ça 漢字 😀 \u200b ﬁ\n\n\n   end  "
    ids = tokenizer.encode(text)
    assert tokenizer.unk_id() not in ids
    assert tokenizer.decode(ids) == text


def test_real_validation_text_survives_and_is_shorter_in_tokens(
    corpus: Path, tokenizer: sentencepiece.SentencePieceProcessor
) -> None:
    texts = [text for _, text in records(corpus / "valid.jsonl.zst") if "▁" not in text]
    encoded = tokenizer.encode(texts)
    assert tokenizer.decode(encoded) == texts
    assert sum(map(len, encoded)) < 0.6 * sum(len(text.encode()) for text in texts)


def test_the_tokenizer_learns_from_each_domain_alike(tmp_path: Path) -> None:
    path = tmp_path / "skewed.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for name, count in (("common", 50), ("rare", 1)):
            for i in range(count):
                record = {"text": document(f"{name}-{i}"), "meta": {"pile_set_name": name}}
                file.write(json.dumps(record) + "\n")
    sample = train_tokenizer.sample_documents([str(path)], 1000)
    sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in sample.items()}
    assert sizes == {"common": 1000, "rare": 1000}


def test_a_bad_line_is_one_clear_error_and_no_model(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"text": "a b", "meta": {"pile_set_name": "x"}})
    path.write_text(f"{good}\nnonsense\n", encoding="utf-8")
    result = run("train_tokenizer", "--input", path, "--output", tmp_path / "t.model")
    assert result.returncode == 1
    assert "bad.jsonl, line 2" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "t.model").exists()


def test_too_little_text_for_the_vocabulary_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"(?s)cannot learn 8192 pieces.*lower --vocab-size"):
        train_tokenizer.train(["a b c"], 8192, threads=1)
