"""Saves and restores a mixer beside the host's checkpoint: the ``acodm`` folder in it.

Rank 0 writes; every rank reads the ledger, rank 0 alone the policy. The host must announce its
checkpoint only after ``save_sidecar`` has returned on every rank.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_acodm.files import write_atomically
from megatron_acodm.megatron.mixer import Mixer
from megatron_acodm.mixing.serialization import load_state, save_state

logger = logging.getLogger(__name__)

FOLDER = "acodm"


def save_sidecar(mixer: Mixer, checkpoint_dir: str | Path, iteration: int) -> None:
    """Write ``checkpoint_dir/acodm``; collective. Complete on disk when it returns."""
    if dist.get_rank() == 0:
        assert mixer.controller is not None
        folder = Path(checkpoint_dir) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        save_state(folder / "ledger", mixer.ledger.state_dict())
        save_state(folder / "policy", mixer.controller.state_dict())
        description = {"iteration": iteration, "fingerprint": mixer.fingerprint()}
        write_atomically(folder / "acodm.json", json.dumps(description, indent=1))
    dist.barrier(group=mixer.control_group)


def load_sidecar(mixer: Mixer, checkpoint_dir: str | Path, iteration: int) -> bool:
    """Restore ``mixer`` from a checkpoint; every rank must be able to read the folder.

    Returns:
        False when the checkpoint has no sidecar: a plain Megatron checkpoint, from which the
        policy starts fresh.

    Raises:
        ValueError: when the sidecar is damaged, or of a run with other domains, sizes or seed.
    """
    folder = Path(checkpoint_dir) / FOLDER
    if not folder.is_dir():
        return False
    try:
        with open(folder / "acodm.json", encoding="utf-8") as file:
            description = json.load(file)
        saved, saved_iteration = description["fingerprint"], description["iteration"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'acodm.json'} is damaged: {error}") from error
    if saved_iteration != iteration:
        raise ValueError(f"{folder} is of iteration {saved_iteration}, not of {iteration}")
    refuse_differences(checkpoint_dir, saved, mixer.fingerprint())
    mixer.ledger.load_state_dict(load_state(folder / "ledger"))
    if mixer.controller is not None:
        mixer.controller.load_state_dict(load_state(folder / "policy"))
    return True


def refuse_differences(
    checkpoint_dir: str | Path, saved: dict[str, Any], current: dict[str, Any]
) -> None:
    """Raise ValueError with a line for each setting in which a saved run and this one differ."""
    differences = _differences(saved, current)
    if differences:
        raise ValueError(
            f"{checkpoint_dir} was saved by a different run:\n  "
            + "\n  ".join(differences)
            + "\nresume with the saved settings, or start without --load"
        )


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    differences = []
    for key in sorted(saved.keys() | current.keys()):
        before, now = saved.get(key), current.get(key)
        if before == now:
            continue
        if isinstance(before, list) and isinstance(now, list) and key == "domains":
            gone = [name for name in before if name not in now]
            new = [name for name in now if name not in before]
            detail = [f"missing now: {', '.join(gone)}"] if gone else []
            detail += [f"new: {', '.join(new)}"] if new else []
            differences.append(f"domains: {'; '.join(detail) or 'in another order'}")
        else:
            differences.append(f"{key}: saved {before}, now {now}")
    return differences
