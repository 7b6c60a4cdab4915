"""What a save starts is deaf to SIGTERM, also the first time, and nothing else is."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_acodm.megatron.signals import helpers_spared_sigterm

MANAGER = """
import multiprocessing, os, signal
from megatron_acodm.megatron.signals import helpers_spared_sigterm
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")  # as megatron-core's; also starts a tracker
    with helpers_spared_sigterm():
        manager = context.Manager()
    queue = manager.Queue()
    os.kill(manager._process.pid, signal.SIGTERM)
    manager._process.join(1)
    queue.put(3)
    print(queue.get(), signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_a_manager_that_a_save_starts_survives_sigterm_and_ends_with_its_process(
    tmp_path: Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(MANAGER, encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "3 False\n"), done.stderr


def test_the_mask_is_as_before_after_an_error() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.SIGTERM not in before
    with pytest.raises(OSError, match="full"), helpers_spared_sigterm():
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        raise OSError("full")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
