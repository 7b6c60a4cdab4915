"""Preprocessing on many machines: parts side by side, or a Ray cluster, give the same files."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from preprocessing import (
    BYTE_FLAGS,
    TOOL,
    contents,
    load_main,
    make_texts,
    record,
    records,
    shard_folder,
    write,
)

from megatron_acodm.preprocess.workspace import FOLDER_NAME, Workspace

main = load_main()


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    lines = records(make_texts())
    inputs = [write(folder / f"{n}.jsonl.zst", lines[n::5]) for n in range(5)]
    return ["--input", *inputs, *BYTE_FLAGS]


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one run over all inputs."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert main([*flags, "--output-dir", str(folder)]) == 0
    return contents(folder)


# --- Parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 7])
def test_parts_that_are_built_side_by_side_merge_to_the_files_of_one_run(
    parts: int, flags: list[str], whole: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = [*flags, "--output-dir", str(tmp_path / "out")]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(
            target=lambda n=number: os._exit(main([*arguments, "--shard", f"{n}/{parts}"]))
        )
        for number in range(parts)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {FOLDER_NAME}
    assert main([*arguments, "--merge"]) == 0
    assert contents(tmp_path / "out") == whole


def test_parts_hold_every_input_once(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = []
    for number in range(3):
        arguments = [*flags, "--output-dir", str(tmp_path / "out"), "--shard", f"{number}/3"]
        assert main(arguments) == 0
        counts += re.findall(r"--shard \d/3: (\d) inputs are done", capsys.readouterr().out)
    assert counts == ["1", "2", "2"]
    shards = (tmp_path / "out" / FOLDER_NAME / "shards").glob("*/shard.json")
    expected = {shard_folder(tmp_path / "out", name) for name in flags[1:6]}
    assert {path.parent for path in shards} == expected


def test_a_merge_names_the_inputs_that_are_missing(
    flags: list[str],
    whole: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*flags, "--output-dir", str(tmp_path / "out")]
    assert main([*arguments, "--shard", "1/3"]) == 0
    assert main([*arguments, "--merge"]) == 1
    error = capsys.readouterr().err
    assert re.search(r"error: 3 of 5 inputs have no finished shard: \S+0\.jsonl\.zst, ", error)
    assert "1.jsonl.zst" not in error
    assert main(arguments) == 0  # builds what is missing, and merges
    assert "2 of 5 inputs are done already" in capsys.readouterr().err
    assert contents(tmp_path / "out") == whole


def test_only_one_run_is_at_a_shard_and_none_beside_a_merge(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*flags, "--output-dir", str(tmp_path / "out")]

    def attempt(*more: str) -> int | None:
        process = multiprocessing.get_context("fork").Process(
            target=lambda: os._exit(main([*arguments, *more]))
        )
        process.start()
        process.join(60)
        return process.exitcode

    with Workspace(tmp_path / "out", shared=True) as workspace:
        keys = [shard_folder(tmp_path / "out", name).name for name in flags[1:3]]
        assert workspace.lock_shards(keys[:1]) is None
        assert attempt("--shard", "0/5") == 1
        assert attempt("--shard", "1/5") == 0
        assert attempt("--merge") == 1
        assert attempt() == 1
    with Workspace(tmp_path / "out"):
        assert attempt("--shard", "1/5") == 1
    assert attempt("--shard", "0/5") == 0


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("5/5", "error: --shard is 5/5; it counts from 0/5 to 4/5"),
        ("0/0", "error: --shard is 0/0; there must be at least one part"),
        ("1", "'1' is not like 0/8"),
        ("-1/5", "'-1/5' is not like 0/8"),
    ],
)
def test_a_part_that_there_is_not_is_refused(
    shard: str,
    message: str,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with contextlib.suppress(SystemExit):
        assert main([*flags, "--output-dir", str(tmp_path / "out"), f"--shard={shard}"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- Ray ------------------------------------------------------------------------------------------

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (the extra 'ray')"
)


def start_on_ray(
    arguments: list[str], folder: Path, address: str | None = None
) -> subprocess.Popen[str]:
    """Start the tool on a Ray of its own, on this machine, or on the one at an address."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_ADDRESS": address} if address else {}
    return subprocess.Popen(
        [sys.executable, str(TOOL), *arguments, "--engine", "ray"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Ray's sockets lie in it, and a socket's path has 107 bytes at most."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@needs_ray
def test_a_worker_that_is_lost_on_ray_is_replaced_and_the_files_are_those_of_one_run(
    tmp_path: Path, short_path: Path
) -> None:
    lines = records(make_texts()) * 600  # long enough to be met at work
    inputs = [write(tmp_path / f"{n}.jsonl", lines[n::4]) for n in range(4)]
    flags = ["--input", *inputs, "--tokenizer-type", "ByteLevelTokenizer", "--workers", "1"]
    assert main([*flags, "--output-dir", str(tmp_path / "out")]) == 0
    for attempt in range(4):  # until the worker that is killed has not just finished its task
        out = tmp_path / f"ray{attempt}"
        process = start_on_ray([*flags, "--output-dir", str(out)], short_path)
        try:
            shards = out / FOLDER_NAME / "shards"
            wait_for_task(process, shards).kill()
            begun = set[str]()
            while process.poll() is None:
                with contextlib.suppress(FileNotFoundError):  # it goes in the end
                    begun |= {path.name for path in shards.glob("*.*")}
                time.sleep(0.002)
            output, _ = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == 0, output
        assert contents(out) == contents(tmp_path / "out")
        keys = [name.partition(".")[0] for name in begun]
        if max(map(keys.count, keys), default=0) >= 2:
            return
    raise AssertionError("no input was begun twice")


def wait_for_task(driver: subprocess.Popen[str], shards: Path) -> psutil.Process:
    """Wait until a shard is being built; return its worker."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and driver.poll() is None:
        if list(shards.glob("*.*/00000.bin")):
            for child in psutil.Process(driver.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "ray::_build" in " ".join(child.cmdline()):
                        return child
        time.sleep(0.005)
    raise AssertionError("no task was seen at work")


@needs_ray
def test_a_malformed_line_on_ray_is_the_error_that_it_is_anywhere(
    tmp_path: Path, short_path: Path
) -> None:
    inputs = [
        write(tmp_path / "good.jsonl", [record()]),
        write(tmp_path / "bad.jsonl", [record(), b"nonsense"]),
    ]
    flags = ["--input", *inputs, "--output-dir", str(tmp_path / "out"), *BYTE_FLAGS]
    process = start_on_ray(flags, short_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    error = re.escape(f"error: {inputs[1]}, line 2: not JSON")
    assert re.search(f"^{error}", output, re.MULTILINE)
    assert "Traceback" not in output


@needs_ray
def test_a_cluster_must_have_the_cpus_and_a_stopped_run_says_so(
    tmp_path: Path, short_path: Path
) -> None:
    long = write(tmp_path / "long.jsonl", records(make_texts()) * 500)
    flags = ["--input", long, "--output-dir", str(tmp_path / "out"), *BYTE_FLAGS]
    with one_cpu_cluster(short_path) as address:
        process = start_on_ray(flags, short_path, address)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1
        expected = "error: --workers is 2, .* no node of the cluster has more than 1;"
        assert re.search(f"^{expected} lower --workers", output, re.MULTILINE)
        process = start_on_ray([*flags, "--workers", "1"], short_path, address)
        shards = tmp_path / "out" / FOLDER_NAME / "shards"
        deadline = time.monotonic() + 180
        while not list(shards.glob("*.*/00000.bin")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 143, output
        assert output.endswith("terminated\n")


@contextlib.contextmanager
def one_cpu_cluster(folder: Path) -> Iterator[str]:
    """A Ray cluster of one CPU; its address."""
    code = (
        "import ray, sys; from ray.cluster_utils import Cluster\n"
        "cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 1})\n"
        "print('address', cluster.address, flush=True)\n"
        "sys.stdin.read(); cluster.shutdown()\n"
    )
    environment = os.environ | {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, **pipes
    ) as cluster:
        assert cluster.stdout is not None
        yield next(line.split()[1] for line in cluster.stdout if line.startswith("address "))
        cluster.communicate()


def test_without_ray_the_extra_is_named(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    assert main([*flags, "--output-dir", str(tmp_path / "out"), "--engine", "ray"]) == 1
    assert "pip install 'megatron-acodm[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
