"""Writes what the agent of a run has learned, for policy ``frozen`` of another run."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from megatron_acodm import __version__
from megatron_acodm.megatron.mixer import Mixer
from megatron_acodm.mixing.acodm import AcodmPolicy
from megatron_acodm.mixing.transfer import save_policy

_TOLD = ("train_iters", "num_layers", "hidden_size", "num_attention_heads", "seq_length",
         "global_batch_size", "micro_batch_size", "lr", "seed")  # fmt: skip


def save_learned_policy(mixer: Mixer, path: str | Path, args: Namespace, iteration: int) -> None:
    """Write ``path``'s ``.safetensors`` and ``.json``, on rank 0; the others do nothing.

    Args:
        mixer: of a run with policy ``acodm``.
        path: either suffix of it is dropped; its folder is made.
        args: of the run, Megatron-LM's or with its names, for the record of where it was learned.
        iteration: steps that it has learned from.
    """
    if mixer.controller is None:
        return
    policy = mixer.controller.policy
    assert isinstance(policy, AcodmPolicy)  # acodm_config sees to it
    provenance = {"megatron_acodm": __version__, "iteration": iteration}
    provenance |= {name: getattr(args, name) for name in _TOLD}
    provenance["config"] = mixer.config.to_dict()
    provenance = json.loads(json.dumps(provenance))  # lists for tuples
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_policy(path, policy.exported(provenance))
