"""Writes and checks Megatron indexed datasets (``.bin``, ``.idx``) many documents at a time."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, _IndexWriter

from megatron_acodm.files import naming

_BLOCK = 1 << 20
"""Documents whose index entries are in memory at once."""

_HEADER_BYTES = 9 + 8 + 1 + 8 + 8
"""Magic, version, dtype code, number of sequences, number of document boundaries."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype in which Megatron stores the ids of a vocabulary of this size."""
    return np.dtype(DType.optimal_dtype(vocab_size))


def dataset_file_sizes(
    vocab_size: int, documents: int, empty_documents: int, tokens: int
) -> tuple[int, int]:
    """Return the bytes of the ``.bin`` and of the ``.idx`` of a dataset with these counts."""
    sequences = documents - empty_documents
    index = _HEADER_BYTES + sequences * (4 + 8) + (documents + 1) * 8
    return tokens * token_dtype(vocab_size).itemsize, index


def append_documents(prefix: Path, tokens: np.ndarray, lengths: np.ndarray) -> None:
    """Append documents to ``<prefix>.bin`` and their lengths to ``<prefix>.lengths``.

    The ``.bin`` grows as Megatron's ``IndexedDatasetBuilder`` would make it; from the lengths
    ``write_index`` makes the ``.idx``. The builder keeps two Python integers a document in memory
    until the end, here memory does not grow with the data. No file stays open between calls, so
    that any number of datasets can grow at once.

    Args:
        prefix: Path of the files, without ``.bin`` and ``.lengths``.
        tokens: [sum(lengths)] ids of all documents, one after another, in the stored dtype.
        lengths: [documents] int32, ids of each. A document without any is an entry in the index
            without a sequence, which is how Megatron's preprocessing stores it.

    Raises:
        OSError: with the file's name, when it cannot be written.
    """
    assert lengths.dtype == np.int32
    assert len(tokens) == lengths.sum()
    _append_bytes(Path(f"{prefix}.bin"), tokens)
    _append_bytes(Path(f"{prefix}.lengths"), lengths)


def write_index(path: Path, dtype: np.dtype, lengths_files: Sequence[Path]) -> None:
    """Write the ``.idx`` of a dataset, byte for byte as ``IndexedDatasetBuilder`` does.

    Args:
        path: The ``.idx``; one that is there is replaced.
        dtype: Type of the stored ids, from ``token_dtype``.
        lengths_files: What ``append_documents`` wrote, in the order of the documents.

    Raises:
        OSError: with the file's name, when it cannot be written.
    """
    with naming(path), _IndexWriter(str(path), dtype.type) as writer:
        for part in _index_parts(dtype, lengths_files):
            writer.idx_writer.write(part)


def _index_parts(dtype: np.dtype, lengths_files: Sequence[Path]) -> Iterator[bytes]:
    """What follows the dtype: counts, lengths, byte offsets, document boundaries."""
    documents = sequences = 0
    for lengths in _length_blocks(lengths_files):
        documents += len(lengths)
        sequences += int(np.count_nonzero(lengths))
    yield struct.pack("<QQ", sequences, documents + 1)
    for lengths in _length_blocks(lengths_files):
        yield lengths[lengths > 0].tobytes()
    offset = 0
    for lengths in _length_blocks(lengths_files):
        sizes = lengths[lengths > 0].astype(np.int64) * dtype.itemsize
        ends = offset + np.cumsum(sizes)
        yield (ends - sizes).tobytes()
        offset = int(ends[-1]) if len(ends) else offset
    yield np.int64(0).tobytes()
    sequences = 0
    for lengths in _length_blocks(lengths_files):
        boundaries = sequences + np.cumsum(lengths > 0, dtype=np.int64)
        yield boundaries.tobytes()
        sequences = int(boundaries[-1])


def _length_blocks(files: Sequence[Path]) -> Iterator[np.ndarray]:
    for path in files:
        with open(path, "rb") as file:
            while len(block := np.fromfile(file, dtype=np.int32, count=_BLOCK)):
                yield block


def _append_bytes(path: Path, values: np.ndarray) -> None:
    with naming(path), open(path, "ab") as file:
        file.write(values.data)


@dataclass(frozen=True)
class IndexCounts:
    """What an ``.idx`` says of its dataset."""

    documents: int
    """Documents, empty ones included."""
    empty_documents: int
    """Documents without a sequence."""
    tokens: int
    """Ids in all sequences."""


def read_index_counts(path: Path, dtype: np.dtype) -> IndexCounts:
    """Read a whole ``.idx`` and count what it lists; memory does not grow with its size.

    Args:
        path: The ``.idx``.
        dtype: Type of the stored ids that it must name.

    Raises:
        ValueError: saying what is wrong, when it is no index or contradicts itself.
        OSError: when it cannot be read.
    """
    with open(path, "rb") as file:
        header = file.read(_HEADER_BYTES)
        expected = _INDEX_HEADER + struct.pack("<QB", 1, DType.code_from_dtype(dtype.type))
        if len(header) < _HEADER_BYTES or not header.startswith(expected):
            raise ValueError(f"its first bytes are not those of an index of {dtype} ids")
        sequences, boundaries = struct.unpack("<QQ", header[len(expected) :])
        size = path.stat().st_size
        if size != _HEADER_BYTES + sequences * 12 + boundaries * 8:
            raise ValueError(f"it has {size} bytes and lists {sequences} sequences")
    lengths = _blocks(path, np.dtype(np.int32), _HEADER_BYTES, sequences)
    offsets = _blocks(path, np.dtype(np.int64), _HEADER_BYTES + sequences * 4, sequences)
    tokens = 0
    for length, offset in zip(lengths, offsets, strict=True):
        sizes = length.astype(np.int64) * dtype.itemsize
        starts = tokens * dtype.itemsize + np.cumsum(sizes) - sizes
        if (length <= 0).any() or (offset != starts).any():
            raise ValueError("its sequences do not follow one another")
        tokens += int(length.sum(dtype=np.int64))
    last = empty = 0
    for block in _blocks(path, np.dtype(np.int64), _HEADER_BYTES + sequences * 12, boundaries):
        steps = np.diff(block, prepend=last)
        if ((steps < 0) | (steps > 1)).any():
            raise ValueError("its documents do not follow one another")
        empty += int(np.count_nonzero(steps == 0))
        last = int(block[-1])
    if boundaries == 0 or last != sequences:
        raise ValueError(f"its documents end at sequence {last}, its sequences at {sequences}")
    return IndexCounts(boundaries - 1, empty - 1, tokens)


def _blocks(path: Path, dtype: np.dtype, start: int, count: int) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        file.seek(start)
        for first in range(0, count, _BLOCK):
            yield np.fromfile(file, dtype=dtype, count=min(_BLOCK, count - first))
