"""Saves and loads the trainer's checkpoints: Megatron's distributed format with our sidecar.

A checkpoint is written to a folder with a temporary name, renamed when it is whole, and only then
announced in Megatron's tracker file: a crash at any moment leaves the last good one in place.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_acodm.megatron.mixer import Mixer
from megatron_acodm.megatron.model import TrainingModel
from megatron_acodm.megatron.sidecar import FOLDER, load_sidecar, save_sidecar

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"


def _folder(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def save_checkpoint(
    root: str | Path, iteration: int, model: TrainingModel, mixer: Mixer | None
) -> Path:
    """Save and announce the checkpoint of a finished iteration; collective."""
    from megatron.core import dist_checkpointing

    final = _folder(Path(root), iteration)
    partial = final.with_name(final.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(model.sharded_state(iteration, is_loading=False), str(partial))
    if mixer is not None:
        save_sidecar(mixer, partial, iteration)
    dist.barrier()
    if dist.get_rank() == 0:
        _announce(partial, final, iteration)
    dist.barrier()
    return final


def _announce(partial: Path, final: Path, iteration: int) -> None:
    if final.exists():  # the same iteration, saved by an earlier run into this folder
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        partial.rename(final)
        shutil.rmtree(old)
    else:
        partial.rename(final)
    tracker = final.parent / TRACKER
    temporary = tracker.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(str(iteration))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, tracker)


def latest_iteration(root: str | Path) -> int | None:
    """The iteration that the tracker announces; None when there is no checkpoint.

    Raises:
        ValueError: when the tracker is unreadable, or its checkpoint is not there.
    """
    tracker = Path(root) / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    if not text.isdigit():
        raise ValueError(f"{tracker} holds {text!r}, not an iteration; correct it by hand")
    folder = _folder(Path(root), int(text))
    if not folder.is_dir():
        raise ValueError(
            f"{tracker} announces iteration {text}, but {folder} does not exist; restore it or "
            "write the number of a checkpoint that does"
        )
    return int(text)


def load_checkpoint(root: str | Path, model: TrainingModel, mixer: Mixer | None) -> int:
    """Load the announced checkpoint, if any; collective.

    Returns:
        The iteration it was saved after; 0 when there is none.

    Raises:
        ValueError: when the checkpoint does not fit this run.
    """
    from megatron.core import dist_checkpointing

    iteration = latest_iteration(root)
    if iteration is None:
        return 0
    folder = _folder(Path(root), iteration)
    if mixer is None and (folder / FOLDER).is_dir():
        raise ValueError(
            f"{folder} was saved under a policy, whose ledger says which samples were drawn; "
            "without a policy, Megatron's static blend would draw some of them again: give the "
            "policy it was saved with"
        )
    if mixer is not None and not load_sidecar(mixer, folder, iteration):
        raise ValueError(
            f"{folder} has no 'acodm' folder: it was saved without a policy, and says nothing "
            "about which samples were drawn; resume it with --acodm-policy none"
        )
    state = dist_checkpointing.load(model.sharded_state(0, is_loading=True), str(folder))
    return model.load_state(state)
