"""Builds shards, an input's documents by domain each: whole under its name, or not there."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_acodm.files import make_unique_folder, sync, write_atomically
from megatron_acodm.megatron.indexed import append_documents, token_dtype
from megatron_acodm.preprocess.encoder import MAX_LISTED_LINES, ChunkEncoder, EncodedChunk
from megatron_acodm.preprocess.manifest import (
    InputInfo,
    SkippedLine,
    TokenizerInfo,
    check_value,
    read_record,
)
from megatron_acodm.preprocess.pool import WorkerPool
from megatron_acodm.preprocess.reader import Chunk, InputFile

RECORD_NAME = "shard.json"
MERGE_MARK_NAME = "merging"
"""A file beside the folder of the shards: their files may have been used up by a merge."""

KEY_DIGITS = 15
"""Hexadecimal, of a shard's key: 60 bits are a place that every file system can lock."""

VERSION = 1
"""Of a shard's files; raise it when an input would be encoded to something else."""

MAX_DOMAINS = 4096
"""More are a mistake in the records, which would otherwise fill the disk with files."""


@dataclass(frozen=True)
class ShardDomain:
    """One domain's documents in a shard; the fields are those of ``ManifestDomain``."""

    name: str
    documents: int
    empty_documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Shard:
    """What one input became, and what made it so."""

    input: InputInfo
    """As it was read."""
    tokenizer: TokenizerInfo
    """Its ``file`` is None, since it does not matter where it lies."""
    domains: list[ShardDomain]
    """In the order of appearance; the number of a domain is its files' name."""
    skipped_count: int
    """Malformed lines."""
    skipped_lines: list[SkippedLine]
    """The first of them."""

    def difference(self, item: InputFile, tokenizer: TokenizerInfo) -> str | None:
        """Say how this is not the shard of an input, as it is now, and a tokenizer.

        Raises:
            OSError: with the file's name, when the input must be read and cannot be.
        """
        if self.input.name != str(item.path):
            return f"is of another file, {self.input.name}"
        if self.tokenizer != dataclasses.replace(tokenizer, file=None):
            return "was made with another tokenizer"
        return None if item.is_unchanged(self.input) else "was made before the file was changed"

    def check_skipped(self, skip_bad_lines: bool) -> None:
        """Refuse malformed lines that must not be skipped.

        Raises:
            ValueError: naming the first.
        """
        if self.skipped_count and not skip_bad_lines:
            _refuse(self.skipped_lines[0])


def shard_key(path: Path) -> str:
    """Return the name of the folder of an input's shard.

    It is the same in every command, whatever its other inputs are.

    Args:
        path: The input's, absolute.
    """
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:KEY_DIGITS]


def part_prefix(folder: Path, domain: int) -> Path:
    """Return where a shard has the domain of this number: ``.bin`` and ``.lengths`` follow."""
    return folder / f"{domain:05d}"


def read_shard(folder: Path) -> Shard | None:
    """Read a finished shard's record; None when there is none of this version that is whole.

    Raises:
        OSError: with the file's name, when it is there and cannot be read.
    """
    try:
        content = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            return None
        return Shard(
            input=read_record(InputInfo, content["input"], folder),
            tokenizer=read_record(TokenizerInfo, content["tokenizer"], folder),
            domains=[read_record(ShardDomain, item, folder) for item in content["domains"]],
            skipped_count=check_value("int", content["skipped_count"]),
            skipped_lines=[read_record(SkippedLine, v, folder) for v in content["skipped_lines"]],
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def has_its_files(shard: Shard, folder: Path) -> bool:
    """Tell whether all files of a shard are there, whole."""
    itemsize = token_dtype(shard.tokenizer.vocab_size).itemsize
    for number, domain in enumerate(shard.domains):
        sizes = {".bin": domain.tokens * itemsize, ".lengths": domain.documents * 4}
        for suffix, size in sizes.items():
            file = Path(f"{part_prefix(folder, number)}{suffix}")
            if not file.is_file() or file.stat().st_size != size:
                return False
    return True


class ShardWriter:
    """Collects one input's documents in a folder of its own, which is renamed when it is whole.

    Several may be at the same shard, as when a lost worker comes back: the first to be whole
    stays, and takes the place of one that another command left there. Use it in a ``with``
    statement, which removes what is not whole.

    Args:
        shards: Folder of the shards.
        item: The input.
        tokenizer: What the ids are of.
        skip_bad_lines: Count and list malformed lines instead of stopping at the first.
    """

    def __init__(
        self, shards: Path, item: InputFile, tokenizer: TokenizerInfo, skip_bad_lines: bool
    ) -> None:
        self._item = item
        self._final = shards / shard_key(item.path)
        self._folder = make_unique_folder(self._final)
        self._tokenizer = dataclasses.replace(tokenizer, file=None)
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._skip_bad_lines = skip_bad_lines
        self._domains: dict[str, ShardDomain] = {}
        self._numbers: dict[str, int] = {}
        self._skipped_count = 0
        self._skipped_lines: list[SkippedLine] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, chunk: EncodedChunk) -> None:
        """Append a chunk's documents.

        Raises:
            ValueError: for a malformed line that must not be skipped, or too many domains.
            OSError: with the file's name, when it cannot be written.
        """
        if chunk.bad_count and not self._skip_bad_lines:
            _refuse(chunk.bad_lines[0])
        self._skipped_count += chunk.bad_count
        self._skipped_lines += chunk.bad_lines[: MAX_LISTED_LINES - len(self._skipped_lines)]
        for name, part in chunk.domains.items():
            number = self._numbers.setdefault(name, len(self._numbers))
            check_domain_count(len(self._numbers), name)
            assert part.tokens.dtype == self._dtype
            append_documents(part_prefix(self._folder, number), part.tokens, part.lengths)
            before = self._domains.get(name, ShardDomain(name, 0, 0, 0, 0))
            self._domains[name] = ShardDomain(
                name=name,
                documents=before.documents + len(part.lengths),
                empty_documents=before.empty_documents + int((part.lengths == 0).sum()),
                tokens=before.tokens + len(part.tokens),
                bytes=before.bytes + part.bytes,
            )

    def complete(self) -> None:
        """Bring everything to the disk, and give the folder the shard's name.

        Raises:
            ValueError: when a merge has begun meanwhile, whose shards may not change.
            OSError: with the file's name, when it cannot be written.
        """
        path = str(self._item.path)
        shard = Shard(
            input=self._item.info,
            tokenizer=self._tokenizer,
            domains=list(self._domains.values()),
            skipped_count=self._skipped_count,
            skipped_lines=[dataclasses.replace(line, input=path) for line in self._skipped_lines],
        )
        for number in range(len(shard.domains)):
            for suffix in (".bin", ".lengths"):
                sync(Path(f"{part_prefix(self._folder, number)}{suffix}"))
        record = {"version": VERSION, **dataclasses.asdict(shard)}
        write_atomically(self._folder / RECORD_NAME, json.dumps(record, indent=2) + "\n")
        if (self._final.parent.parent / MERGE_MARK_NAME).exists():
            raise ValueError(f"{self._item.name} was encoded too late: a merge has begun")
        while not self._take_place(shard):
            pass
        sync(self._final.parent)

    def _take_place(self, shard: Shard) -> bool:
        """Rename the folder; False when another was in the way, which it no longer is."""
        try:
            os.rename(self._folder, self._final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return True
        if read_shard(self._final) == shard:
            return True
        aside = make_unique_folder(self._final)
        with suppress(FileNotFoundError):  # someone else was faster
            os.rename(self._final, aside)
        shutil.rmtree(aside, ignore_errors=True)
        return False


@dataclass(frozen=True)
class ShardBuilder:
    """What every shard of a corpus is built with; travels to other machines."""

    shards: Path
    """Folder of the shards."""
    tokenizer: TokenizerInfo
    """The tokenizer; its ``file`` is the copy to load."""
    vocab_size: int | None
    """As ``build_tokenizer`` takes it."""
    workers: int
    """Tokenizing processes."""
    skip_bad_lines: bool
    """Count and list malformed lines instead of stopping at the first."""

    def build(self, inputs: Sequence[InputFile], on_chunk: Callable[[EncodedChunk], None]) -> None:
        """Build the shards of some inputs, in this order.

        The chunks of an input are encoded while the last ones of the input before it still are,
        so that the workers stay busy. What is wrong with an input is raised when its turn comes:
        all shards before it are finished by then.

        Args:
            inputs: Those whose shards are not there, or not as they should be.
            on_chunk: Called for each chunk that is written.

        Raises:
            ValueError: for an input or a record that cannot be used.
            OSError: when reading or writing fails; the file's name is in it.
            WorkerDied: when a tokenizing process is killed.
        """
        file = self.tokenizer.file
        make_encoder = partial(
            ChunkEncoder, self.tokenizer.type, None if file is None else str(file), self.vocab_size
        )
        origins, failures = deque[int](), dict[int, Exception]()

        def chunks() -> Iterator[Chunk]:
            for number, item in enumerate(inputs):
                try:
                    for chunk in item.chunks():
                        origins.append(number)
                        yield chunk
                except (ValueError, OSError) as error:
                    failures[number] = error
                    return

        with WorkerPool(self.workers, make_encoder) as pool:
            results = pool.map(chunks(), lambda chunk: len(chunk.data))
            result: Any = next(results, None)
            for number, item in enumerate(inputs):
                with ShardWriter(self.shards, item, self.tokenizer, self.skip_bad_lines) as writer:
                    while origins and origins[0] == number:
                        origins.popleft()
                        writer.add(result)
                        on_chunk(result)
                        result = next(results, None)
                    if number in failures:
                        raise failures[number]
                    writer.complete()


def check_domain_count(count: int, newest: str) -> None:
    """Refuse more than MAX_DOMAINS domains.

    Raises:
        ValueError: naming one of them.
    """
    if count > MAX_DOMAINS:
        raise ValueError(
            f"there are more than {MAX_DOMAINS} domains, {newest!r} among them; "
            "'meta.pile_set_name' must name a kind of text, not a document"
        )


def _refuse(bad: SkippedLine) -> None:
    raise ValueError(
        f"{bad.input}, line {bad.line}: {bad.reason}; repair it, or leave such lines out "
        "with --skip-bad-lines"
    )
