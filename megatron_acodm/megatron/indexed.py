"""Writes Megatron indexed datasets (``.bin``, ``.idx``) many documents at a time."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, _IndexWriter

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


class IndexedDatasetWriter:
    """Appends whole batches of documents to one indexed dataset.

    The files are those of Megatron's ``IndexedDatasetBuilder``, byte for byte, when its
    ``add_document`` is called for one document after another. It keeps two Python integers a
    document in memory until the end; here the lengths wait in a file beside the ``.bin``, so that
    memory does not grow with the data. No file stays open between calls, so that any number of
    datasets can grow at once.

    Args:
        prefix: Path of the files, without ``.bin`` and ``.idx``. They must not exist.
        dtype: Type of the stored ids, from ``token_dtype``.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.bin_path = prefix.with_name(prefix.name + ".bin")
        self.idx_path = prefix.with_name(prefix.name + ".idx")
        self._lengths_path = prefix.with_name(prefix.name + ".lengths")
        self._dtype = dtype
        self.documents = 0
        self.empty_documents = 0
        self.tokens = 0

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: [sum(lengths)] ids of all of them, one after another, in the stored dtype.
            lengths: [documents] int32, ids of each. A document without any is an entry in the
                index without a sequence, which is how Megatron's preprocessing stores it.

        Raises:
            OSError: with the file's name, when it cannot be written.
        """
        assert tokens.dtype == self._dtype
        assert lengths.dtype == np.int32
        assert len(tokens) == lengths.sum()
        _append_bytes(self.bin_path, tokens)
        _append_bytes(self._lengths_path, lengths)
        self.documents += len(lengths)
        self.empty_documents += int(np.count_nonzero(lengths == 0))
        self.tokens += len(tokens)

    def finalize(self) -> None:
        """Write the index; nothing may be appended afterwards.

        Raises:
            OSError: with the file's name, when it cannot be written.
        """
        try:
            with _IndexWriter(str(self.idx_path), self._dtype.type) as writer:
                for part in self._index_parts():
                    writer.idx_writer.write(part)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.idx_path)) from error
        self._lengths_path.unlink()

    def _index_parts(self) -> Iterator[bytes]:
        """What follows the header: counts, lengths, byte offsets, document boundaries."""
        yield struct.pack("<QQ", self.documents - self.empty_documents, self.documents + 1)
        for lengths in self._length_blocks():
            yield lengths[lengths > 0].tobytes()
        offset = 0
        for lengths in self._length_blocks():
            sizes = lengths[lengths > 0].astype(np.int64) * self._dtype.itemsize
            ends = offset + np.cumsum(sizes)
            yield (ends - sizes).tobytes()
            offset = int(ends[-1]) if len(ends) else offset
        yield np.int64(0).tobytes()
        sequences = 0
        for lengths in self._length_blocks():
            boundaries = sequences + np.cumsum(lengths > 0, dtype=np.int64)
            yield boundaries.tobytes()
            sequences = int(boundaries[-1])

    def _length_blocks(self) -> Iterator[np.ndarray]:
        with open(self._lengths_path, "rb") as file:
            while len(block := np.fromfile(file, dtype=np.int32, count=_BLOCK)):
                yield block


def _append_bytes(path: Path, values: np.ndarray) -> None:
    try:
        with open(path, "ab") as file:
            file.write(values.data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
