"""Which errors are a lost rank's, which a failed save's, and which stay what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_acodm.megatron.failures import TRACKER, SaveFailed, lost_rank, naming_failed_save

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]"
NCCL = "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3) ran for 600000 ms"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(GLOO), "Connection closed by peer [::1]"),
        (RuntimeError("in a step\n" + NCCL), NCCL),
        (CheckpointException("save", {0: (RuntimeError(GLOO), None)}), "Connection closed by peer"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (OSError("connection closed"), None),
    ],
)
def test_a_lost_rank_is_told_by_what_the_collective_says(
    error: BaseException, said: str | None
) -> None:
    found = lost_rank(error)
    assert found is None if said is None else found is not None and said in found


def test_a_save_that_fails_says_where_why_and_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("40", encoding="utf-8")
    full = OSError(28, "No space left on device")
    with pytest.raises(SaveFailed) as failed, naming_failed_save(tmp_path, 45):
        raise full
    message = str(failed.value)
    assert f"the checkpoint of step 45 could not be written to {tmp_path}" in message
    assert "No space left on device" in message and "MB are free there" in message
    assert f"with --load {tmp_path}, goes on after step 40" in message
    assert failed.value.__cause__ is full


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
        RuntimeError("NCCL error: unhandled system error"),
        RuntimeError(GLOO),
        ValueError("a mistake in the code"),
    ],
)
def test_what_is_not_the_files_fault_is_not_called_a_failed_save(
    error: Exception, tmp_path: Path
) -> None:
    with pytest.raises(type(error)) as raised, naming_failed_save(tmp_path, 45):
        raise error
    assert raised.value is error


def test_an_error_of_the_device_is_found_below_the_savers_own(tmp_path: Path) -> None:
    def fails_at_the_device() -> None:
        try:
            raise RuntimeError("CUDA error: device-side assert triggered")
        except RuntimeError as error:
            raise RuntimeError("writer failed") from error

    with (
        pytest.raises(RuntimeError, match="writer failed") as raised,
        naming_failed_save(tmp_path, 45),
    ):
        fails_at_the_device()
    assert not isinstance(raised.value, SaveFailed)
