"""Preprocessing: real files in, indexed datasets that stock Megatron reads out."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from preprocessing import (
    BYTE_FLAGS,
    BYTES,
    Texts,
    contents,
    documents,
    load_main,
    record,
    records,
    run,
    write,
)
from tiny_tokenizer import train_sentencepiece

from megatron_acodm.megatron.tokenizer import build_tokenizer
from megatron_acodm.preprocess import encoder, pipeline, pool, progress, reader, shard
from megatron_acodm.preprocess.manifest import Manifest
from megatron_acodm.preprocess.pool import WorkerDied, WorkerPool
from megatron_acodm.preprocess.workspace import FOLDER_NAME

main = load_main()


# --- What is written ------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small_chunks")
def test_documents_come_back_in_order_for_every_domain(texts: Texts, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl.zst", records(texts))
    manifest = run(source, tmp_path / "out", workers=2)
    assert [domain.name for domain in manifest.domains] == sorted(texts)
    for domain in manifest.domains:
        expected = [[*text.encode(), 256] if text else [] for text in texts[domain.name]]
        assert documents(domain.prefix) == expected


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", BYTES])
def test_files_are_those_of_megatrons_builder_fed_document_by_document(
    kind: str, texts: Texts, tmp_path: Path
) -> None:
    model = train_sentencepiece(tmp_path / "tiny") if kind == "SentencePieceTokenizer" else None
    source = write(tmp_path / "a.jsonl", records(texts))
    manifest = run(
        source, tmp_path / "out", tokenizer_type=kind, tokenizer_model=model and str(model)
    )
    tokenizer = build_tokenizer(kind, model)
    for domain in manifest.domains:
        expected = build_naively(tokenizer, texts[domain.name], tmp_path / "naive")
        assert dataset_files(domain.prefix) == expected


def test_ids_are_stored_as_wide_as_megatron_stores_the_vocabulary(tmp_path: Path) -> None:
    lines = ["0 65000 7", "", "12"]
    source = write(tmp_path / "a.jsonl", [record(line) for line in lines])
    for vocab_size, dtype in ((65_498, np.uint16), (65_499, np.int32), (100_000, np.int32)):
        options: dict[str, Any] = {"tokenizer_type": "NullTokenizer", "vocab_size": vocab_size}
        manifest = run(source, tmp_path / str(vocab_size), **options)
        prefix = manifest.domains[0].prefix
        assert IndexedDataset(str(prefix)).index.dtype == dtype
        assert documents(prefix) == [[0, 65000, 7, vocab_size], [], [12, vocab_size]]
        expected = build_naively(build_tokenizer(**options), lines, tmp_path / "naive")
        assert dataset_files(prefix) == expected


def dataset_files(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def build_naively(tokenizer: Any, texts: list[str], prefix: Path) -> list[bytes]:
    """The files that Megatron-LM's preprocessing writes with ``--append-eod``."""
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(prefix) + ".bin", dtype=dtype)
    for text in texts:
        ids = list(tokenizer.tokenize(text)) if text else []
        lengths = [len(ids) + 1] if ids else []
        builder.add_document([*ids, tokenizer.eod] if ids else [], lengths)
    builder.finalize(str(prefix) + ".idx")
    return dataset_files(prefix)


@pytest.mark.usefixtures("_small_chunks")
def test_output_does_not_depend_on_the_number_of_workers(texts: Texts, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl.gz", [*records(texts), b"nonsense"])
    for workers in (1, 3):
        run(source, tmp_path / str(workers), workers=workers, skip_bad_lines=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_every_compression_gives_the_same_datasets(texts: Texts, tmp_path: Path) -> None:
    lines = records(texts)
    whole = {e: [write(tmp_path / f"a{e}", lines)] for e in (".jsonl", ".jsonl.gz", ".jsonl.zst")}
    parts = [write(tmp_path / f"part{i}.jsonl", lines[i * 40 : i * 40 + 40]) for i in range(2)]
    # One file of several members, as `cat` and parallel compressors make them.
    halves = [Path(part).read_bytes() for part in parts]
    zst, gz = tmp_path / "members.jsonl.zst", tmp_path / "members.jsonl.gz"
    frames = [zstandard.ZstdCompressor().compress(half) for half in halves]
    zst.write_bytes(bytes.fromhex("502a4d1804000000deadbeef").join(frames))  # a skippable frame
    gz.write_bytes(b"".join(gzip.compress(half) for half in halves))
    variants = [*whole.values(), parts, [str(zst)], [str(gz)]]
    assert sum(len(half.splitlines()) for half in halves) == len(lines)
    outputs = []
    for number, inputs in enumerate(variants):
        run(inputs, tmp_path / str(number))
        outputs.append(contents(tmp_path / str(number)))
        del outputs[-1]["manifest.json"]
    assert all(output == outputs[0] for output in outputs)


def test_the_manifest_tells_what_is_there_and_what_it_came_from(
    texts: Texts, tmp_path: Path
) -> None:
    model = train_sentencepiece(tmp_path / "tiny")
    sources = [
        write(tmp_path / "a.jsonl.zst", records(texts)),
        write(tmp_path / "b.jsonl", [record("more", "Python Code"), record("", "Nothing")]),
    ]
    made = run(
        sources,
        tmp_path / "out",
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(model),
    )
    model.unlink()
    loaded = Manifest.load(tmp_path / "out")
    assert loaded == made == Manifest.load(tmp_path / "out" / "manifest.json")
    texts = {**texts, "Python Code": [*texts["Python Code"], "more"]}
    for domain in loaded.domains:
        assert domain.documents == len(texts[domain.name])
        assert domain.bytes == sum(len(text.encode()) for text in texts[domain.name])
        sums = [hashlib.sha256(data).hexdigest() for data in dataset_files(domain.prefix)]
        assert [domain.bin_sha256, domain.idx_sha256] == sums
        stored = documents(domain.prefix)
        assert domain.tokens == sum(map(len, stored))
        assert domain.empty_documents == stored.count([])
    assert loaded.empty_domains == {"Nothing": 1}
    for given_name, info in zip(sources, loaded.inputs, strict=True):
        data = Path(given_name).read_bytes()
        modified = Path(given_name).stat().st_mtime_ns
        expected = (given_name, len(data), modified, hashlib.sha256(data).hexdigest())
        assert (info.name, info.size, info.modified, info.sha256) == expected
    tokenizer = loaded.build_tokenizer()
    assert tokenizer.eod == loaded.tokenizer.eod == 2
    assert tokenizer.vocab_size == loaded.tokenizer.vocab_size == 400


def test_the_corpus_can_be_moved(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [record("1 2")])
    run(source, tmp_path / "out", tokenizer_type="NullTokenizer", vocab_size=9)
    (tmp_path / "out").rename(tmp_path / "moved")
    manifest = Manifest.load(tmp_path / "moved")
    assert documents(manifest.domains[0].prefix) == [[1, 2, 9]]
    assert manifest.build_tokenizer().eod == 9


def test_blank_lines_and_a_missing_last_newline_are_no_records(tmp_path: Path) -> None:
    first, last = json.dumps(record("a")).encode(), json.dumps(record("b")).encode()
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n" + first + b"\r\n \n\n" + last)
    manifest = run(str(source), tmp_path / "out", skip_bad_lines=True)
    assert documents(manifest.domains[0].prefix) == [[97, 256], [98, 256]]
    assert manifest.skipped_count == 0


# --- Malformed lines ------------------------------------------------------------------------------

BAD_LINES = {
    b'{"text": "cut': "not JSON: Unterminated string starting at at column 10",
    b"[" * 100_000: "not JSON that can be read: nested too deeply",
    b'{"text": ' + b"1" * 5000 + b"}": "not JSON that can be read: Exceeds the limit",
    b'"text"': "the record is a string, not an object",
    b'{"meta": {"pile_set_name": "A"}}': "there is no 'text'",
    b'{"text": null, "meta": {"pile_set_name": "A"}}': "'text' is null, not a string",
    b'{"text": ["a"], "meta": {"pile_set_name": "A"}}': "'text' is an array, not a string",
    b'{"text": 1.5, "meta": {"pile_set_name": "A"}}': "'text' is a number, not a string",
    b'{"text": true, "meta": {"pile_set_name": "A"}}': "'text' is a boolean, not a string",
    b'{"text": "a"}': "there is no 'meta', so no 'meta.pile_set_name'",
    b'{"text": "a", "meta": "A"}': "'meta' is a string, so no 'meta.pile_set_name'",
    b'{"text": "a", "meta": {}}': "there is no 'meta.pile_set_name'",
    b'{"text": "a", "meta": {"pile_set_name": 3}}': "'meta.pile_set_name' is a number",
    b'{"text": "a", "meta": {"pile_set_name": " "}}': "'meta.pile_set_name' is ' ', which",
    b'{"text": "a", "meta": {"pile_set_name": "\\ud800"}}': "'meta.pile_set_name' is '\\ud800'",
    b'{"text": "ab\\udc00", "meta": {"pile_set_name": "A"}}': "'text' has half a surrogate pair",
    b'{"text": "caf\xe9", "meta": {"pile_set_name": "A"}}': (
        "not UTF-8: invalid continuation byte at byte 14"
    ),
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: BAD_LINES[line][:30])
def test_a_malformed_line_stops_with_its_file_number_and_reason(
    line: bytes, tmp_path: Path
) -> None:
    good = write(tmp_path / "good.jsonl", [record()])
    bad = write(tmp_path / "bad.jsonl.gz", [record(), b"", line, record()])
    with pytest.raises(ValueError, match=re.escape(f"bad.jsonl.gz, line 3: {BAD_LINES[line]}")):
        run([good, bad], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {FOLDER_NAME}


@pytest.mark.usefixtures("_small_chunks")
def test_skipped_lines_are_counted_and_listed_and_the_others_kept(tmp_path: Path) -> None:
    lines: list[Any] = []
    for number, line in enumerate(BAD_LINES):
        lines += [record(str(number)), line]
    source = write(tmp_path / "a.jsonl", lines)
    manifest = run(source, tmp_path / "out", skip_bad_lines=True, workers=2)
    texts = [bytes(ids[:-1]).decode() for ids in documents(manifest.domains[0].prefix)]
    assert texts == [str(number) for number in range(len(BAD_LINES))]
    assert Manifest.load(tmp_path / "out").skipped_count == len(BAD_LINES)
    assert [bad.line for bad in manifest.skipped_lines] == list(range(2, len(lines) + 1, 2))
    assert all(bad.input == source for bad in manifest.skipped_lines)
    for bad, reason in zip(manifest.skipped_lines, BAD_LINES.values(), strict=True):
        assert reason in bad.reason


def test_the_list_of_skipped_lines_is_bounded_and_their_count_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (encoder, pipeline, shard):
        monkeypatch.setattr(module, "MAX_LISTED_LINES", 7)
    monkeypatch.setattr(reader, "CHUNK_BYTES", 10)
    source = write(tmp_path / "a.jsonl", [record(), *[b"bad"] * 50])
    manifest = run(source, tmp_path / "out", skip_bad_lines=True)
    assert manifest.skipped_count == 50
    assert [bad.line for bad in manifest.skipped_lines] == list(range(2, 9))


@pytest.mark.parametrize("text", ["1 two", "1 10", "-1", "99999999999999999999", "1  2"])
def test_text_that_the_tokenizer_cannot_represent_is_a_malformed_line(
    text: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", [record("1 9"), record(text)])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*'text'"):
        run(source, tmp_path / "out", tokenizer_type="NullTokenizer", vocab_size=9)


# --- The command line -----------------------------------------------------------------------------


def test_the_tool_prints_a_table_and_the_skipped_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [record("abc", "Gutenberg (PG-19)"), b"bad", record("", "Void")]
    source = write(tmp_path / "a.jsonl", lines)
    out = tmp_path / "out"
    flags = ["--input", source, "--output-dir", str(out), *BYTE_FLAGS, "--skip-bad-lines"]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^Gutenberg \(PG-19\) +1 +4 +0\.0$", printed, re.MULTILINE)
    assert "left out: domain 'Void', whose 1 documents are all empty" in printed
    assert f"  {source}, line 2: not JSON" in printed
    assert {path.name for path in out.iterdir()} == {
        "Gutenberg_PG-19_text_document.bin",
        "Gutenberg_PG-19_text_document.idx",
        "manifest.json",
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "error: --workers is 0; it must be at least 1"),
        (["--vocab-size", "9"], "error: --vocab-size is 9, but the ByteLevelTokenizer has 258"),
        (
            ["--tokenizer-type", "SentencePieceTokenizer"],
            "error: .* name it with --tokenizer-model",
        ),
        (
            ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "lost.model"],
            r"error: the tokenizer file lost\.model does not exist",
        ),
        (["--output-dir", "{file}/out"], "error: .*/out.*: Not a directory"),
    ],
)
def test_a_mistake_is_one_line_and_a_non_zero_status(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", [record()])
    arguments = ["--input", source, "--output-dir", str(tmp_path / "out"), *BYTE_FLAGS]
    arguments += [flag.format(file=source) for flag in flags]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert re.match(message, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--input", "a.jsonl", "--output-dir", "out", *BYTE_FLAGS, "--append-eod"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --append-eod" in capsys.readouterr().err


# --- The parts ------------------------------------------------------------------------------------


@given(
    data=st.lists(st.sampled_from([b"\n", b"a", b"\r", b"bc" * 9]), max_size=60).map(b"".join),
    chunk=st.integers(1, 50),
    block=st.integers(1, 20),
)
def test_chunks_hold_every_line_whole_under_its_number(
    data: bytes, chunk: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "chunks.jsonl"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "CHUNK_BYTES", chunk)
        patch.setattr(reader, "_BLOCK_BYTES", block)
        source = reader.InputFile(str(path))
        chunks = list(source.chunks())
    assert b"".join(part.data for part in chunks) == data
    assert all(part.data.endswith(b"\n") for part in chunks[:-1])
    line = 1
    for part in chunks:
        assert part.first_line == line
        line += part.data.count(b"\n")
    assert sum(part.input_bytes for part in chunks) <= len(data) == source.info.size


def _square_slowly(number: int) -> int:
    time.sleep(0.02 if number % 4 == 0 else 0)
    return number * number


def test_results_come_in_order_and_tasks_are_taken_only_as_needed() -> None:
    others = set(multiprocessing.active_children())  # such as Megatron's writer of checkpoints
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        while taken < 100:
            taken += 1
            yield taken

    with WorkerPool(3, lambda: _square_slowly) as workers:
        for returned, result in enumerate(workers.map(tasks()), start=1):
            assert result == returned**2
            assert taken <= returned + 3 * pool._WINDOW
    assert returned == taken == 100
    assert set(multiprocessing.active_children()) <= others


def test_results_come_as_soon_as_they_are_there_when_their_order_does_not_matter() -> None:
    with WorkerPool(2, lambda: lambda seconds: time.sleep(seconds)) as workers:
        numbers = [number for number, _ in workers.as_completed([3.0, 0.0, 0.0, 0.0])]
    assert numbers == [1, 2, 3, 0]


def test_a_full_disk_in_a_worker_is_the_callers_error() -> None:
    with (
        WorkerPool(1, lambda: lambda path: path.write_bytes(b"")) as workers,
        pytest.raises(FileNotFoundError, match="lost") as raised,
    ):
        list(workers.map([Path("/lost/file")]))
    assert raised.value.filename == "/lost/file"


def test_a_worker_that_fails_shows_why(capfd: pytest.CaptureFixture[str]) -> None:
    with WorkerPool(1, lambda: lambda task: 1 // task) as workers:
        results = workers.map([1, 0])
        assert next(results) == 1
        with pytest.raises(WorkerDied, match=r"failed \(exit code 1\); see above"):
            next(results)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_without_a_terminal_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = progress.Progress("the input", 1000)
    shown.update(250, 10, 5000)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_INTERVAL_S", 0.0)
    shown.update(250, 20, 5000)
    line = r" 50% of the input: 30 documents, [\d,]+ documents/s, [\d,.]+ MB/s\n"
    assert re.fullmatch(line, capsys.readouterr().err)
