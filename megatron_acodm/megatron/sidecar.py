"""Saves and restores a mixer beside the host's checkpoint: the ``acodm`` folder in it.

Rank 0 writes; every rank reads the ledger, rank 0 alone the policy. Where gradients are averaged,
the ranks of one data-parallel replica write the averages of their parts of the model, and every
rank reads its own. The host must announce its checkpoint only after ``save_sidecar`` has returned
on every rank.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_acodm.blending import adopt as adopt_ledger
from megatron_acodm.files import write_atomically
from megatron_acodm.megatron.decisions import Decisions
from megatron_acodm.megatron.mixer import Mixer
from megatron_acodm.mixing.serialization import load_state, save_state

logger = logging.getLogger(__name__)

FOLDER = "acodm"
FORMAT = 7
"""Version of the folder's layout."""

_ADOPTABLE = ("domain '", "order of the domains", "mixing.weights", "blend weights")
"""How lines begin that tell of a difference which can be adopted."""


def save_sidecar(mixer: Mixer, checkpoint_dir: str | Path, iteration: int) -> None:
    """Write ``checkpoint_dir/acodm``; collective. Complete on disk when it returns."""
    folder = Path(checkpoint_dir) / FOLDER
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier(group=mixer.control_group)
    if mixer.averages is not None and mixer.is_first_replica:
        state = mixer.averages.state_dict() | {"parameters": mixer.measured_parameters}
        save_state(folder / _averages_name(mixer), state)
    if dist.get_rank() == 0:
        assert mixer.controller is not None
        save_state(folder / "ledger", mixer.ledger.state_dict())
        save_state(folder / "policy", mixer.controller.state_dict())
        description = {
            "format": FORMAT,
            "iteration": iteration,
            "model_parallel": mixer.model_parallel_sizes,
            "fingerprint": mixer.fingerprint(),
        }
        write_atomically(folder / "acodm.json", json.dumps(description, indent=1))
    dist.barrier(group=mixer.control_group)


def load_sidecar(
    mixer: Mixer, checkpoint_dir: str | Path, iteration: int, *, adopt: bool = False
) -> bool:
    """Restore an attached ``mixer`` from a checkpoint; collective, every rank must see the folder.

    Args:
        mixer: of this run.
        checkpoint_dir: folder of the host's checkpoint.
        iteration: steps that it was saved after.
        adopt: accept other domains, or other data of theirs. Domains whose data is the same go on
            where they were; when domains came or went, the policy starts afresh.

    Returns:
        False when the checkpoint has no sidecar: a plain Megatron checkpoint, from which the
        policy starts fresh.

    Raises:
        ValueError: when the sidecar is damaged, or of a run that differs: in its seed or batch
            sizes, or, without ``adopt``, in its domains.
    """
    folder = Path(checkpoint_dir) / FOLDER
    consumed = mixer.run.samples_before(iteration)
    ledger = mixer.ledger  # not before all that follows from a last step is in it
    if not folder.is_dir():
        logger.warning(
            "%s has no folder %r: the policy starts afresh, and every domain at its first sequence",
            checkpoint_dir,
            FOLDER,
        )
        ledger.restart_at(iteration, consumed, [0] * len(mixer.domains), 0)
        mixer.continue_from(consumed)
        return False
    description = restore_decisions(mixer.decisions, folder, iteration, consumed, adopt=adopt)
    same_domains = mixer.domains == list(description["fingerprint"]["domains"])
    if mixer.averages is not None and same_domains:
        _load_averages(mixer, folder, description.get("model_parallel"))
    mixer.continue_from(consumed)
    return True


def restore_decisions(
    decisions: Decisions, folder: Path, iteration: int, consumed: int, *, adopt: bool
) -> dict[str, Any]:
    """Restore ledger and policy from a sidecar; returns its description.

    Args:
        decisions: of this run.
        folder: the sidecar.
        iteration: steps that it was saved after.
        consumed: sequences of those steps.
        adopt: see ``load_sidecar``.

    Raises:
        ValueError: when the sidecar is damaged, or of a run that differs.
    """
    try:
        with open(folder / "acodm.json", encoding="utf-8") as file:
            description = json.load(file)
        version, saved_iteration = description.get("format"), description["iteration"]
        saved = description["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'acodm.json'} is damaged: {error}") from error
    if version != FORMAT:
        raise ValueError(
            f"{folder} has format {version}, this version of megatron-acodm reads {FORMAT}; resume "
            "with the version that saved it"
        )
    if saved_iteration != iteration:
        raise ValueError(f"{folder} is of iteration {saved_iteration}, not of {iteration}")
    current = decisions.fingerprint()
    accepted = {"domains", "mixing.weights", "blend weights"} if adopt else set()
    refuse_differences(folder.parent, saved, current, except_for=accepted)
    ledger, policy = load_state(folder / "ledger"), folder / "policy"
    domains, saved_domains = current["domains"], saved["domains"]
    if list(domains.items()) == list(saved_domains.items()):
        decisions.ledger.load_state_dict(ledger)
    else:
        kept = [name for name in domains if domains[name] == saved_domains.get(name)]
        adopt_ledger(decisions.ledger, ledger, consumed, kept)
        _tell_adoption(saved_domains, domains, kept)
    if decisions.controller is not None and list(domains) == list(saved_domains):
        decisions.controller.load_state_dict(load_state(policy))
    return description


def _load_averages(mixer: Mixer, folder: Path, layout: list[int] | None) -> None:
    """Take each rank's averages, unless any rank holds another part of the model now."""
    assert mixer.averages is not None
    state: dict[str, Any] = {}
    if layout == mixer.model_parallel_sizes:
        state = load_state(folder / _averages_name(mixer))
    same = torch.tensor(int(state.get("parameters") == mixer.measured_parameters))
    dist.all_reduce(same, op=dist.ReduceOp.MIN, group=mixer.control_group)
    if same:
        mixer.averages.load_state_dict(state)
    else:
        logger.warning(
            "%s was saved with another split of the model (tensor, pipeline and virtual sizes %s, "
            "now %s): the averages of the domains' gradients start afresh",
            folder.parent,
            layout,
            mixer.model_parallel_sizes,
        )


def _averages_name(mixer: Mixer) -> str:
    return f"gradients_{mixer.model_rank:05d}"


def _tell_adoption(saved: dict[str, Any], current: dict[str, Any], kept: list[str]) -> None:
    policy = "goes on" if list(saved) == list(current) else "starts afresh"
    logger.warning(
        "adopting other data:\n  %s\n%d domains go on where they were, the others start at their "
        "first sequence; the policy %s",
        "\n  ".join(_domain_differences(saved, current)),
        len(kept),
        policy,
    )


def refuse_differences(
    checkpoint_dir: str | Path,
    saved: dict[str, Any],
    current: dict[str, Any],
    except_for: Collection[str] = (),
) -> None:
    """Raise ValueError with a line for each setting in which a saved run and this one differ."""
    differences: list[str] = []
    for key in sorted(saved.keys() | current.keys()):
        before, now = saved.get(key), current.get(key)
        if key in except_for or json.dumps(before) == json.dumps(now):  # which keeps the order
            continue
        if key == "domains" and isinstance(before, dict) and isinstance(now, dict):
            differences += _domain_differences(before, now)
        else:
            differences.append(f"{key}: saved {before}, now {now}")
    if differences:
        raise ValueError(
            f"{checkpoint_dir} was saved by a different run:\n  "
            + "\n  ".join(differences)
            + "\nresume with the saved settings, or start without --load"
            + (
                "; other domains, data and weights of theirs can be accepted with --acodm-adopt"
                if any(line.startswith(_ADOPTABLE) for line in differences)
                else ""
            )
        )


def _domain_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    lines = [f"domain {name!r}: saved, but missing now" for name in saved if name not in current]
    lines += [f"domain {name!r}: new, was not saved" for name in current if name not in saved]
    for name in current:
        before, now = saved.get(name, current[name]), current[name]
        if before["sequences"] != now["sequences"]:
            lines.append(
                f"domain {name!r}: saved with {before['sequences']} sequences, now has "
                f"{now['sequences']}"
            )
        elif before != now:
            lines.append(f"domain {name!r}: as many sequences as saved, but of other text")
    return lines or [f"order of the domains: saved {', '.join(saved)}; now {', '.join(current)}"]
