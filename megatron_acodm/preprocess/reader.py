"""Reads JSON-lines files, compressed or not, as a stream of chunks of whole lines."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from megatron_acodm.files import naming, sha256_of
from megatron_acodm.preprocess.manifest import InputInfo

CHUNK_BYTES = 1 << 20
"""Text sent to a worker at once, about: enough to make sending cheap, little enough to balance."""

MAX_LINE_BYTES = 1 << 28
"""A longer line is no document but a damaged file; it would otherwise have to fit in memory."""

_BLOCK_BYTES = 1 << 17

_SLICE_BYTES = 1 << 11
"""Decompressed at once: what becomes of it must fit in memory, and 4 bytes of zstd can be 128 KiB.

That is 64 MiB at most; larger slices are hardly faster.
"""


@dataclass(frozen=True)
class Chunk:
    """Whole lines of one input."""

    input: str
    """Name of the file."""
    first_line: int
    """Number of the first line, counted from 1."""
    data: bytes
    """The lines."""
    input_bytes: int
    """Bytes of the (compressed) file read for this chunk."""


class InputFile:
    """One ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.zst`` file.

    ``name`` is the path as it was given, for messages; ``path`` is absolute.

    Raises:
        ValueError: for another ending, or when there is no such file that can be read.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path(name).absolute()
        endings = [ending for ending in _ENDINGS if name.endswith(ending)]
        if not endings:
            raise ValueError(f"{name} is none of {', '.join(_ENDINGS)}; convert or rename it")
        self._new_decoder = _ENDINGS[endings[0]]
        try:
            if self.path.exists() and not self.path.is_file():
                raise ValueError(f"{name} is not a regular file; name the files themselves")
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
        except OSError as error:
            raise ValueError(f"cannot read {name}: {error.strerror}; check --input") from error
        self.size, self.modified = _state(status)
        self.inode = (status.st_dev, status.st_ino)
        self._content_sha256: str | None = None
        self._bytes_read = 0
        self._sha256 = ""

    @property
    def info(self) -> InputInfo:
        """What was read; call it when ``chunks`` is exhausted."""
        assert self._sha256
        return InputInfo(str(self.path), self.size, self.modified, self._sha256)

    def is_touched(self, info: InputInfo) -> bool:
        """Tell whether its content, which has not been read, decides if it is that of ``info``."""
        is_same = (self.size, self.modified) == (info.size, info.modified)
        return self.size == info.size and not is_same and self._content_sha256 is None

    def is_unchanged(self, info: InputInfo) -> bool:
        """Tell whether this is still the file of ``info``.

        A file of the same size and time is; if only the time differs, its content decides, which
        is read once.

        Raises:
            OSError: with the file's name, when reading fails.
        """
        if self.size != info.size or self.modified == info.modified:
            return self.size == info.size
        self._content_sha256 = self._content_sha256 or sha256_of(self.path)
        return self._content_sha256 == info.sha256

    def chunks(self) -> Iterator[Chunk]:
        """Yield the file's lines, about CHUNK_BYTES at a time.

        Raises:
            ValueError: for an archive that is truncated or damaged, an endless line, or a file
                that was changed since this object was made.
            OSError: with the file's name, when reading fails.
        """
        pieces: list[bytes] = []
        size, line, reported = 0, 1, 0
        for block in self._decompressed():
            pieces.append(block)
            size += len(block)
            if size < CHUNK_BYTES:
                continue
            cut = block.rfind(b"\n") + 1
            if cut == 0:
                self._check_length(pieces, size, line)
                continue
            pieces[-1] = block[:cut]
            data = b"".join(pieces)
            yield Chunk(self.name, line, data, self._bytes_read - reported)
            reported = self._bytes_read
            line += data.count(b"\n")
            pieces, size = [block[cut:]], len(block) - cut
        if size:
            yield Chunk(self.name, line, b"".join(pieces), self._bytes_read - reported)

    def _check_length(self, pieces: list[bytes], size: int, line: int) -> None:
        if size > MAX_LINE_BYTES + CHUNK_BYTES:
            line += sum(piece.count(b"\n") for piece in pieces)
            raise ValueError(
                f"{self.name}, line {line}: longer than {MAX_LINE_BYTES} bytes; it is not a "
                "JSON-lines file, or the document must be split"
            )

    def _decompressed(self) -> Iterator[bytes]:
        if self._new_decoder is None:
            yield from self._raw()
            return
        try:
            yield from _decompress(self._raw(), self._new_decoder)
        except EOFError as error:
            raise ValueError(
                f"{self.name} is truncated: the archive ends too early; fetch it again"
            ) from error
        except (zlib.error, zstandard.ZstdError) as error:
            raise ValueError(f"{self.name} is damaged: {error}; fetch it again") from error

    def _raw(self) -> Iterator[bytes]:
        sha256 = hashlib.sha256()
        self._bytes_read = 0
        with naming(self.name), open(self.path, "rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                sha256.update(block)
                self._bytes_read += len(block)
                yield block
            state = _state(os.fstat(file.fileno()))
        if state != (self.size, self.modified) or self._bytes_read != self.size:
            raise ValueError(
                f"{self.name} was changed while it was read; run again when it is complete"
            )
        self._sha256 = sha256.hexdigest()


def file_state(path: Path) -> tuple[int, int]:
    """Return a file's size and its time of last modification, in ns since 1970.

    Raises:
        OSError: when it cannot be read.
    """
    with open(path, "rb") as file:
        return _state(os.fstat(file.fileno()))


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, max(status.st_mtime_ns, 0)


def open_inputs(names: Sequence[str]) -> list[InputFile]:
    """Check all inputs before any is read.

    Raises:
        ValueError: for a file that is missing, of an unknown kind, or named twice.
    """
    inputs = [InputFile(name) for name in names]
    seen: dict[tuple[int, int], str] = {}
    for item in inputs:
        if item.inode in seen:
            raise ValueError(
                f"{item.name} is the same file as {seen[item.inode]}; its documents would count "
                "twice: name each file once"
            )
        seen[item.inode] = item.name
    return inputs


def read_chunks(inputs: Iterable[InputFile]) -> Iterator[Chunk]:
    """Yield the chunks of all inputs, one input after another; raises as ``InputFile.chunks``."""
    for item in inputs:
        yield from item.chunks()


def _new_gzip_decoder() -> Any:
    return zlib.decompressobj(wbits=31)


def _new_zstd_decoder() -> Any:
    # The largest window that zstd writes (--long=31): a file decides what memory it takes.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


_ENDINGS: dict[str, Callable[[], Any] | None] = {
    ".jsonl": None,
    ".jsonl.gz": _new_gzip_decoder,
    ".jsonl.zst": _new_zstd_decoder,
}


def _decompress(blocks: Iterable[bytes], new_decoder: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress an archive of one or more members (gzip) or frames (zstd).

    Both libraries' file readers take any number of members, but zstandard's ends silently where a
    truncated file does; the decoders say whether the last member was whole.

    Raises:
        EOFError: when it was not.
    """
    decoder = new_decoder()
    slices = (
        block[start : start + _SLICE_BYTES]
        for block in blocks
        for start in range(0, len(block), _SLICE_BYTES)
    )
    for data in slices:
        while data:
            if decoder.eof:
                decoder = new_decoder()
            text = decoder.decompress(data)
            yield from (text[at : at + CHUNK_BYTES] for at in range(0, len(text), CHUNK_BYTES))
            data = decoder.unused_data
    if not decoder.eof:
        raise EOFError
