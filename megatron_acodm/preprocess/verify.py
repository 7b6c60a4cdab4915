"""Reads a whole corpus again and compares it with its manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_acodm.files import BLOCK_BYTES, sha256_of
from megatron_acodm.megatron.indexed import read_index_counts, token_dtype
from megatron_acodm.megatron.tokenizer import tokenizer_sha256
from megatron_acodm.preprocess.manifest import InputInfo, Manifest, ManifestDomain
from megatron_acodm.preprocess.pool import WorkerPool
from megatron_acodm.preprocess.reader import file_state


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found."""

    manifest: Manifest
    """What was compared."""
    differences: list[str]
    """All that differs, a line each; none for a corpus that is as it was made."""
    unread_inputs: list[str]
    """Inputs that are no longer there, or cannot be read, and why: that is no difference."""


def verify(output_dir: Path, workers: int) -> Verification:
    """Compare every file of a corpus with its manifest, and its inputs too where they still lie.

    Args:
        output_dir: Holds the corpus.
        workers: Processes that read.

    Raises:
        ValueError: when there is no manifest, or it cannot be read.
        WorkerDied: when a process is killed.
    """
    manifest = Manifest.read(output_dir)
    differences = _tokenizer_differences(manifest)
    # The largest first, so that no worker begins it when the others are done.
    domains = sorted(manifest.domains, key=lambda domain: -domain.tokens)
    check = _DatasetCheck(manifest.tokenizer.vocab_size)
    with WorkerPool(workers, lambda: check) as pool:
        found = dict(pool.as_completed(domains))
    for number in range(len(domains)):
        differences += found[number]
    unread = []
    for info in manifest.inputs:
        try:
            if not _is_unchanged(info):
                differences.append(f"{info.name}: changed since the corpus was made from it")
        except FileNotFoundError:
            unread.append(f"{info.name} is no longer there")
        except OSError as error:
            unread.append(f"{info.name} cannot be read: {error.strerror}")
    return Verification(manifest, differences, unread)


@dataclass(frozen=True)
class _DatasetCheck:
    """Compares one domain's files with the manifest."""

    vocab_size: int

    def __call__(self, domain: ManifestDomain) -> list[str]:
        """Return what differs."""
        differences = []
        for suffix, check in ((".bin", self._bin_difference), (".idx", self._idx_difference)):
            file = Path(f"{domain.prefix}{suffix}")
            try:
                difference = check(file, domain)
            except OSError as error:
                difference = f"cannot be read: {error.strerror}"
            if difference:
                differences.append(f"{file}: {difference}")
        return differences

    def _bin_difference(self, file: Path, domain: ManifestDomain) -> str | None:
        dtype = token_dtype(self.vocab_size)
        if (size := file.stat().st_size) != domain.tokens * dtype.itemsize:
            return f"{size // dtype.itemsize:,} tokens, not {domain.tokens:,} ({size} bytes)"
        if sha256_of(file) == domain.bin_sha256:
            return None
        with open(file, "rb") as stored:
            while len(ids := np.fromfile(stored, dtype=dtype, count=BLOCK_BYTES)):
                if ids.min() < 0 or ids.max() >= self.vocab_size:
                    return f"ids outside [0, {self.vocab_size}), and another sha256"
        return "another sha256, so other ids"

    def _idx_difference(self, file: Path, domain: ManifestDomain) -> str | None:
        same = sha256_of(file) == domain.idx_sha256
        try:
            counts = read_index_counts(file, token_dtype(self.vocab_size))
        except ValueError as error:
            return str(error)
        for name in ("documents", "empty_documents", "tokens"):
            found, listed = getattr(counts, name), getattr(domain, name)
            if found != listed:
                return f"{found:,} {name.replace('_', ' ')}, not {listed:,}"
        return None if same else "another sha256"


def _tokenizer_differences(manifest: Manifest) -> list[str]:
    info = manifest.tokenizer
    if info.file is None:
        return []
    try:
        found = tokenizer_sha256(info.type, info.file)
    except ValueError as error:
        return [str(error)]
    except OSError as error:
        return [f"{info.file}: cannot be read: {error.strerror}"]
    return [] if found == info.sha256 else [f"{info.file}: another tokenizer ({found})"]


def _is_unchanged(info: InputInfo) -> bool:
    path = Path(info.name)
    size, modified = file_state(path)
    return size == info.size and (modified == info.modified or sha256_of(path) == info.sha256)
