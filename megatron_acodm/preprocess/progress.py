"""Shows how far preprocessing is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:  # it loads Megatron, which takes seconds
    from megatron_acodm.preprocess.encoder import EncodedChunk

_INTERVAL_S = 30.0


def say(message: str) -> None:
    """Tell the user what a run does; standard output is for its result."""
    with suppress(BrokenPipeError):  # no one listens
        print(message, file=sys.stderr, flush=True)


class Progress:
    """Counts documents and bytes, and shows them on standard error.

    Args:
        what: What the bytes below are of: "the input", say.
        total_bytes: How many there are.
        done_bytes: How many of them were there before.
    """

    def __init__(self, what: str, total_bytes: int, done_bytes: int = 0) -> None:
        self.documents = 0
        self.text_bytes = 0
        self._what = what
        self._done = done_bytes
        self._total = total_bytes
        self._start = self._shown = time.monotonic()
        self._bar = tqdm(
            total=total_bytes,
            initial=done_bytes,
            disable=not sys.stderr.isatty(),
            bar_format="{percentage:3.0f}%"
            + f" of {what}|"
            + "{bar}| {elapsed}<{remaining}{postfix}",
        )

    def update(self, done_bytes: int, documents: int, text_bytes: int) -> None:
        """Add what has been done since the last call; ``text_bytes`` are those of the texts."""
        self._done += done_bytes
        self.documents += documents
        self.text_bytes += text_bytes
        if not self._bar.disable:
            self._bar.set_postfix_str(self.summary(), refresh=False)
            self._bar.update(done_bytes)
        elif time.monotonic() - self._shown >= _INTERVAL_S:
            self._shown = time.monotonic()
            share = self._done / max(self._total, 1)
            say(f"{share:4.0%} of {self._what}: {self.summary()}")

    def add_chunk(self, chunk: EncodedChunk) -> None:
        """Add a chunk of an input."""
        parts = chunk.domains.values()
        documents = sum(len(part.lengths) for part in parts)
        self.update(chunk.input_bytes, documents, sum(part.bytes for part in parts))

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def summary(self) -> str:
        """Documents, documents a second and MB (10^6 bytes) of text a second so far."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        return (
            f"{self.documents:,} documents, {self.documents / elapsed:,.0f} documents/s, "
            f"{self.text_bytes / elapsed / 1e6:,.1f} MB/s"
        )
