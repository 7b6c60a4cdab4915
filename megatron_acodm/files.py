"""Writes a file so that it is whole under its name, or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write ``path`` under a temporary name, bring it to the disk, then rename it.

    Args:
        path: the file; one that is there is replaced.
        data: its content; text is encoded as UTF-8.

    Raises:
        OSError: when it cannot be written; what was there before is still there.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the new name durable, not only the bytes
    finally:
        os.close(folder)
