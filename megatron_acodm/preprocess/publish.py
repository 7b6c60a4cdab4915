"""Gives a finished corpus its final names, so that a manifest is found with all its files only."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from megatron_acodm.files import sync, write_atomically
from megatron_acodm.megatron.tokenizer import tokenizer_files
from megatron_acodm.preprocess.manifest import MANIFEST_NAME, Manifest
from megatron_acodm.preprocess.workspace import Workspace

TOKENIZER_FOLDER = "tokenizer"

_STALE_NAME = "stale.json"
_DATASETS = ("*_text_document.bin", "*_text_document.idx")


def published_file(output_dir: Path) -> Path | None:
    """Return a file of a corpus that a folder holds, the manifest if there is one."""
    found = (file for pattern in (MANIFEST_NAME, *_DATASETS) for file in output_dir.glob(pattern))
    return next(found, None)


def publish(workspace: Workspace, manifest: Manifest) -> None:
    """Move all that is in the workspace's ``final`` to the output folder, and add the manifest.

    From the moment that the workspace holds the manifest, the new corpus takes the place of an
    earlier one, whatever happens: ``finish_publication`` takes up what was cut short.

    Args:
        workspace: Everything in its ``final`` is on the disk already.
        manifest: Its paths lie in the output folder.

    Raises:
        ValueError: when a file in ``final`` is missing or not of its size.
    """
    _check_final(workspace, manifest)
    stale = _earlier_files(workspace.output_dir) - set(_names_in(workspace.final))
    write_atomically(workspace.path / _STALE_NAME, json.dumps(sorted(stale)))
    for folder in {path.parent for path in workspace.final.rglob("*")}:
        sync(folder)
    write_atomically(workspace.publication, manifest.to_json(workspace.output_dir))
    finish_publication(workspace)


def finish_publication(workspace: Workspace) -> bool:
    """Complete a publication that has begun; it may have been cut short anywhere.

    Returns:
        Whether there was one.
    """
    # Those who share the workspace build shards, and leave this to a run that has it to itself.
    record, target = workspace.publication, workspace.output_dir / MANIFEST_NAME
    if workspace.is_shared or not record.exists():
        return False
    manifest, names = record.read_bytes(), _names_in(workspace.final)
    if names or not target.exists() or target.read_bytes() != manifest:
        target.unlink(missing_ok=True)
        sync(workspace.output_dir)
        for name in names:
            (workspace.output_dir / name).parent.mkdir(exist_ok=True)
            os.replace(workspace.final / name, workspace.output_dir / name)
        tokenizer = workspace.output_dir / TOKENIZER_FOLDER
        for folder in (tokenizer, workspace.output_dir):
            if folder.exists():
                sync(folder)
        write_atomically(target, manifest)
    # Removed with the workspace, before the record: what is stale is known as long as it matters.
    stale = workspace.path / _STALE_NAME
    for name in json.loads(stale.read_text()) if stale.exists() else ():
        (workspace.output_dir / name).unlink(missing_ok=True)
    workspace.clear()
    return True


def _check_final(workspace: Workspace, manifest: Manifest) -> None:
    """Raise a ValueError when what is to be published is not what the manifest says."""
    tokenizer, final = manifest.tokenizer, workspace.final
    if tokenizer.file is not None:
        tokenizer = replace(tokenizer, file=final / TOKENIZER_FOLDER / tokenizer.file.name)
    domains = [replace(domain, prefix=final / domain.prefix.name) for domain in manifest.domains]
    if problems := replace(manifest, domains=domains, tokenizer=tokenizer).file_problems():
        raise ValueError(
            f"the merge made {problems[0]}; was another run writing at the same time? Remove "
            f"{workspace.path} and run again"
        )


def _names_in(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _earlier_files(output_dir: Path) -> set[str]:
    """The files of the corpus that the folder holds, by their names in it."""
    try:
        manifest = Manifest.read(output_dir)
    except ValueError:
        return set()
    files = {Path(f"{d.prefix}{end}") for d in manifest.domains for end in (".bin", ".idx")}
    tokenizer = manifest.tokenizer
    if tokenizer.file is not None and tokenizer.file.is_file():
        # With the files beside it, which HuggingFace would find by their names.
        files |= set(tokenizer_files(tokenizer.type, tokenizer.file))
    return {file.relative_to(output_dir).as_posix() for file in files}
