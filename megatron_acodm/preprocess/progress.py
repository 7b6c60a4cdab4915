"""Shows how far preprocessing is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_INTERVAL_S = 30.0


class Progress:
    """Counts documents and bytes, and shows them on standard error.

    Args:
        total_input_bytes: Size of all inputs as they are stored.
    """

    def __init__(self, total_input_bytes: int) -> None:
        self.documents = 0
        self.text_bytes = 0
        self._input_bytes = 0
        self._total = total_input_bytes
        self._start = self._shown = time.monotonic()
        self._bar = tqdm(
            total=total_input_bytes,
            disable=not sys.stderr.isatty(),
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    def update(self, input_bytes: int, documents: int, text_bytes: int) -> None:
        """Add what has been done since the last call; ``text_bytes`` are those of the texts."""
        self._input_bytes += input_bytes
        self.documents += documents
        self.text_bytes += text_bytes
        if not self._bar.disable:
            self._bar.set_postfix_str(self.summary(), refresh=False)
            self._bar.update(input_bytes)
        elif time.monotonic() - self._shown >= _INTERVAL_S:
            self._shown = time.monotonic()
            share = self._input_bytes / max(self._total, 1)
            print(f"{share:4.0%} of the input: {self.summary()}", file=sys.stderr, flush=True)

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
