"""Reads, checksums and writes files so that errors name them and none is half there."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BLOCK_BYTES = 1 << 20
"""Read and written at once."""


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let an OSError of what is done with a file name that file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error


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
    with naming(temporary), open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)  # makes the new name durable, not only the bytes


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Raises:
        OSError: with its name, when that fails.
    """
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal.

    Raises:
        OSError: with the file's name, when it cannot be read.
    """
    digest = hashlib.sha256()
    with naming(path), open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def make_unique_folder(prefix: Path) -> Path:
    """Make a folder whose name begins with that of ``prefix``; others may read it if they may here.

    ``tempfile.mkdtemp`` makes one for this user alone.

    Raises:
        OSError: with its name, when it cannot be made.
    """
    folder = prefix.with_name(f"{prefix.name}.{secrets.token_hex(4)}")
    folder.mkdir()
    return folder
