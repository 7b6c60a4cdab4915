"""Holds one input's documents by domain, whole under its name or not there."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from megatron_acodm.files import write_atomically
from megatron_acodm.megatron.indexed import append_documents, token_dtype
from megatron_acodm.preprocess.disk import sync
from megatron_acodm.preprocess.encoder import MAX_LISTED_LINES, EncodedChunk
from megatron_acodm.preprocess.manifest import InputInfo, SkippedLine, TokenizerInfo
from megatron_acodm.preprocess.reader import InputFile
from megatron_acodm.preprocess.records import check_value, read_record

RECORD_NAME = "shard.json"
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

    def is_of(self, item: InputFile, tokenizer: TokenizerInfo) -> bool:
        """Tell whether the input, as it is now, and the tokenizer are those of this shard."""
        return (
            self.input.name == item.name
            and self.tokenizer == dataclasses.replace(tokenizer, file=None)
            and item.is_unchanged(self.input)
        )

    def check_skipped(self, skip_bad_lines: bool) -> None:
        """Refuse malformed lines that must not be skipped.

        Raises:
            ValueError: naming the first.
        """
        if self.skipped_count and not skip_bad_lines:
            _refuse(self.skipped_lines[0])


def shard_folder(shards: Path, index: int) -> Path:
    """Return the folder of the input of this number."""
    return shards / f"{index:06d}"


def part_prefix(folder: Path, domain: int) -> Path:
    """Return where a shard has the domain of this number: ``.bin`` and ``.lengths`` follow."""
    return folder / f"{domain:05d}"


def read_shard(folder: Path) -> Shard | None:
    """Read a finished shard's record; None when there is none of this version."""
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
    except (OSError, ValueError, KeyError, TypeError):
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
    stays. Use it in a ``with`` statement, which removes what is not whole.

    Args:
        shards: Folder of the shards.
        index: Number of the input.
        tokenizer: What the ids are of.
        skip_bad_lines: Count and list malformed lines instead of stopping at the first.
    """

    def __init__(
        self, shards: Path, index: int, tokenizer: TokenizerInfo, skip_bad_lines: bool
    ) -> None:
        self._final = shard_folder(shards, index)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{self._final.name}.", dir=shards))
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

    def complete(self, info: InputInfo) -> Shard:
        """Bring everything to the disk, and give the folder the shard's name.

        Raises:
            OSError: with the file's name, when it cannot be written.
        """
        shard = Shard(
            input=info,
            tokenizer=self._tokenizer,
            domains=list(self._domains.values()),
            skipped_count=self._skipped_count,
            skipped_lines=self._skipped_lines,
        )
        for number in range(len(shard.domains)):
            for suffix in (".bin", ".lengths"):
                sync(Path(f"{part_prefix(self._folder, number)}{suffix}"))
        record = {"version": VERSION, **dataclasses.asdict(shard)}
        write_atomically(self._folder / RECORD_NAME, json.dumps(record, indent=2) + "\n")
        try:
            os.rename(self._folder, self._final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync(self._final.parent)
        return shard


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
