"""Preprocessing amid late workers, missing locks, foreign files and full disks."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard
from preprocessing import (
    BYTE_FLAGS,
    TOOL,
    contents,
    documents,
    identity,
    load_main,
    published,
    record,
    shard_folder,
    write,
)
from tiny_tokenizer import train_sentencepiece

from megatron_acodm.preprocess import pipeline, pool, reader, verify, workspace
from megatron_acodm.preprocess.manifest import Manifest
from megatron_acodm.preprocess.merge import DatasetMerge, Part
from megatron_acodm.preprocess.pool import WorkerPool
from megatron_acodm.preprocess.shard import ShardWriter
from megatron_acodm.preprocess.workspace import FOLDER_NAME

main = load_main()


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    return [write(tmp_path / f"{name}.jsonl", [record(name)]) for name in "abc"]


def command(inputs: list[str], out: Path, *more: str) -> list[str]:
    return ["--input", *inputs, "--output-dir", str(out), *BYTE_FLAGS, *more]


def null_command(inputs: list[str], out: Path, vocab_size: int) -> list[str]:
    kind = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab_size)]
    return ["--input", *inputs, "--output-dir", str(out), *kind, "--workers", "1"]


def in_a_process(work: Callable[[], int]) -> int | None:
    """Return the exit code, which is 1 for an exception."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(work()))
    process.start()
    process.join(60)
    return process.exitcode


def cut_short_before_publication(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run merge, and then meet a full disk."""

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "publish", full_disk)
        assert main(arguments) == 1


# --- Late writers ---------------------------------------------------------------------------------


def test_a_worker_dies_with_its_run_in_the_middle_of_a_task(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def task(_: object) -> None:
        pid_file.write_text(f"{os.getpid()}\n")
        time.sleep(60)

    def run() -> None:
        with WorkerPool(1, lambda: task) as workers:
            list(workers.map([0]))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    worker = Path(f"/proc/{int(pid_file.read_text())}/stat")
    while worker.exists() and worker.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_the_shard_of_an_earlier_command_that_comes_late_is_never_merged(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = [write(tmp_path / f"{n}.jsonl", [record(text)]) for n, text in enumerate(("1", "2"))]
    bad = write(tmp_path / "bad.jsonl", [b"bad"])
    assert main(null_command([inputs[0], bad], tmp_path / "earlier", 1000)) == 1
    late = shard_folder(tmp_path / "earlier", inputs[0])
    mine = shard_folder(tmp_path / "out", inputs[0])
    complete = ShardWriter.complete

    def beside(writer: ShardWriter) -> None:
        if moment == "before" and not mine.exists():
            shutil.copytree(late, mine)
        complete(writer)
        if moment == "after":
            shutil.rmtree(mine)
            shutil.copytree(late, mine)

    arguments = null_command(inputs, tmp_path / "out", 9)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "complete", beside)
        assert main(arguments) == (0 if moment == "before" else 1)
    if moment == "after":
        assert "1 of 2 inputs have no finished shard: " in capsys.readouterr().err
        assert main(arguments) == 0
    stored = documents(Manifest.load(tmp_path / "out").domains[0].prefix)
    assert stored == [[1, 9], [2, 9]]


def test_a_shard_that_comes_when_a_merge_has_begun_changes_nothing(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(sources, tmp_path / "out")
    cut_short_before_publication(arguments, monkeypatch)
    before = contents(tmp_path / "out")
    item = reader.InputFile(sources[0])
    list(item.chunks())
    info = pipeline.TokenizerInfo("NullTokenizer", None, None, 10, 9)
    shards = shard_folder(tmp_path / "out", sources[0]).parent
    with (
        ShardWriter(shards, item, info, False) as writer,
        pytest.raises(ValueError, match="too late: a merge has begun"),
    ):
        writer.complete()
    assert contents(tmp_path / "out") == before


def test_a_merge_of_another_size_than_its_parts_is_an_error(tmp_path: Path) -> None:
    parts = [Part(tmp_path / str(number), 4) for number in range(2)]
    for part, data in zip(parts, (b"aaaa", b"bb"), strict=True):
        Path(f"{part.prefix}.lengths").write_bytes(b"\2\0\0\0")
        Path(f"{part.prefix}.bin").write_bytes(data)
    merge = DatasetMerge(tmp_path / "a", tmp_path / "a.json", np.dtype(np.uint16), parts)
    with pytest.raises(OSError, match="has 6 bytes, not the 8 that were written") as raised:
        merge.run()
    assert raised.value.filename == str(tmp_path / "a.bin")
    assert not (tmp_path / "a.json").exists()


def test_what_another_process_did_to_a_merged_file_is_noticed_before_publication(
    sources: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    publish = pipeline.publish

    def publish_late(space: workspace.Workspace, manifest: Manifest) -> None:
        with open(space.final / "A_text_document.bin", "ab") as file:
            file.write(b"xx")
        publish(space, manifest)

    monkeypatch.setattr(pipeline, "publish", publish_late)
    assert main(command(sources, out)) == 1
    assert re.search(
        r"error: the merge made the domain 'A', whose file \S+ has 14 bytes, not 12",
        capsys.readouterr().err,
    )
    assert published(out) == {}
    assert not (out / FOLDER_NAME / "manifest.json").exists()


# --- Locks ----------------------------------------------------------------------------------------


def test_a_file_system_without_locks_is_warned_of_once(
    sources: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert main(command(sources, tmp_path / "out", "--shard", "0/1")) == 0
    assert main(command(sources, tmp_path / "out", "--merge")) == 0
    warning = f"warning: locks do not work in {tmp_path}/out (No locks available), so nothing"
    assert capsys.readouterr().err.count(warning) == 2


def test_locks_of_many_shards_take_one_open_file(tmp_path: Path) -> None:
    keys = [f"{number:015x}" for number in (0, 1, 2**60 - 1, *range(10, 500))]
    with workspace.Workspace(tmp_path / "out", shared=True) as space:
        before = len(os.listdir("/proc/self/fd"))
        (space.shards / f"{keys[1]}.left").mkdir()
        (space.shards / "f00000000000000.other").mkdir()
        assert space.lock_shards(keys) is None
        assert len(os.listdir("/proc/self/fd")) == before
        assert [path.name for path in space.shards.iterdir()] == ["f00000000000000.other"]

        def attempt() -> int:
            with workspace.Workspace(tmp_path / "out", shared=True) as second:
                assert second.lock_shards(["000000000000005"]) is None
                assert second.lock_shards(["000000000000007", keys[2]]) == keys[2]
            return 0

        assert in_a_process(attempt) == 0


# --- What is kept and what is removed -------------------------------------------------------------


def test_foreign_files_beside_the_tokenizer_survive_another_corpus(
    sources: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for name in ("first", "second"):
        model = str(train_sentencepiece(tmp_path / name))
        kind = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
        flags = ["--input", sources[name == "first"], "--output-dir", str(out), *kind]
        assert main([*flags, "--overwrite"]) == 0
        (out / "tokenizer" / "folder").mkdir(exist_ok=True)
        (out / "tokenizer" / "notes.txt").write_text("mine")
    names = {path.name for path in (out / "tokenizer").iterdir()}
    assert names == {"second.model", "notes.txt", "folder"}


def test_a_mistaken_command_costs_nothing_of_what_is_done(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bad = tmp_path / "out", write(tmp_path / "bad.jsonl", [b"bad"])
    assert main(command([*sources, bad], out)) == 1
    assert main(command([bad, *reversed(sources)], out)) == 1
    assert main([*null_command([bad], out, 9), "--overwrite"]) == 1
    capsys.readouterr()
    extra = write(tmp_path / "extra.jsonl", [record("d")])
    assert main(command([extra, *sources[1:]], out)) == 0
    error = capsys.readouterr().err
    assert "2 of 3 inputs are done already" in error
    assert error.endswith(f"removed what was done of 1 other inputs: {sources[0]}\n")
    stored = documents(Manifest.load(out).domains[0].prefix)
    assert stored == [[ord(letter), 256] for letter in "dbc"]


def test_what_is_done_stays_until_what_takes_its_place_is_whole(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bad = tmp_path / "out", write(tmp_path / "bad.jsonl", [b"bad"])
    assert main(command([sources[0], bad], out)) == 1
    before = contents(shard_folder(out, sources[0]))
    assert main(null_command([sources[0]], out, 9)) == 1  # 'a' is no text for it
    error = capsys.readouterr().err
    assert f"{sources[0]}: what is done was made with another tokenizer" in error
    assert contents(shard_folder(out, sources[0])) == before


def test_shards_are_as_open_to_others_as_the_umask_says(sources: list[str], tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        assert main(command(sources, tmp_path / "out", "--shard", "0/1")) == 0
    finally:
        os.umask(before)
    folder = shard_folder(tmp_path / "out", sources[0])
    assert folder.stat().st_mode & 0o777 == 0o775


def test_a_shard_that_cannot_be_read_is_an_error_and_not_built_again(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(sources, tmp_path / "out", "--shard", "0/1")) == 0
    file = shard_folder(tmp_path / "out", sources[0]) / "shard.json"
    file.unlink()
    file.mkdir()  # root may read everything else
    assert main(command(sources, tmp_path / "out")) == 1
    assert f"error: {file}: Is a directory\n" in capsys.readouterr().err


def test_parts_are_not_built_into_a_clean_up_that_was_cut_short(
    sources: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"

    def killed(space: workspace.Workspace) -> None:
        for name in ("shards", "merged", "final", "merging"):
            workspace.remove(space.path / name)
        os._exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(workspace.Workspace, "clear", killed)
        assert in_a_process(lambda: main(command(sources[:1], out))) == 9
    part = command(sources[1:], out, "--shard", "0/1", "--overwrite")
    assert main(part) == 1
    assert "cut short; run its command again" in capsys.readouterr().err
    assert main(command(sources[:1], out, "--merge")) == 0
    assert main(part) == 0
    assert main(command(sources[1:], out, "--merge", "--overwrite")) == 0
    stored = documents(Manifest.load(out).domains[0].prefix)
    assert stored == [[98, 256], [99, 256]]


def test_overwriting_leaves_an_equal_corpus_alone_and_says_how_to_make_it_anew(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(sources, out)) == 0
    before = {path: identity(path) for path in out.iterdir()}
    for step in ([], ["--merge"], ["--shard", "0/2"]):
        assert main(command(sources, out, "--overwrite", *step)) == 0
    assert "nothing was done (to make them anew, delete that file)" in capsys.readouterr().out
    assert {path: identity(path) for path in before} == before
    (out / "manifest.json").unlink()
    assert main(command(sources, out, "--overwrite")) == 0
    assert (out / "manifest.json").exists()


# --- Inputs ---------------------------------------------------------------------------------------


def test_a_hard_link_is_the_same_file(sources: list[str], tmp_path: Path) -> None:
    os.link(sources[0], tmp_path / "link.jsonl")
    with pytest.raises(ValueError, match=r"link\.jsonl is the same file as \S+a\.jsonl"):
        reader.open_inputs([sources[0], str(tmp_path / "link.jsonl")])


def test_relative_names_mean_the_same_files_from_every_folder(
    sources: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", [b"bad"])
    relative = command(["a.jsonl", "d.jsonl"], Path("out"), "--skip-bad-lines")
    assert main(relative) == 0
    assert "  " + str(tmp_path / "d.jsonl") + ", line 1: not JSON" in capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "out")
    assert [info.name for info in manifest.inputs] == [sources[0], str(tmp_path / "d.jsonl")]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    names = [sources[0], str(tmp_path / "d.jsonl")]
    assert main(command(names, tmp_path / "out", "--skip-bad-lines")) == 0
    assert "were complete already" in capsys.readouterr().out


def test_a_touched_input_is_read_once_and_said_to_be(
    sources: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = command(sources, tmp_path / "out")
    cut_short_before_publication(arguments, monkeypatch)
    os.utime(sources[1])
    hashed, sha256_of = [], reader.sha256_of
    monkeypatch.setattr(reader, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    capsys.readouterr()
    assert main(arguments) == 0
    assert hashed == [Path(sources[1])]
    assert capsys.readouterr().err.count("checking 1 touched inputs") == 1


def test_verify_tells_of_inputs_that_it_may_not_read_and_of_all_differences() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        closed = folder / "closed"
        closed.mkdir()
        inputs = [write(closed / "a.jsonl", [record()]), write(folder / "b.jsonl", [record()])]
        assert main(command(inputs, folder / "out")) == 0
        (folder / "out" / "A_text_document.bin").write_bytes(b"")
        closed.chmod(0)
        Path(inputs[1]).chmod(0)

        def look() -> int:
            if os.geteuid() == 0:
                os.setuid(65534)  # root may read everything
            found = verify.verify(folder / "out", 1)
            (difference,) = found.differences
            reasons = [f"{file} cannot be read: Permission denied" for file in inputs]
            assert found.unread_inputs == reasons
            assert "0 tokens, not" in difference
            return 0

        try:
            assert in_a_process(look) == 0
        finally:
            closed.chmod(0o755)


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_chunks_stay_small_whatever_a_few_bytes_decompress_to(ending: str, tmp_path: Path) -> None:
    lines = [record("a" * 100)] * 300_000
    source = write(tmp_path / f"a{ending}", lines)
    if ending == ".jsonl.zst":
        assert Path(source).stat().st_size < 10_000
    sizes = [len(chunk.data) for chunk in reader.InputFile(source).chunks()]
    assert sum(sizes) > 30 * reader.CHUNK_BYTES
    assert max(sizes) <= 2 * reader.CHUNK_BYTES


def test_a_slice_of_an_archive_decompresses_to_little() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    pieces = list(reader._decompress([bomb], reader._new_zstd_decoder))
    assert sum(map(len, pieces)) == 1 << 28
    assert max(map(len, pieces)) <= reader.CHUNK_BYTES
    decoder = reader._new_zstd_decoder()
    assert len(decoder.decompress(bomb[: reader._SLICE_BYTES])) <= 1 << 26


def test_large_tasks_do_not_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_WINDOW_BYTES", 10)
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for size in (1, 4, 4, 4, 100, 1, 9, 11, 2):
            taken.append(size)
            yield size

    with WorkerPool(3, lambda: lambda size: size) as workers:
        results = []
        for result in workers.map(tasks(), lambda size: size):
            under_way = taken[len(results) : -1] if len(taken) < 9 else []
            assert sum(under_way) <= 10 or len(under_way) == 1
            results.append(result)
    assert results == taken == [1, 4, 4, 4, 100, 1, 9, 11, 2]


# --- Streams and disks ----------------------------------------------------------------------------


def test_output_that_cannot_be_shown_or_is_not_wanted_is_no_failure(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [record("x", "漢字")])
    tool = f"{sys.executable} {TOOL} {' '.join(command([source], tmp_path / 'out'))}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for line in (f"{tool}", f"{tool} | true; exit ${{PIPESTATUS[0]}}"):
        ended = subprocess.run(
            ["bash", "-c", line], env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        assert "Traceback" not in ended.stderr
        assert "BrokenPipe" not in ended.stderr
    assert Manifest.load(tmp_path / "out").domains[0].name == "漢字"


def test_a_full_disk_while_the_tokenizer_is_copied_names_the_copy(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = train_sentencepiece(tmp_path / "tiny")
    kind = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as a disk that has no more room
    try:
        assert main(["--input", *sources, "--output-dir", str(tmp_path / "out"), *kind]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    copy = rf"{tmp_path}/out/{re.escape(FOLDER_NAME)}/tokenizer\.\w+/tiny\.model"
    assert re.match(rf"error: {copy}: File too large\n", capsys.readouterr().err)
