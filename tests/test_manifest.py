"""The manifest of a corpus, and the file names of its domains."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preprocessing import (
    documents,
    record,
    run,
    write,
)
from tiny_tokenizer import train_sentencepiece

from megatron_acodm.preprocess import shard
from megatron_acodm.preprocess.manifest import Manifest
from megatron_acodm.preprocess.names import file_names

# --- Domain names ---------------------------------------------------------------------------------


def test_unsafe_domain_names_stay_inside_the_output_folder(tmp_path: Path) -> None:
    names = [
        "../evil",
        "/etc/passwd",
        "A/B",
        "a b",
        "漢字",
        "c" * 300,
        "-rf",
        "..",
        "manifest.json",
    ]
    source = write(tmp_path / "a.jsonl", [record(name, name) for name in names])
    manifest = run(source, tmp_path / "in" / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "in"}
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"out"}
    for domain in manifest.domains:
        assert domain.prefix.parent == tmp_path / "in" / "out"
        assert documents(domain.prefix) == [[*domain.name.encode(), 256]]


def test_ordinary_names_stay_readable() -> None:
    assert file_names(["Gutenberg (PG-19)", "Github", "C++"]) == {
        "Gutenberg (PG-19)": "Gutenberg_PG-19",
        "Github": "Github",
        "C++": "C",
    }


def test_names_that_would_meet_are_told_apart() -> None:
    named = file_names(["C++", "C#", "c", "D"])
    assert named["D"] == "D"
    assert all(re.fullmatch("[cC]-[0-9a-f]{8}", named[name]) for name in ("C++", "C#", "c"))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), unique=True))
def test_file_names_are_safe_distinct_and_independent_of_the_order(names: list[str]) -> None:
    named = file_names(names)
    assert set(named) == set(names)
    assert len({safe.lower() for safe in named.values()}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", safe) for safe in named.values())
    assert file_names(reversed(names)) == named


def test_a_document_name_in_place_of_the_domain_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "MAX_DOMAINS", 5)
    source = write(tmp_path / "a.jsonl", [record("a", str(number)) for number in range(6)])
    with pytest.raises(ValueError, match="more than 5 domains, '5' among them"):
        run(source, tmp_path / "out")


# --- Damaged manifests ----------------------------------------------------------------------------


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    model = train_sentencepiece(tmp_path / "tiny")
    source = write(tmp_path / "a.jsonl", [record("some text", "A"), record("more", "B")])
    kind = "SentencePieceTokenizer"
    run(source, tmp_path / "out", tokenizer_type=kind, tokenizer_model=str(model))
    return tmp_path / "out"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    r"is not a manifest that": lambda c: c.update(format="other"),
    r"has version 1, this package reads version 2": lambda c: c.update(version=1),
    r"is damaged: it lacks 'domains'": lambda c: c.pop("domains"),
    r"is damaged: it lacks 'tokens'": lambda c: c["domains"][0].pop("tokens"),
    r"is damaged: -1 is not a valid int": lambda c: c["domains"][0].update(tokens=-1),
    r"is damaged: '\.\./x' is not a valid Path": lambda c: c["domains"][0].update(prefix="../x"),
    r"is damaged: it lists the domains \['A', 'A'\]": lambda c: c["domains"][1].update(name="A"),
    r"is damaged: it lists the domains \[\]": lambda c: c.update(domains=[]),
    r"is damaged: .*; run preprocessing again": lambda c: c.update(domains="none"),
    r"'A', whose file .*A_text_document\.bin has \d+ bytes, not": (
        lambda c: c["domains"][0].update(tokens=99)
    ),
    r"'B', whose file .*B_text_document\.idx has \d+ bytes, not": (
        lambda c: c["domains"][1].update(documents=99)
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_manifest_is_refused(message: str, corpus_folder: Path) -> None:
    edit(corpus_folder, DAMAGES[message])
    with pytest.raises(ValueError, match=message):
        Manifest.load(corpus_folder)


def test_missing_files_are_named(corpus_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*nowhere: No such file"):
        Manifest.load(tmp_path / "nowhere")
    (corpus_folder / "B_text_document.bin").unlink()
    with pytest.raises(ValueError, match=r"'B', whose file .*B_text_document\.bin is missing"):
        Manifest.load(corpus_folder)
    (corpus_folder / "tokenizer" / "tiny.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer .*tiny\.model, which is missing"):
        Manifest.load(corpus_folder)
    (corpus_folder / "manifest.json").write_bytes(b"{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        Manifest.load(corpus_folder)


def test_another_tokenizer_than_the_corpuss_is_refused(corpus_folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(corpus_folder)
    copy = tmp_path / "tiny.model"
    assert manifest.build_tokenizer(copy).unique_identifiers["tokenizer_path"] == str(copy)
    other = train_sentencepiece(tmp_path / "other", model_type="bpe")
    with pytest.raises(ValueError, match=r"other\.model is not the one that the corpus was made"):
        manifest.build_tokenizer(other)
