"""Lets data-loading workers, forked or spawned, see the stages that the training process appends.

The most recent stages lie in a ring in shared memory: its size does not depend on the length of the
run. There are no locks, which a killed worker could leave held: every record carries its stage
number and a checksum, so that a reader recognises one that is being overwritten and reads again.

The memory is a shared torch tensor, because torch's DataLoader already hands those to workers under
every start method, and the system frees it with its last user, however that one ends.
"""

from __future__ import annotations

import os
import time
import zlib
from typing import Any

import numpy as np
import torch

from megatron_acodm.blending import mapping
from megatron_acodm.blending.mapping import Int64Array, UInt64Array

# The header's numbers. NUM_SAMPLES is written last: whoever sees it sees the stages it counts.
_NUM_SAMPLES, _NUM_STAGES, _FIRST_STAGE, _GENERATION, _CLOSED = range(5)

_SHORTEST_PAUSE_S = 50e-6
_LONGEST_PAUSE_S = 5e-3


class StageRing:
    """A bounded window on a ledger's last stages, written by one process and read by many.

    A record is ``[stage, generation, row before, row after, crc]``, int64, with the rows of
    ``mapping``. The generation counts how often the ledger was replaced by a restored one.
    """

    def __init__(self, row_width: int, window: int) -> None:
        if window < 1:
            raise ValueError(f"window is {window}; readers need to see at least 1 stage")
        self.window = window
        self._header = torch.zeros(5, dtype=torch.int64).share_memory_()
        record_width = 2 * row_width + 3
        self._records = torch.zeros(window, record_width, dtype=torch.int64).share_memory_()

    @property
    def header(self) -> Int64Array:
        """[5] the header's numbers, shared."""
        return self._header.numpy()

    def publish(self, stage: int, rows: Int64Array) -> None:
        """Show readers a new stage, given its two rows."""
        self._write(stage, rows)
        self.header[_NUM_STAGES] = stage + 1
        self.header[_NUM_SAMPLES] = rows[1, 0]

    def publish_all(self, base_stage: int, rows: Int64Array) -> None:
        """Show readers another ledger, given its rows from stage ``base_stage`` on."""
        self.header[_NUM_SAMPLES] = 0
        self.header[_GENERATION] += 1
        num_stages = len(rows) - 1
        first = max(0, num_stages - self.window)
        for i in range(first, num_stages):
            self._write(base_stage + i, rows[i : i + 2])
        self.header[_FIRST_STAGE] = base_stage + first
        self.header[_NUM_STAGES] = base_stage + num_stages
        self.header[_NUM_SAMPLES] = rows[-1, 0]

    def close(self) -> None:
        """Tell readers that no stage will follow."""
        self.header[_CLOSED] = 1

    def _write(self, stage: int, rows: Int64Array) -> None:
        record = np.empty(self._records.shape[1], dtype=np.int64)
        record[:2] = stage, self.header[_GENERATION]
        record[2:-1] = rows.reshape(-1)
        record[-1] = zlib.crc32(record[:-1].data)
        self._records.numpy()[stage % self.window] = record

    def read(self, stage: int) -> Int64Array | None:
        """The rows [2, 2K + 2] of a stage, or None when its record is being overwritten."""
        record = self._records.numpy()[stage % self.window].copy()
        current = record[0] == stage and record[1] == self.header[_GENERATION]
        if not current or record[-1] != zlib.crc32(record[:-1].data):
            return None
        return record[2:-1].reshape(2, -1)

    def find(self, index: int) -> tuple[int, Int64Array] | None:
        """The stage of a sample and its rows; None when it is not decided, or not readable now.

        Raises:
            RuntimeError: when the sample is older than the window.
        """
        generation = self.header[_GENERATION].copy()
        if index >= self.header[_NUM_SAMPLES]:
            return None
        high = int(self.header[_NUM_STAGES]) - 1
        low = oldest = max(int(self.header[_FIRST_STAGE]), high + 1 - self.window)
        while low <= high:  # the stage lies in [low, high], if it is there at all
            middle = (low + high) // 2
            rows = self.read(middle)
            if rows is None:
                return None
            if rows[0, 0] <= index < rows[1, 0]:
                return middle, rows
            low, high = (low, middle - 1) if index < rows[0, 0] else (middle + 1, high)
        # Processors may show the new count of samples before that of stages.
        rows = self.read(oldest)
        if rows is None or index >= rows[0, 0] or self.header[_GENERATION] != generation:
            return None
        raise RuntimeError(
            f"sample {index} is older than the {self.window} most recent stages, all that "
            "data-loading workers can see; samples must be drawn in order"
        )


class LedgerReader:
    """Locates single samples in any process, waiting for their stage where that makes sense.

    Made by ``Ledger.reader``; goes to workers with the dataset, by fork or pickled. In the
    process of the ledger it never waits, since the stage could then not be appended.
    """

    def __init__(
        self,
        ring: StageRing,
        granule_size: int,
        seed: int,
        sizes: Int64Array,
        streams: UInt64Array,
        timeout_s: float,
    ) -> None:
        if timeout_s <= 0:
            raise ValueError(f"blending.stage_timeout_s is {timeout_s}; it must be positive")
        self.sizes = sizes
        self.timeout_s = timeout_s
        self._ring = ring
        self._granule_size = granule_size
        self._seed = seed
        self._streams = streams
        self._owner = os.getpid()
        self._parent: int | None = None
        self._cached: tuple[int, int, Int64Array] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parent": None, "_cached": None}

    def locate(self, index: int) -> tuple[int, int]:
        """Domain and position in it of a sample; waits like ``wait_for``."""
        stage, rows = self._stage_of(index)
        domains, positions = mapping.locate(
            rows, stage, self._granule_size, self._seed, np.array([index], dtype=np.int64)
        )
        return int(domains[0]), int(positions[0])

    def sequence(self, index: int) -> tuple[int, int]:
        """Domain and sequence of it, in [0, size of the domain), of a sample; waits likewise."""
        domain, position = self.locate(index)
        only = slice(domain, domain + 1)
        _, sequences = mapping.epoch_and_index(
            np.zeros(1, dtype=np.int32),
            np.array([position], dtype=np.int64),
            self.sizes[only],
            self._streams[only],
            self._seed,
        )
        return domain, int(sequences[0])

    def wait_for(self, index: int, timeout_s: float | None = None) -> None:
        """Return once sample ``index`` is decided.

        Args:
            index: global sample index.
            timeout_s: the longest wait; the reader's own by default.

        Raises:
            TimeoutError: when the stage was not appended in time.
            RuntimeError: in the process of the ledger, which would wait for itself; when that
                process has ended or closed the ledger; when the sample is older than the window.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        start = time.monotonic()
        pause = _SHORTEST_PAUSE_S
        generation = int(self._ring.header[_GENERATION])
        while (found := self._ring.find(index)) is None:
            waited = time.monotonic() - start
            self._check_worth_waiting(index)
            if waited > timeout_s:
                raise TimeoutError(
                    f"sample {index} is not decided after waiting {waited:.1f} s: the ledger holds "
                    f"{self._ring.header[_NUM_SAMPLES]} samples in "
                    f"{self._ring.header[_NUM_STAGES]} stages. The training process is stuck, or a "
                    "step takes longer than that: then raise blending.stage_timeout_s, now "
                    f"{timeout_s:g}"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        self._cached = (generation, *found)

    def _stage_of(self, index: int) -> tuple[int, Int64Array]:
        cached = self._cached
        if (
            cached is None
            or cached[0] != self._ring.header[_GENERATION]
            or not cached[2][0, 0] <= index < cached[2][1, 0]
        ):
            self.wait_for(index)
            cached = self._cached
            assert cached is not None
        return cached[1], cached[2]

    def _check_worth_waiting(self, index: int) -> None:
        num_samples = int(self._ring.header[_NUM_SAMPLES])
        if os.getpid() == self._owner:
            raise RuntimeError(
                f"sample {index} was asked for in the process that decides the mixture, which has "
                f"decided {num_samples} samples and would wait for itself. Without data-loading "
                "workers (num_workers = 0), append a step's stage before its first sample is "
                "drawn: 1 + blending.decision_lag stages before the first step, one after each"
            )
        if self._ring.header[_CLOSED]:
            raise RuntimeError(
                f"sample {index} will not be decided: the ledger was closed at sample {num_samples}"
            )
        if not self._trainer_is_alive():
            raise RuntimeError(
                f"sample {index} will not be decided: the training process {self._owner} has ended"
            )

    def _trainer_is_alive(self) -> bool:
        # The parent of a worker is the trainer, or a fork server that ends with it.
        if self._parent is None:
            self._parent = os.getppid()
        try:
            os.kill(self._owner, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it exists, under another user
            pass
        return os.getppid() == self._parent
