"""Code that a model wrote runs to its end or into a limit, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from megatron_acodm.evaluation.code_execution import Limits, can_isolate, execute

BRIEF = Limits(seconds=1, memory_bytes=1 << 28, file_bytes=1 << 20)


def test_a_program_that_gets_to_its_end_passes() -> None:
    assert execute("def f(x):\n    return x + 1\nassert f(1) == 2\n").passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'wrong answer'", "wrong answer"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "exit status 0"),
        ("import os\nos._exit(0)", "exit status 0"),
        ("raise SystemExit", "exit status 0"),
        ("print('almost')\nimport os\nos.abort()", "exit status"),
    ],
)
def test_a_program_that_does_not_get_there_fails(program: str, reason: str) -> None:
    outcome = execute(program)
    assert not outcome.passed and reason in outcome.reason


def test_output_does_not_count(capfd: pytest.CaptureFixture[str]) -> None:
    assert execute("print('x' * 100_000)\nimport threading", BRIEF).passed
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)"])
def test_an_endless_program_is_ended(program: str) -> None:
    start = time.monotonic()
    outcome = execute(program, BRIEF)
    assert not outcome.passed and outcome.reason == "timed out"
    assert time.monotonic() - start < 45


def test_memory_is_limited() -> None:
    assert execute("x = bytearray(1 << 26)", BRIEF).passed
    assert "MemoryError" in execute("x = bytearray(1 << 29)", BRIEF).reason


def test_files_and_output_are_limited() -> None:
    assert execute("open('a', 'wb').write(b'x' * 1000)", BRIEF).passed
    assert "File too large" in execute("open('a', 'wb').write(b'x' * (1 << 21))", BRIEF).reason
    assert not execute("while True: print('x' * 10_000)", BRIEF).passed


def test_the_program_has_a_folder_of_its_own_and_no_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = f"""
import os, sys
assert "API_TOKEN" not in os.environ
assert os.path.dirname(os.getcwd()) == {str(tmp_path)!r}, os.getcwd()
assert os.listdir() == ["program.py"]
assert sys.stdin.read() == ""
open("left.txt", "w").write("x")
"""
    outcome = execute(program)
    assert outcome.passed, outcome.reason
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def _isolation() -> None:
    if not can_isolate():
        pytest.skip("this system gives no user namespaces, so there is nothing to keep code in")


@pytest.mark.usefixtures("_isolation")
def test_the_network_is_out_of_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        outcome = execute(program)
    assert not outcome.passed and "unreachable" in outcome.reason


@pytest.mark.usefixtures("_isolation")
def test_no_process_outlives_its_program(tmp_path: Path) -> None:
    if os.getuid() != 0:
        assert not execute("import os\nos.fork()").passed  # it may start none
        return
    sign = tmp_path / "sign"
    sign.touch()
    program = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    while True:
        os.utime({str(sign)!r})
        time.sleep(0.05)
time.sleep(0.3)
"""
    assert execute(program).passed
    last = sign.stat().st_mtime_ns
    time.sleep(0.3)
    assert sign.stat().st_mtime_ns == last
