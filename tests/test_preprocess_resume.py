"""Preprocessing that is killed anywhere: the same command ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preprocessing import (
    BYTE_FLAGS,
    contents,
    documents,
    identity,
    load_main,
    make_texts,
    published,
    record,
    records,
    shard_folder,
    write,
)
from tiny_tokenizer import train_sentencepiece

from megatron_acodm.megatron.indexed import IndexCounts, read_index_counts
from megatron_acodm.preprocess import shard
from megatron_acodm.preprocess.manifest import Manifest
from megatron_acodm.preprocess.merge import DatasetMerge, Part
from megatron_acodm.preprocess.reader import InputFile
from megatron_acodm.preprocess.workspace import FOLDER_NAME

main = load_main()

DURABLE_STEPS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")
"""Calls that change what is on the disk, between which a kill makes a difference."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Inputs that share domains, of which one has empty documents only, and one no document."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = records(make_texts())
    third = len(lines) // 3
    parts = [lines[:third], [record("", "Nothing")], [], lines[third:], [record("b", "Late")]]
    return [write(folder / f"{n}.jsonl.zst", part) for n, part in enumerate(parts)]


@pytest.fixture(scope="module")
def flags(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = train_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tiny")
    kind = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    return ["--input", *inputs, *kind, "--workers", "2"]


@pytest.fixture(scope="module")
def undisturbed(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main([*flags, "--output-dir", str(folder)]) == 0
    return contents(folder)


def in_a_group_of_its_own(work: Callable[[], int]) -> int:
    """Run in a process group of its own; return the exit code, negative for a signal."""

    def target() -> None:
        os.setsid()
        os._exit(work())

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def run_until_step(arguments: list[str], last: int, count: Any = None) -> int:
    """Run the tool, and kill it and its workers at its ``last``-th durable step, if it has that.

    ``count``, a shared integer, receives the steps.
    """
    count = count or multiprocessing.get_context("fork").Value("i", 0)

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            with count.get_lock():
                count.value += 1
                number = count.value
            if number == last and last % 2:
                os.killpg(0, signal.SIGKILL)
            try:
                return call(*args, **options)
            finally:
                if number == last:
                    os.killpg(0, signal.SIGKILL)

        return step

    def work() -> int:
        for name in DURABLE_STEPS:
            setattr(os, name, watched(name, getattr(os, name)))
        return main(arguments)

    return in_a_group_of_its_own(work)


def run_until_exists(file: Path, arguments: list[str], out: Path) -> None:
    """Run the tool from the start, killed at ever later steps, until it leaves a file behind."""
    for step in itertools.count(60, 3):
        assert run_until_step(arguments, step) != 0
        if file.exists():
            return
        shutil.rmtree(out, ignore_errors=True)


def finished(out: Path) -> set[str]:
    return {path.parent.name for path in (out / FOLDER_NAME).glob("shards/*/shard.json")}


def run_again(arguments: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run to the end; no finished shard may be built again."""
    before, built = finished(out), []

    class SpiedWriter(shard.ShardWriter):
        def __init__(self, shards: Path, item: InputFile, *rest: Any) -> None:
            built.append(shard.shard_key(item.path))
            super().__init__(shards, item, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("megatron_acodm.preprocess.shard.ShardWriter", SpiedWriter)
        assert main(arguments) == 0
    assert not before & set(built)
    assert not (out / FOLDER_NAME).exists()


STRETCHES = 15
"""Of a run, of which each is killed in, the last one at its last step."""


def step_in(stretch: int, count: int) -> int:
    """A step in a stretch of a run of ``count`` steps."""
    if stretch == STRETCHES - 1:
        return count
    bounds = [number * count // STRETCHES for number in (stretch, stretch + 1)]
    return random.Random(stretch).randrange(bounds[0] + 1, bounds[1] + 1)


@pytest.fixture(scope="module")
def steps(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> int:
    """Durable steps of a run."""
    arguments = [*flags, "--output-dir", str(tmp_path_factory.mktemp("counted") / "out")]
    count = multiprocessing.get_context("fork").Value("i", 0)
    assert run_until_step(arguments, -1, count) == 0
    return count.value


@pytest.mark.parametrize("stretch", range(STRETCHES))
def test_a_run_killed_at_any_step_is_finished_by_the_same_command(
    stretch: int,
    steps: int,
    flags: list[str],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    arguments = [*flags, "--output-dir", str(out)]
    step = step_in(stretch, steps)
    code = run_until_step(arguments, step)
    print(f"step {step}: exit code {code}, {len(finished(out))} shards")
    assert code in (-signal.SIGKILL, 0)
    assert (out / "manifest.json").exists() <= (published(out).items() >= undisturbed.items())
    run_again(arguments, out, monkeypatch)
    assert contents(out) == undisturbed


@pytest.mark.parametrize("stretch", range(0, STRETCHES, 2))
def test_an_overwriting_run_killed_at_any_step_leaves_the_old_corpus_or_ends_as_the_new(
    stretch: int,
    steps: int,
    flags: list[str],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    old = write(tmp_path / "old.jsonl", [record("a", "Old"), record("b", "Late")])
    assert main(["--input", old, "--output-dir", str(out), *BYTE_FLAGS]) == 0
    before = contents(out)
    arguments = [*flags, "--output-dir", str(out), "--overwrite"]
    run_until_step(arguments, step_in(stretch, steps))
    is_recorded = (out / FOLDER_NAME / "manifest.json").exists()
    assert is_recorded or published(out) in (before, undisturbed)
    run_again(arguments, out, monkeypatch)
    assert contents(out) == undisturbed


def test_another_command_first_completes_a_publication_that_was_cut_short(
    flags: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out, other = tmp_path / "out", write(tmp_path / "other.jsonl", [record("x", "Other")])
    arguments = [*flags, "--output-dir", str(out)]
    run_until_exists(out / FOLDER_NAME / "manifest.json", arguments, out)
    overwriting = ["--input", other, "--output-dir", str(out), *BYTE_FLAGS]
    assert main(overwriting) == 1
    assert contents(out) == undisturbed
    assert main([*overwriting, "--overwrite"]) == 0
    assert set(contents(out)) == {f"Other_text_document.{e}" for e in ("bin", "idx")} | {
        "manifest.json"
    }


def test_a_new_corpus_takes_the_place_of_one_whose_publication_was_cut_short(
    flags: list[str], tmp_path: Path
) -> None:
    out, other = tmp_path / "out", write(tmp_path / "other.jsonl", [record("x", "Other")])
    arguments = [*flags, "--output-dir", str(out)]
    run_until_exists(out / FOLDER_NAME / "manifest.json", arguments, out)
    assert main(["--input", other, "--output-dir", str(out), *BYTE_FLAGS, "--overwrite"]) == 0
    assert [domain.name for domain in Manifest.load(out).domains] == ["Other"]
    assert not (out / FOLDER_NAME).exists()


def test_a_run_that_is_killed_again_and_again_ends_all_the_same(
    flags: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = [*flags, "--output-dir", str(tmp_path / "out")]
    for step in itertools.count(25, 4):
        if run_until_step(arguments, step) == 0:
            break
    assert contents(tmp_path / "out") == undisturbed


# --- What is reused, and what is not --------------------------------------------------------------


@contextmanager
def changed(name: str) -> Iterator[Path]:
    """Let a file be changed, and restore it with its times."""
    path = Path(name)
    data, status = path.read_bytes(), path.stat()
    yield path
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def interrupted(
    flags: list[str], inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Path:
    """An output folder with three of five inputs done, since the fourth cannot be read."""
    with changed(inputs[3]) as broken:
        broken.write_bytes(broken.read_bytes()[:-1])
        assert main([*flags, "--output-dir", str(tmp_path / "out")]) == 1
    done = {shard_folder(tmp_path / "out", name).name for name in inputs[:3]}
    assert finished(tmp_path / "out") == done
    return tmp_path / "out"


def test_an_error_keeps_the_finished_inputs_and_says_so(
    interrupted: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    error = capsys.readouterr().err
    assert re.match("kept: 3 of 5 inputs are done; the same command goes on from there\n", error)
    assert re.search(r"^error: .*3\.jsonl\.zst is truncated", error, re.MULTILINE)
    assert {path.name for path in interrupted.iterdir()} == {FOLDER_NAME}
    assert main([*flags, "--output-dir", str(interrupted)]) == 0
    assert "3 of 5 inputs are done already" in capsys.readouterr().err


def test_a_finished_input_that_changes_is_read_again(
    interrupted: Path, flags: list[str], inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with changed(inputs[1]) as path:
        write(path, [record("now with text", "Nothing")])
        assert main([*flags, "--output-dir", str(interrupted)]) == 0
    error = capsys.readouterr().err
    assert "2 of 5 inputs are done already" in error
    assert f"{inputs[1]}: what is done was made before the file was changed" in error
    assert "Nothing" in [domain.name for domain in Manifest.load(interrupted).domains]


def test_a_finished_input_that_was_only_touched_is_kept(
    interrupted: Path, flags: list[str], inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with changed(inputs[0]) as path:
        os.utime(path)
        assert main([*flags, "--output-dir", str(interrupted)]) == 0
    assert "3 of 5 inputs are done already" in capsys.readouterr().err


def test_another_tokenizer_uses_nothing_of_what_is_done(
    interrupted: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", *inputs, "--output-dir", str(interrupted), *BYTE_FLAGS]
    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert "done already" not in error
    assert f"{inputs[0]}: what is done was made with another tokenizer" in error
    assert documents(Manifest.load(interrupted).domains[1].prefix) == [[ord("b"), 256]]


def test_a_damaged_shard_is_built_again(
    interrupted: Path, flags: list[str], inputs: list[str], undisturbed: dict[str, bytes]
) -> None:
    (shard_folder(interrupted, inputs[0]) / "00001.lengths").write_bytes(b"")
    (shard_folder(interrupted, inputs[1]) / "shard.json").write_text("{")
    assert main([*flags, "--output-dir", str(interrupted)]) == 0
    assert published(interrupted).keys() == undisturbed.keys()


def test_lines_that_were_skipped_are_refused_without_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [
        write(tmp_path / "a.jsonl", [record(), b"bad"]),
        write(tmp_path / "b.jsonl.gz", [record()]),
    ]
    whole = Path(sources[1]).read_bytes()
    Path(sources[1]).write_bytes(whole[:-1])
    flags = ["--input", *sources, "--output-dir", str(tmp_path / "out"), *BYTE_FLAGS]
    assert main([*flags, "--skip-bad-lines"]) == 1
    Path(sources[1]).write_bytes(whole)
    capsys.readouterr()
    assert main(flags) == 1
    assert re.match(r"error: .*a\.jsonl, line 2: not JSON", capsys.readouterr().err)
    assert main([*flags, "--skip-bad-lines"]) == 0
    assert main(flags) == 1
    assert "made with --skip-bad-lines" in capsys.readouterr().err


def test_a_merge_that_was_cut_short_is_not_mixed_with_other_inputs(
    flags: list[str],
    inputs: list[str],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = [*flags, "--output-dir", str(out)]
    run_until_exists(out / FOLDER_NAME / "merging", arguments, out)
    without_last = [flag for flag in arguments if flag != inputs[4]]
    turned = [*arguments[:1], *arguments[2:6], inputs[0], *arguments[6:]]
    for other, message in (
        (without_last, f"its input 5 was {inputs[4]}, not none"),
        (turned, f"its input 1 was {inputs[0]}, not {inputs[1]}"),
        (
            ["--input", *inputs, *arguments[-2:], *BYTE_FLAGS],
            f"{inputs[0]} was made with another tokenizer",
        ),
        ([*arguments, "--shard", "0/2"], "run its command again (with --merge, or"),
    ):
        before = contents(out)
        capsys.readouterr()
        assert main(other) == 1
        assert message in capsys.readouterr().err
        after = contents(out)
        assert {n: d for n, d in before.items() if "/tokenizer." not in n} == after
    with changed(inputs[3]) as path:
        write(path, [record("changed")])
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert f"what it has of {inputs[3]} was made before the file was changed" in error
    assert main([*arguments, "--merge"]) == 0
    assert contents(out) == undisturbed


@pytest.mark.parametrize("back", [False, True], ids=["", "a removed part is back"])
@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("joined", range(5))
def test_a_merge_goes_on_from_every_state_that_a_kill_or_a_power_cut_leaves(
    joined: int, cut: int, back: bool, tmp_path: Path
) -> None:
    data = [b"aaaa", b"", b"bbbbbb", b"cc"]
    parts = [Part(tmp_path / str(number), len(part)) for number, part in enumerate(data)]
    for number, part in enumerate(data):
        lengths = np.array([len(part) // 2], dtype=np.int32)
        Path(f"{parts[number].prefix}.lengths").write_bytes(lengths.tobytes())
        if number >= joined or (back and number == joined - 2):
            Path(f"{parts[number].prefix}.bin").write_bytes(part)
    if joined:
        unfinished = data[joined][:cut] if joined < len(data) else b"xx"[:cut]
        (tmp_path / "a.bin").write_bytes(b"".join(data[:joined]) + unfinished)
    merge = DatasetMerge(tmp_path / "a", tmp_path / "a.json", np.dtype(np.uint16), parts)
    checksums = merge.run()
    assert (tmp_path / "a.bin").read_bytes() == b"aaaabbbbbbcc"
    assert checksums.bin_sha256 == hashlib.sha256(b"aaaabbbbbbcc").hexdigest()
    counts = read_index_counts(tmp_path / "a.idx", np.dtype(np.uint16))
    assert counts == IndexCounts(documents=4, empty_documents=1, tokens=6)
    assert list(tmp_path.glob("*.bin")) == [tmp_path / "a.bin"]
    assert merge.run() == checksums


def test_a_merge_whose_file_is_too_short_says_so(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.lengths").write_bytes(np.array([2], dtype=np.int32).tobytes())
    (tmp_path / "a.bin").write_bytes(b"abc")
    parts = [Part(tmp_path / "0", 4), Part(tmp_path / "1", 4)]
    merge = DatasetMerge(tmp_path / "a", tmp_path / "a.json", np.dtype(np.uint16), parts)
    with pytest.raises(OSError, match=r"has 3 bytes, not the 8 that were written"):
        merge.run()


# --- A corpus that is complete --------------------------------------------------------------------


@pytest.fixture
def complete(tmp_path: Path) -> tuple[Path, list[str]]:
    sources = [write(tmp_path / f"{name}.jsonl", [record(name)]) for name in "ab"]
    arguments = ["--input", *sources, "--output-dir", str(tmp_path / "out"), *BYTE_FLAGS]
    assert main(arguments) == 0
    return tmp_path / "out", arguments


def test_the_same_command_leaves_a_complete_corpus_alone(
    complete: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, arguments = complete
    before = {path: identity(path) for path in out.iterdir()}
    os.utime(arguments[1])  # its content decides
    assert main(arguments) == main([*arguments, "--merge"]) == 0
    assert main([*arguments, "--shard", "1/2"]) == 0
    assert "were complete already; nothing was done" in capsys.readouterr().out
    assert {path: identity(path) for path in before} == before


def test_an_input_that_changed_since_is_named(
    complete: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, arguments = complete
    before = contents(out)
    write(Path(arguments[2]), [record("c")])
    assert main(arguments) == 1
    assert re.search(
        r"already holds a corpus that was made before \S+b\.jsonl was changed; pass --overwrite",
        capsys.readouterr().err,
    )
    assert contents(out) == before
    assert main([*arguments, "--overwrite"]) == 0
    assert documents(Manifest.load(out).domains[0].prefix) == [[97, 256], [99, 256]]


def test_a_corpus_that_is_not_whole_is_not_taken_for_complete(
    complete: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, arguments = complete
    (out / "A_text_document.bin").write_bytes(b"")
    assert main(arguments) == 1
    assert "but no complete corpus" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    Manifest.load(out)


# --- Errors in the merge --------------------------------------------------------------------------


def test_a_disk_that_is_full_in_the_merge_is_one_clear_error_and_the_rest_is_done_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [write(tmp_path / f"{name}.jsonl", [record(name * 60_000)]) for name in "abc"]
    arguments = ["--input", *sources, "--output-dir", str(tmp_path / "out"), *BYTE_FLAGS]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, hard))  # as a disk that has no more room
    try:
        assert main(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert re.search(r"^error: \S+_document\.bin: File too large$", error, re.MULTILINE)
    assert "kept: 3 of 3 inputs are done" in error
    assert {path.name for path in (tmp_path / "out").iterdir()} == {FOLDER_NAME}
    assert main(arguments) == 0
    stored = documents(Manifest.load(tmp_path / "out").domains[0].prefix)
    assert stored == [[*(name * 60_000).encode(), 256] for name in "abc"]


def test_an_input_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    from megatron_acodm.preprocess.reader import InputFile

    source = InputFile(write(tmp_path / "a.jsonl", [record()]))
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(json.dumps(record()).encode() + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl was changed while it was read; run again"):
        list(source.chunks())
