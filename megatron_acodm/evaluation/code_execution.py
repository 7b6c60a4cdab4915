"""Runs code that a model wrote, in a process of its own within limits.

The limits stop what models write by accident: endless loops, memory without end, processes left
behind, floods of output. They are no wall against an attacker: the code can read whatever the user
who runs it can, and write where that user may. Run it in a container that holds nothing of value.

This file is also the program that sets the limits (``main``), so it imports the standard library
alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG = 1
_START_UP_S = 10.0
"""What starting Python twice may take on top of the program's own time."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0
    """Of CPU time for each process; starting up and waiting may take _START_UP_S more."""

    memory_bytes: int = 1 << 30
    """Address space of each process."""

    file_bytes: int = 1 << 24
    """Size of each file, its output among them."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    passed: bool
    """Whether it got to its end."""

    reason: str
    """``passed``, ``timed out``, or the last line that it wrote."""


_USUAL = Limits()


def execute(program: str, limits: Limits = _USUAL) -> Outcome:
    """Run a Python program to its end, in a temporary folder and an empty environment.

    It cannot reach the network, and no process of it outlives this call, where ``can_isolate``;
    elsewhere it can, and what leaves its session does.

    Args:
        program: Python source, complete.
        limits: What it may use.
    """
    token = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(_temporary_folder()))
        output = stack.enter_context(tempfile.TemporaryFile())
        script = folder / "program.py"
        # Leaving early with status 0 is not getting to the end; the token says that it did.
        ending = f"\nimport os\nos.write(1, b'\\n{token}')\nos._exit(0)\n"
        script.write_text(program + ending, encoding="utf-8", errors="replace")
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-I", __file__, str(script), json.dumps(asdict(limits))],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limits.seconds + _START_UP_S)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timed out")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        elapsed = time.monotonic() - start
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - 4096))
        text = output.read().decode("utf-8", "replace")
    if text.endswith(token):
        return Outcome(True, "passed")
    # A limit of CPU time kills, which the isolation passes on as a status.
    killed = {code for kill in (signal.SIGKILL, signal.SIGXCPU) for code in (-kill, 128 + kill)}
    if elapsed >= limits.seconds and process.returncode in killed:
        return Outcome(False, "timed out")
    lines = text.strip().splitlines()
    return Outcome(False, lines[-1][:200] if lines else f"exit status {process.returncode}")


@functools.cache
def can_isolate() -> bool:
    """Whether this system lets programs be cut off from the network and end with their parent."""
    command = [sys.executable, "-I", __file__]
    return subprocess.run(command, env={}, check=False).returncode == 0


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="generated-code-", ignore_cleanup_errors=True)


def main(arguments: list[str]) -> int:
    """Become the program ``SCRIPT`` under ``LIMITS`` (JSON); without them, try to isolate."""
    isolated = _isolate()
    if not arguments:
        return 0 if isolated else 1
    script, limits = arguments[0], Limits(**json.loads(arguments[1]))
    if isolated:
        # The first process in the new namespace; with it, all others there end.
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _set_limits(limits)
    os.execv(sys.executable, [sys.executable, "-I", "-B", script])


def _isolate() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    flags = _CLONE_NEWUSER | _CLONE_NEWPID | _CLONE_NEWNET
    return bool(ctypes.CDLL(None).unshare(flags) == 0)


def _set_limits(limits: Limits) -> None:
    wanted = {
        resource.RLIMIT_CPU: math.ceil(limits.seconds),
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 0,  # no further process or thread; does not bind root
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
