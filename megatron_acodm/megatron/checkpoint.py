"""Saves and loads the trainer's checkpoints: Megatron's distributed format with our sidecar.

A checkpoint is written to a folder with a temporary name, renamed when it is whole, and only then
announced in Megatron's tracker file: a crash at any moment leaves the last good one in place.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_acodm.files import write_atomically
from megatron_acodm.megatron.failures import TRACKER, naming_failed_save
from megatron_acodm.megatron.helpers import helpers_in_hand
from megatron_acodm.megatron.mixer import Mixer
from megatron_acodm.megatron.model import TrainingModel
from megatron_acodm.megatron.sidecar import load_sidecar, refuse_differences, save_sidecar

logger = logging.getLogger(__name__)

_FINGERPRINT = "acodm_run"


def _folder(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def _set_aside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def save_checkpoint(
    root: str | Path,
    iteration: int,
    model: TrainingModel,
    mixer: Mixer | None,
    fingerprint: dict[str, Any],
) -> Path:
    """Save and announce the checkpoint of a finished iteration; collective.

    ``fingerprint`` is what a run that loads it must have in common with this one.

    Raises:
        SaveFailed: when it cannot be written; perhaps on one rank alone, whose process must then
            end, as the others wait for it.
    """
    from megatron.core import dist_checkpointing

    final = _folder(Path(root), iteration)
    partial = final.with_name(final.name + ".partial")
    with naming_failed_save(root, iteration), helpers_in_hand():
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        state = model.sharded_state(iteration, is_loading=False)
        dist_checkpointing.save({**state, _FINGERPRINT: fingerprint}, str(partial))
        if mixer is not None:
            save_sidecar(mixer, partial, iteration)
        dist.barrier()
        if dist.get_rank() == 0:
            _announce(partial, final, iteration)
        dist.barrier()
    return final


def _announce(partial: Path, final: Path, iteration: int) -> None:
    if final.exists():  # the same iteration, saved by an earlier run into this folder
        shutil.rmtree(_set_aside(final), ignore_errors=True)
        final.rename(_set_aside(final))
    partial.rename(final)
    shutil.rmtree(_set_aside(final), ignore_errors=True)
    write_atomically(final.parent / TRACKER, str(iteration))


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
    if not folder.is_dir() and _set_aside(folder).is_dir():  # killed while it was replaced
        _set_aside(folder).rename(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{tracker} announces iteration {text}, but {folder} does not exist; restore it or "
            "write the number of a checkpoint that does"
        )
    return int(text)


def load_checkpoint(
    root: str | Path,
    model: TrainingModel,
    mixer: Mixer | None,
    fingerprint: dict[str, Any],
    *,
    adopt: bool = False,
) -> int:
    """Load the announced checkpoint, if any; collective. ``adopt``: see ``load_sidecar``.

    Returns:
        The iteration it was saved after; 0 when there is none.

    Raises:
        ValueError: when the checkpoint does not fit this run.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    if dist.get_rank() == 0:
        latest_iteration(root)  # may rename a folder, which one rank must do alone
    dist.barrier()
    iteration = latest_iteration(root)
    if iteration is None:
        return 0
    folder = _folder(Path(root), iteration)
    saved = dist_checkpointing.load_common_state_dict(str(folder)).get(_FINGERPRINT)
    if saved is None:
        raise ValueError(
            f"{folder} does not say which samples its run drew: it was not saved by this trainer"
        )
    refuse_differences(folder, saved, fingerprint, except_for={"domains"} if mixer else ())
    if mixer is not None:
        load_sidecar(mixer, folder, iteration, adopt=adopt)
    try:
        state = dist_checkpointing.load(model.sharded_state(0, is_loading=True), str(folder))
    except (CheckpointingException, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]  # torch puts every rank's traceback before
        raise ValueError(
            f"{folder} does not fit this model: {reason}; give the settings it was saved with"
        ) from error
    return model.load_state(state)
