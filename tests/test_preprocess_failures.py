"""Preprocessing that cannot succeed: one clear error, no hang, nothing half-written."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from preprocessing import (
    BYTE_FLAGS,
    Texts,
    contents,
    documents,
    load_main,
    published,
    record,
    records,
    run,
    write,
)

from megatron_acodm.preprocess import encoder, reader, shard
from megatron_acodm.preprocess.manifest import Manifest
from megatron_acodm.preprocess.pool import WorkerDied
from megatron_acodm.preprocess.workspace import FOLDER_NAME

main = load_main()


# --- Inputs and outputs that cannot be used -------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_truncated_archive_is_named(ending: str, skip: bool, tmp_path: Path) -> None:
    source = Path(write(tmp_path / f"a{ending}", [record("x" * n) for n in range(2000)]))
    data = source.read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 1):
        source.write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"a{re.escape(ending)} is truncated"):
            run(str(source), tmp_path / "out", skip_bad_lines=skip)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_a_damaged_archive_is_named(ending: str, tmp_path: Path) -> None:
    source = Path(write(tmp_path / f"a{ending}", [record()]))
    source.write_bytes(b"no archive at all")
    with pytest.raises(ValueError, match=rf"a{re.escape(ending)} is damaged"):
        run(str(source), tmp_path / "out")


def test_unusable_inputs_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", [record()])
    (tmp_path / "folder.jsonl").mkdir()
    for inputs, message in (
        ([good, str(tmp_path / "lost.jsonl")], r"cannot read .*lost\.jsonl: No such file"),
        ([good, str(tmp_path / "a.csv")], r"a\.csv is none of \.jsonl, \.jsonl\.gz, \.jsonl\.zst"),
        ([good, str(tmp_path / "folder.jsonl")], r"folder\.jsonl is not a regular file"),
        ([good, f"{tmp_path}/./good.jsonl"], "is the same file as"),
        ([good, good], "is the same file as"),
    ):
        with pytest.raises(ValueError, match=message):
            run(inputs, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_inputs_without_any_text_are_refused(tmp_path: Path) -> None:
    for lines in ([], [record("")], [b"bad"]):
        source = write(tmp_path / "a.jsonl", lines)
        with pytest.raises(ValueError, match="hold no document with any text"):
            run(source, tmp_path / "out", skip_bad_lines=True)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {FOLDER_NAME}


def test_an_endless_line_is_refused_rather_than_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", 100)
    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 200_000)
    source = write(tmp_path / "a.jsonl", [record(), record("x" * 1_000_000)])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: longer than 200000 bytes"):
        run(source, tmp_path / "out")


def test_an_existing_corpus_is_kept_unless_it_is_to_be_overwritten(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [record("a", "A"), record("b", "B")])
    second = write(tmp_path / "b.jsonl", [record("c", "A")])
    out = tmp_path / "out"
    run(first, out)
    before = contents(out)
    with pytest.raises(ValueError, match=r"already holds a corpus of other inputs; pass --over"):
        run(second, out)
    assert contents(out) == before
    with pytest.raises(ValueError, match="hold no document"):
        run(write(tmp_path / "c.jsonl", []), out, overwrite=True)
    assert published(out) == before
    run(second, out, overwrite=True)
    assert set(contents(out)) == {"A_text_document.bin", "A_text_document.idx", "manifest.json"}
    assert documents(Manifest.load(out).domains[0].prefix) == [[ord("c"), 256]]


def test_datasets_of_unknown_origin_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [record()])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "B_text_document.bin").write_bytes(b"someone else's")
    with pytest.raises(ValueError, match=r"already holds B_text_document\.bin"):
        run(source, tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"B_text_document.bin"}


def test_a_full_disk_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.jsonl", [record("x" * 100_000)] * 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, hard))  # as a disk that has no more room
    try:
        code = main(["--input", source, "--output-dir", str(tmp_path / "out"), *BYTE_FLAGS])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: \S+\.bin: File too large\n", error)
    assert not (tmp_path / "out").exists()


# --- Processes that end too early -----------------------------------------------------------------


class KilledEncoder(encoder.ChunkEncoder):
    def __call__(self, chunk: reader.Chunk) -> encoder.EncodedChunk:
        if chunk.first_line > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(chunk)


@pytest.mark.usefixtures("_small_chunks")
def test_a_killed_worker_ends_the_run_with_an_error(
    texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(multiprocessing.active_children())  # such as Megatron's writer of checkpoints
    monkeypatch.setattr(shard, "ChunkEncoder", KilledEncoder)
    source = write(tmp_path / "a.jsonl", records(texts))
    with pytest.raises(WorkerDied, match="was killed by SIGKILL; .* lower --workers"):
        run(source, tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()
    assert set(multiprocessing.active_children()) <= others


class SlowEncoder(encoder.ChunkEncoder):
    """Makes sure that a run is still at work when it is interrupted."""

    def __call__(self, chunk: reader.Chunk) -> encoder.EncodedChunk:
        time.sleep(0.3)
        return super().__call__(chunk)


def start(arguments: list[str], output: Path) -> Any:
    """Run the tool, slowed down, in a process of its own; return when it is at work."""

    def target() -> None:
        # Ignored where the tests run in the background of a shell, and inherited from there.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os._exit(main(arguments))

    process = multiprocessing.get_context("fork").Process(target=target, daemon=False)
    with mock.patch.object(shard, "ChunkEncoder", SlowEncoder):  # as the new process inherits it
        process.start()
    deadline = time.monotonic() + 60
    while not list((output / FOLDER_NAME).glob("shards/*/00000.bin")):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def long_input(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Text of some fifty chunks."""
    return write(tmp_path_factory.mktemp("long") / "a.jsonl.zst", records(texts) * 200)


def test_a_killed_run_leaves_no_workers_and_the_same_command_succeeds_afterwards(
    long_input: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--input", long_input, "--output-dir", str(out), *BYTE_FLAGS]
    process = start(arguments, out)
    workers = children(process.pid)
    assert len(workers) == 2
    with pytest.raises(ValueError, match="another run is writing to"):
        run(long_input, out)
    process.kill()
    process.join()
    assert {path.name for path in out.iterdir()} == {".preprocess_pile"}
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert main(arguments) == 0
    run(long_input, tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_cleans_up(
    sent: signal.Signals, code: int, long_input: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(["--input", long_input, "--output-dir", str(out), *BYTE_FLAGS], out)
    os.kill(process.pid, sent)
    process.join(30)
    assert process.exitcode == code
    assert not out.exists()
