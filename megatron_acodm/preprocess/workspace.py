"""Keeps an unfinished corpus in a hidden folder of its output folder, locked, until it is whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from megatron_acodm.files import make_unique_folder, naming, write_atomically
from megatron_acodm.megatron.tokenizer import tokenizer_files, tokenizer_sha256
from megatron_acodm.preprocess.manifest import MANIFEST_NAME
from megatron_acodm.preprocess.progress import say
from megatron_acodm.preprocess.shard import KEY_DIGITS, MERGE_MARK_NAME, RECORD_NAME

FOLDER_NAME = ".preprocess_pile"

_LOCK = "lock"
_KEPT = {_LOCK, "shards", "merged", "final", MERGE_MARK_NAME, MANIFEST_NAME, "stale.json"}
_KEY = re.compile(rf"[0-9a-f]{{{KEY_DIGITS}}}")


class Workspace:
    """A folder inside the output folder for everything that is not finished.

    It holds ``shards/``, a folder for each finished input; during the merge also ``merging``, a
    mark that the shards' files may have been used up, with the inputs that are merged,
    ``merged/``, the checksums of each finished dataset, and ``final/``, all that gets a final
    name; during publication ``manifest.json``, whose presence means that everything in ``final/``
    is whole, and ``stale.json``, the files of an earlier corpus. Everything else in it is a
    killed run's, and is removed.

    A run has the folder to itself. With ``shared``, for runs that build shards and nothing else,
    several may be in it at once, each with a lock on every shard that it builds. Use it in a
    ``with`` statement; when that ends by an error, the finished shards stay.

    Args:
        output_dir: Where the finished files go; made if need be.
        shared: Let others build shards at the same time.

    Raises:
        ValueError: on entry, when another run excludes this one.
        OSError: on entry, when the folder cannot be made or written.
    """

    def __init__(self, output_dir: Path, shared: bool = False) -> None:
        self.output_dir = output_dir.absolute()
        self.path = self.output_dir / FOLDER_NAME
        self.shards = self.path / "shards"
        self.final = self.path / "final"
        self.merged = self.path / "merged"
        self.publication = self.path / MANIFEST_NAME
        self._merge_mark = self.path / MERGE_MARK_NAME
        self.is_shared = shared
        self._is_new = not output_dir.exists()
        self._lock_file = -1
        self._has_locks = True
        self._copies: list[Path] = []

    def __enter__(self) -> Workspace:
        self._lock_file = self._lock_folder()
        try:
            self.shards.mkdir(exist_ok=True)
            if not self.is_shared:
                self._remove_leftovers()
        except BaseException:
            os.close(self._lock_file)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for copy in self._copies:
            shutil.rmtree(copy, ignore_errors=True)
        if not self.is_shared and not self.is_merging and not self.finished_shards():
            self.clear()
            shutil.rmtree(self.path, ignore_errors=True)
            if kind is not None and self._is_new:
                with suppress(OSError):  # someone else uses the folder by now
                    self.output_dir.rmdir()
        os.close(self._lock_file)

    @property
    def is_merging(self) -> bool:
        """Whether shards' files may have been used up by a merge."""
        return self._merge_mark.exists()

    def begin_merge(self, inputs: Sequence[str]) -> None:
        """Set the mark, and make the merge's folders; without effect after the first time.

        Args:
            inputs: Paths of those whose shards are merged, in their order.
        """
        if not self.is_merging:
            for folder in (self.final, self.merged):
                remove(folder)
                folder.mkdir()
            write_atomically(self._merge_mark, json.dumps(list(inputs)))

    def merged_inputs(self) -> list[str]:
        """Return the inputs of the merge that has begun."""
        try:
            return list(json.loads(self._merge_mark.read_text()))
        except (ValueError, TypeError):  # of an earlier version, or damaged
            return []

    def finished_shards(self) -> set[str]:
        """Return the keys of the inputs that have a finished shard."""
        names = {record.parent.name for record in self.shards.glob(f"*/{RECORD_NAME}")}
        return {name for name in names if _KEY.fullmatch(name)}

    def clear(self) -> None:
        """Remove all that was done; the record of publication, which others would finish, last."""
        for name in ("shards", "merged", "final", MERGE_MARK_NAME, "stale.json", MANIFEST_NAME):
            remove(self.path / name)
        self.shards.mkdir()

    def lock_shards(self, keys: Sequence[str]) -> str | None:
        """Take the locks on shards that are to be built, and remove what is left of killed runs.

        Returns:
            The first key that another run has the lock on; None when all are ours.
        """
        for key in keys:
            if not self._lock(self._lock_file, fcntl.LOCK_EX, 1 + int(key, 16)):
                return key
        ours = set(keys)
        for entry in self.shards.iterdir():
            key, dot, _ = entry.name.partition(".")
            if dot and key in ours:
                remove(entry)
        return None

    def copy_tokenizer(
        self, tokenizer_type: str, tokenizer_model: str | None
    ) -> tuple[list[Path], str | None]:
        """Copy the tokenizer's files, which may change while a run reads them.

        Returns:
            The copies, the one to load first, and their sha256.
        """
        files = tokenizer_files(tokenizer_type, tokenizer_model)
        if not files:
            return [], None
        folder = make_unique_folder(self.path / "tokenizer")
        self._copies.append(folder)
        copies = [folder / file.name for file in files]
        for file, copy in zip(files, copies, strict=True):
            data = file.read_bytes()
            with naming(copy):
                copy.write_bytes(data)
        return copies, tokenizer_sha256(tokenizer_type, copies[0])

    def _lock_folder(self) -> int:
        path = self.path / _LOCK
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # removed by a run that is just ending
                continue
            if not self._lock(descriptor, fcntl.LOCK_SH if self.is_shared else fcntl.LOCK_EX, 0):
                os.close(descriptor)
                raise ValueError(
                    f"another run is writing to {self.output_dir}; wait for it, or choose another "
                    "--output-dir"
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
            os.close(descriptor)

    def _lock(self, descriptor: int, kind: int, place: int) -> bool:
        """Lock a byte of the file: the first for the folder, each other for a shard."""
        try:
            return lock(descriptor, kind | fcntl.LOCK_NB, place, 1)
        except OSError as error:
            # Some network file systems have no locks: a run must be possible there too.
            if self._has_locks:
                say(
                    f"warning: locks do not work in {self.output_dir} ({error.strerror}), so "
                    "nothing keeps a second run out; two at once would damage the corpus"
                )
            self._has_locks = False
            return True

    def _remove_leftovers(self) -> None:
        for entry in self.path.iterdir():
            if entry.name not in _KEPT:
                remove(entry)
        for entry in self.shards.iterdir():
            if not _KEY.fullmatch(entry.name):
                remove(entry)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock(descriptor: int, kind: int, start: int = 0, length: int = 0) -> bool:
    """Take a lock, which ends with this process whatever ends it; False when another has it.

    Args:
        descriptor: Of a file open for reading and writing; closing any of the file ends the lock.
        kind: As ``fcntl.lockf`` takes it. Without LOCK_NB, wait until the other is done.
        start: First byte that is locked; there need not be one.
        length: Of the locked bytes; 0 for all.

    Raises:
        OSError: when there are no locks.
    """
    try:
        fcntl.lockf(descriptor, kind, length, start)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True
