"""``--verify`` names everything that is not as the manifest says."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preprocessing import load_main, make_texts, record, records, write
from tiny_tokenizer import train_sentencepiece

from megatron_acodm.megatron import indexed
from megatron_acodm.megatron.indexed import IndexCounts, read_index_counts, write_index
from megatron_acodm.preprocess.manifest import Manifest

main = load_main()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and its inputs, which were given by names relative to this folder."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = train_sentencepiece(folder / "tiny")
        write(folder / "a.jsonl", records(make_texts()))
        write(folder / "b.jsonl", [record("more", "B")])
        kind = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
        flags = ["--input", "a.jsonl", "b.jsonl", "--output-dir", "out", *kind]
        assert main([*flags, "--workers", "2"]) == 0
    return folder


@pytest.fixture
def corpus(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which things may be changed."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(made), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def verify(corpus: Path) -> int:
    return main(["--verify", "--output-dir", str(corpus), "--workers", "2"])


def test_a_corpus_as_it_was_made_has_no_differences(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    domains = Manifest.load(corpus).domains
    capsys.readouterr()
    assert verify(corpus) == 0
    tokens, documents = sum(d.tokens for d in domains), sum(d.documents for d in domains)
    expected = f"{tokens:,} tokens of {documents:,} documents in 4 domains are as they were made"
    assert capsys.readouterr().out.startswith(expected)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit_manifest(corpus: Path, key: str, value: int) -> None:
    file = corpus / "manifest.json"
    content = json.loads(file.read_text())
    content["domains"][0][key] += value
    file.write_text(json.dumps(content))


BIN, IDX = "Python_Code_text_document.bin", "Python_Code_text_document.idx"
DAMAGES: dict[str, Callable[[Path], object]] = {
    rf"{BIN}: another sha256, so other ids": lambda c: flip(c / BIN, 1000),
    rf"{BIN}: ids outside \[0, 400\), and another sha256": (
        lambda c: (c / BIN).write_bytes(b"\xff" * (c / BIN).stat().st_size)
    ),
    rf"{BIN}: \d[\d,]* tokens, not": lambda c: os.truncate(c / BIN, 500),
    rf"{BIN}: cannot be read: No such file": lambda c: (c / BIN).unlink(),
    rf"{IDX}: its sequences do not follow": lambda c: flip(c / IDX, 40),
    rf"{IDX}: its documents do not follow|{IDX}: its documents end at": (
        lambda c: flip(c / IDX, (c / IDX).stat().st_size - 8)
    ),
    rf"{IDX}: its first bytes are not": lambda c: flip(c / IDX, 0),
    rf"{IDX}: it has \d+ bytes and lists": lambda c: os.truncate(c / IDX, 60),
    rf"{IDX}: cannot be read": lambda c: (c / IDX).unlink(),
    r"B_text_document\.idx: 1 documents, not 2": (lambda c: edit_manifest(c, "documents", 1)),
    r"B_text_document\.bin: 5 tokens, not 6": (lambda c: edit_manifest(c, "tokens", 1)),
    r"a\.jsonl: changed since the corpus": lambda c: flip(c.parent / "a.jsonl", 10),
    r"b\.jsonl: changed since the corpus": (
        lambda c: write(c.parent / "b.jsonl", [record("longer", "B")])
    ),
    r"tiny\.model: another tokenizer": lambda c: flip(c / "tokenizer" / "tiny.model", 500),
    r"tiny\.model does not exist": lambda c: (c / "tokenizer" / "tiny.model").unlink(),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_what_differs_is_named(
    message: str, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[message](corpus)
    assert verify(corpus) == 1
    assert re.search(rf"^differs: .*({message})", capsys.readouterr().out, re.MULTILINE)


def test_all_differences_are_named(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for damage in (BIN, IDX, "Gutenberg_PG-19_text_document.bin"):
        flip(corpus / damage, 30)
    flip(corpus.parent / "a.jsonl", 10)
    assert verify(corpus) == 1
    printed = capsys.readouterr()
    assert printed.out.count("differs: ") == 4
    assert printed.err == "error: 4 differences from the manifest\n"


def test_inputs_that_are_gone_are_told_of_and_are_no_difference(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus.parent / "a.jsonl").unlink()
    os.utime(corpus.parent / "b.jsonl")
    assert verify(corpus) == 0
    assert re.search(r"not compared: .*a\.jsonl is no longer there", capsys.readouterr().out)


def test_a_folder_without_a_corpus_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(tmp_path) == 1
    assert re.match("error: cannot read .*No such file", capsys.readouterr().err)


def test_verify_takes_no_other_source_than_the_manifest(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--verify", "--output-dir", str(corpus), "--input", "a.jsonl"])
    assert "--verify takes what it needs from the manifest" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--output-dir", str(corpus)])
    assert "required: --input, --tokenizer-type" in capsys.readouterr().err


@given(parts=st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=4), block=st.integers(1, 5))
def test_an_index_has_the_counts_that_it_was_written_with(
    parts: list[list[int]], block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    files = [folder / f"{number}.lengths" for number in range(len(parts))]
    for file, lengths in zip(files, parts, strict=True):
        file.write_bytes(np.array(lengths, dtype=np.int32).tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "_BLOCK", block)
        write_index(folder / "a.idx", np.dtype(np.uint16), files)
        counts = read_index_counts(folder / "a.idx", np.dtype(np.uint16))
    flat = [length for lengths in parts for length in lengths]
    assert counts == IndexCounts(len(flat), flat.count(0), sum(flat))
    with pytest.raises(ValueError, match="not those of an index of int32 ids"):
        read_index_counts(folder / "a.idx", np.dtype(np.int32))
