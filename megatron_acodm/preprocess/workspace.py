"""Holds unfinished files in a hidden folder, and names them when all are complete."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from megatron_acodm.preprocess.manifest import MANIFEST_NAME, Manifest

FOLDER_NAME = ".preprocess_pile"
TOKENIZER_FOLDER = "tokenizer"

_PUBLISHED = (MANIFEST_NAME, "*_text_document.bin", "*_text_document.idx")


class Workspace:
    """A folder inside the output folder, locked against other runs, removed at the end.

    Args:
        output_dir: Where the finished files go; made if need be.
        overwrite: Let ``publish`` replace an earlier corpus. Until then it stays as it is.

    Raises:
        ValueError: on entry, when the output folder holds a corpus and ``overwrite`` is not set,
            or when another run is writing to it.
        OSError: on entry, when the folder cannot be made or written.
    """

    def __init__(self, output_dir: Path, overwrite: bool) -> None:
        self.output_dir = output_dir.absolute()
        self.path = self.output_dir / FOLDER_NAME
        self._overwrite = overwrite
        self._is_new = not output_dir.exists()
        self._lock: TextIO | None = None

    def __enter__(self) -> Workspace:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / "lock", "w")
        try:
            _lock(self._lock)
        except ValueError:
            self._lock.close()
            raise
        try:
            self._check_unpublished()
            self._remove_leftovers()
        except BaseException:
            self._close(failed=True)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(failed=kind is not None)

    def _close(self, failed: bool) -> None:
        assert self._lock is not None
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
        if failed and self._is_new:
            with suppress(OSError):  # someone else uses the folder by now
                self.output_dir.rmdir()

    def publish(self, files: Mapping[Path, str], manifest: Manifest) -> None:
        """Give the finished files their names, and write the manifest last.

        Whoever finds a manifest finds all its files, whole, even after a power cut: everything is
        on the disk before the first name changes, and an old manifest goes before its files do.

        Args:
            files: From paths inside the workspace to names relative to the output folder.
            manifest: Its paths lie in the output folder.
        """
        manifest_file = self.path / MANIFEST_NAME
        manifest_file.write_text(manifest.to_json(self.output_dir), encoding="utf-8")
        for file in (*files, manifest_file):
            _sync(file)
        stale = self._retire()
        for file, name in files.items():
            target = self.output_dir / name
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)
            stale.discard(target)
        for folder in {(self.output_dir / name).parent for name in files.values()}:
            _sync(folder)
        os.replace(manifest_file, self.output_dir / MANIFEST_NAME)
        _sync(self.output_dir)
        for file in stale:
            file.unlink(missing_ok=True)

    def _check_unpublished(self) -> None:
        if self._overwrite:
            return
        for pattern in _PUBLISHED:
            for file in self.output_dir.glob(pattern):
                raise ValueError(
                    f"{self.output_dir} already holds {file.name}; pass --overwrite to replace "
                    "what is there, or choose another --output-dir"
                )

    def _remove_leftovers(self) -> None:
        """Remove what a killed run left behind."""
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def _retire(self) -> set[Path]:
        """Remove the earlier manifest; return the files of the corpus that it described."""
        try:
            domains = Manifest.load(self.output_dir).domains
        except ValueError:
            domains = []
        (self.output_dir / MANIFEST_NAME).unlink(missing_ok=True)
        _sync(self.output_dir)
        if not domains:
            return set()
        # All of the tokenizer's folder: HuggingFace would find a leftover file by its name.
        stale = set((self.output_dir / TOKENIZER_FOLDER).glob("*"))
        return stale | {Path(f"{d.prefix}{end}") for d in domains for end in (".bin", ".idx")}


def _lock(file: TextIO) -> None:
    """Take the lock, which ends with this process whatever ends it.

    Raises:
        ValueError: when another process has it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            folder = Path(file.name).parent.parent
            raise ValueError(
                f"another run is writing to {folder}; wait for it, or choose another --output-dir"
            ) from error
        # Some network file systems have no locks: a run must be possible there too.


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
