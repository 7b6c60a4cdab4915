"""What a save starts is deaf to SIGTERM, and ends with its trainer, however that ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from multiprocessing.managers import BaseManager
from pathlib import Path

import pytest

from megatron_acodm.megatron.helpers import helpers_in_hand

MANAGER = """
import multiprocessing, os, signal
from megatron_acodm.megatron.helpers import helpers_in_hand
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")  # as megatron-core's; also starts a tracker
    with helpers_in_hand():
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


ABANDONED = """
import multiprocessing, os, signal
from megatron_acodm.megatron.helpers import helpers_in_hand
if __name__ == "__main__":
    with helpers_in_hand({arguments}):
        manager = multiprocessing.get_context("spawn").Manager()
    print(manager._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("arguments", ["", "heed_sigterm=True"])
def test_a_manager_ends_when_its_process_is_killed(tmp_path: Path, arguments: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(ABANDONED.format(arguments=arguments), encoding="utf-8")
    # Times out unless the manager, which holds the output as well, ends too.
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=30)
    assert done.returncode == -signal.SIGKILL
    assert int(done.stdout) > 0


def test_the_mask_is_as_before_after_an_error() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.SIGTERM not in before
    with pytest.raises(OSError, match="full"), helpers_in_hand():
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        raise OSError("full")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert BaseManager.start.__module__ == "multiprocessing.managers"


def test_helpers_may_be_let_heed_sigterm() -> None:
    with helpers_in_hand(heed_sigterm=True):
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
