"""Keeps an unfinished corpus in a hidden folder of its output folder, locked, until it is whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from megatron_acodm.files import write_atomically
from megatron_acodm.megatron.tokenizer import tokenizer_files, tokenizer_sha256
from megatron_acodm.preprocess.shard import RECORD_NAME, shard_folder

FOLDER_NAME = ".preprocess_pile"

_LOCK = "lock"
_KEPT = {_LOCK, "shards", "merged", "final", "merging", "manifest.json", "stale.json"}


class Workspace:
    """A folder inside the output folder for everything that is not finished.

    It holds ``shards/``, a folder for each finished input; during the merge also ``merging``, a
    mark that the shards' files may have been used up, ``merged/``, the checksums of each finished
    dataset, and ``final/``, all that gets a final name; during publication ``manifest.json``,
    whose presence means that everything in ``final/`` is whole, and ``stale.json``, the files of
    an earlier corpus. Everything else in it is a killed run's, and is removed.

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
        self._merge_mark = self.path / "merging"
        self.is_shared = shared
        self._is_new = not output_dir.exists()
        self._locks: list[int] = []
        self._copies: list[Path] = []

    def __enter__(self) -> Workspace:
        self._locks.append(self._lock_folder())
        try:
            self.shards.mkdir(exist_ok=True)
            if not self.is_shared:
                self._remove_leftovers()
        except BaseException:
            self._release()
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
        self._release()

    @property
    def is_merging(self) -> bool:
        """Whether shards' files may have been used up by a merge."""
        return self._merge_mark.exists()

    def begin_merge(self) -> None:
        """Set the mark, and make the merge's folders; without effect after the first time."""
        if not self.is_merging:
            for folder in (self.final, self.merged):
                remove(folder)
                folder.mkdir()
            write_atomically(self._merge_mark, "")

    def finished_shards(self) -> list[int]:
        """Return the numbers of the inputs that have a finished shard."""
        folders = [record.parent for record in self.shards.glob(f"*/{RECORD_NAME}")]
        return sorted(int(folder.name) for folder in folders if folder.name.isdigit())

    def clear(self) -> None:
        """Remove all that was done; the record of publication, which others would finish, last."""
        for name in ("shards", "merged", "final", "merging", "stale.json", "manifest.json"):
            remove(self.path / name)
        self.shards.mkdir()

    def lock_shard(self, index: int) -> bool:
        """Take the lock on a shard that is to be built; False when another run has it."""
        path = self.shards / f"{index:06d}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            os.close(descriptor)
            return False
        self._locks.append(descriptor)
        for leftover in self.shards.glob(f"{shard_folder(self.shards, index).name}.*"):
            if leftover != path:
                shutil.rmtree(leftover, ignore_errors=True)
        return True

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
        folder = Path(tempfile.mkdtemp(prefix="tokenizer.", dir=self.path))
        self._copies.append(folder)
        copies = [Path(shutil.copyfile(file, folder / file.name)) for file in files]
        return copies, tokenizer_sha256(tokenizer_type, copies[0])

    def _lock_folder(self) -> int:
        path = self.path / _LOCK
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # removed by a run that is just ending
                continue
            kind = fcntl.LOCK_SH if self.is_shared else fcntl.LOCK_EX
            if not lock(descriptor, kind | fcntl.LOCK_NB):
                os.close(descriptor)
                raise ValueError(
                    f"another run is writing to {self.output_dir}; wait for it, or choose another "
                    "--output-dir"
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
            os.close(descriptor)

    def _remove_leftovers(self) -> None:
        for entry in self.path.iterdir():
            if entry.name not in _KEPT:
                remove(entry)
        for entry in self.shards.iterdir():
            if not entry.name.isdigit():
                remove(entry)

    def _release(self) -> None:
        for descriptor in reversed(self._locks):
            os.close(descriptor)


def say(message: str) -> None:
    """Tell the user what a run does; standard output is for its result."""
    print(message, file=sys.stderr, flush=True)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock(descriptor: int, kind: int) -> bool:
    """Take a lock, which ends with this process whatever ends it; False when another has it.

    Args:
        descriptor: Of a file open for reading and writing; closing it ends the lock.
        kind: As ``fcntl.lockf`` takes it. Without LOCK_NB, wait until the other is done.
    """
    try:
        fcntl.lockf(descriptor, kind)
    except OSError as error:
        # Some network file systems have no locks: a run must be possible there too.
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
