"""Joins shards into one indexed dataset a domain, in place, so that a killed merge can go on.

A domain's documents in a shard are a *part*. The first part becomes the dataset's ``.bin`` by a
rename; each further one is appended, brought to the disk, and removed. So the parts that are gone
are in the ``.bin``, all parts before the last of these too, and what follows them there is an
append that was cut short: it is cut off and done again. The disk holds each token once, but for
the parts at work.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_acodm.files import BLOCK_BYTES, naming, sha256_of, sync, write_atomically
from megatron_acodm.megatron.indexed import token_dtype, write_index
from megatron_acodm.preprocess.manifest import ManifestDomain, read_record
from megatron_acodm.preprocess.names import file_names
from megatron_acodm.preprocess.pool import WorkerPool
from megatron_acodm.preprocess.shard import (
    Shard,
    ShardDomain,
    check_domain_count,
    part_prefix,
    shard_key,
)
from megatron_acodm.preprocess.workspace import Workspace, lock

_SYNC_BYTES = 1 << 28
"""Appended before the disk is waited for, and the parts are removed."""


@dataclass(frozen=True)
class Part:
    """One domain's documents in one shard."""

    prefix: Path
    """Path of its ``.bin`` and ``.lengths`` without these endings."""
    size: int
    """Bytes of the ``.bin``."""


@dataclass(frozen=True)
class Checksums:
    """The sha256 of a dataset's files."""

    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class DatasetMerge:
    """The work of joining one domain's parts; domains are independent of each other."""

    target: Path
    """The dataset, without ``.bin`` and ``.idx``."""
    record: Path
    """Where the checksums are kept when the dataset is finished."""
    dtype: np.dtype
    """Type of the stored ids."""
    parts: list[Part]
    """In the order of the inputs."""

    def run(self) -> Checksums:
        """Do what is left to do.

        Raises:
            OSError: with the file's name, when reading or writing fails.
        """
        # A worker whose run was killed still ends what it is at, before it notices.
        with open(self.record.with_suffix(".lock"), "a+") as file:
            with suppress(OSError):  # without locks; the workspace has warned
                lock(file.fileno(), fcntl.LOCK_EX)
            if not self.record.exists():
                write_atomically(self.record, json.dumps(asdict(self._make_files())))
        return read_record(Checksums, json.loads(self.record.read_text()), self.record.parent)

    def _make_files(self) -> Checksums:
        index = Path(f"{self.target}.idx")
        write_index(index, self.dtype, [Path(f"{part.prefix}.lengths") for part in self.parts])
        sync(index)
        return Checksums(self._join(), sha256_of(index))

    def _join(self) -> str:
        """Make the ``.bin``; return its sha256."""
        target = Path(f"{self.target}.bin")
        files = [Path(f"{part.prefix}.bin") for part in self.parts]
        gone = [number for number, file in enumerate(files) if not file.exists()]
        joined = gone[-1] + 1 if gone else 0
        if not joined:
            os.replace(files[0], target)
            sync(target.parent)
            joined = 1
        for file in files[:joined]:
            file.unlink(missing_ok=True)  # a power cut may bring back what was removed
        sha256 = _extend(target, sum(part.size for part in self.parts[:joined]), files[joined:])
        _check_size(target, target.stat().st_size, sum(part.size for part in self.parts))
        return sha256


def merge_shards(
    workspace: Workspace,
    shards: Sequence[Shard],
    workers: int,
    on_dataset: Callable[[ManifestDomain], None],
) -> list[ManifestDomain]:
    """Join all shards in the workspace's ``final`` folder; go on where a killed merge stopped.

    Args:
        workspace: Holds the shards; their files are used up.
        shards: Of all inputs, in their order.
        workers: Datasets that are joined at the same time.
        on_dataset: Called for each that is finished.

    Returns:
        The datasets, sorted by name, as they will lie in the output folder.

    Raises:
        ValueError: as ``domain_totals``.
        OSError: with the file's name, when reading or writing fails.
        WorkerDied: when a process is killed.
    """
    totals = domain_totals(shards)
    names = file_names(name for name, total in totals.items() if total.tokens)
    workspace.begin_merge([shard.input.name for shard in shards])
    parts = _parts(workspace.shards, shards)
    dtype = token_dtype(shards[0].tokenizer.vocab_size)
    # The largest first, so that no worker begins it when the others are done.
    order = sorted(names, key=lambda name: (-totals[name].tokens, name))
    merges = [
        DatasetMerge(
            target=workspace.final / f"{names[name]}_text_document",
            record=workspace.merged / f"{names[name]}.json",
            dtype=dtype,
            parts=parts[name],
        )
        for name in order
    ]
    domains = []
    with WorkerPool(min(workers, len(merges)), lambda: DatasetMerge.run) as pool:
        for number, checksums in pool.as_completed(merges):
            name = order[number]
            prefix = workspace.output_dir / f"{names[name]}_text_document"
            counts, sums = asdict(totals[name]), asdict(checksums)
            domains.append(ManifestDomain(prefix=prefix, **counts, **sums))
            on_dataset(domains[-1])
    sync(workspace.final)
    return sorted(domains, key=lambda domain: domain.name)


def domain_totals(shards: Sequence[Shard]) -> dict[str, ShardDomain]:
    """Return the sums over all shards by domain.

    Raises:
        ValueError: when there is no document with any text, or there are too many domains.
    """
    totals: dict[str, ShardDomain] = {}
    for shard in shards:
        for domain in shard.domains:
            before = totals.get(domain.name, ShardDomain(domain.name, 0, 0, 0, 0))
            totals[domain.name] = ShardDomain(
                name=domain.name,
                documents=before.documents + domain.documents,
                empty_documents=before.empty_documents + domain.empty_documents,
                tokens=before.tokens + domain.tokens,
                bytes=before.bytes + domain.bytes,
            )
            check_domain_count(len(totals), domain.name)
    if not any(total.tokens for total in totals.values()):
        raise ValueError(
            f"the inputs hold no document with any text ({sum(s.skipped_count for s in shards)} "
            "malformed lines were skipped); check --input"
        )
    return totals


def _parts(folder: Path, shards: Sequence[Shard]) -> dict[str, list[Part]]:
    parts: dict[str, list[Part]] = {}
    for shard in shards:
        shard_folder = folder / shard_key(Path(shard.input.name))
        itemsize = token_dtype(shard.tokenizer.vocab_size).itemsize
        for number, domain in enumerate(shard.domains):
            prefix = part_prefix(shard_folder, number)
            parts.setdefault(domain.name, []).append(Part(prefix, domain.tokens * itemsize))
    return parts


def _extend(target: Path, size: int, files: Sequence[Path]) -> str:
    """Append files to the first ``size`` bytes of ``target``, and remove them; return its sha256.

    Raises:
        OSError: with the file's name, when it is shorter, or when reading or writing fails.
    """
    digest = hashlib.sha256()
    appended: list[Path] = []
    unsynced = 0
    with naming(target), open(target, "r+b") as file:
        if (found := os.fstat(file.fileno()).st_size) < size:
            _check_size(target, found, size)
        file.truncate(size)
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
        for number, path in enumerate(files, start=1):
            with open(path, "rb", buffering=0) as part:
                while block := part.read(BLOCK_BYTES):
                    file.write(block)
                    digest.update(block)
                    unsynced += len(block)
            appended.append(path)
            if unsynced >= _SYNC_BYTES or number == len(files):
                file.flush()
                os.fsync(file.fileno())
                while appended:
                    appended.pop().unlink()
                unsynced = 0
        os.fsync(file.fileno())
    return digest.hexdigest()


def _check_size(file: Path, found: int, expected: int) -> None:
    if found != expected:
        reason = f"has {found} bytes, not the {expected} that were written to it; remove its"
        raise OSError(errno.EIO, f"{reason} workspace and run again", str(file))
