"""Evaluation in tests: the door in processes, checkpoints of known weights, questions to them."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import ENVIRONMENT, REPOSITORY
from host import start_megatron
from reference_gpt import VOCABULARY, ReferenceGPT

from megatron_acodm.evaluation.scoring import Scorer


@dataclass(frozen=True)
class Evaluated:
    """A finished run of ``tools/evaluate.py``."""

    code: int
    output: str
    file: Path

    @property
    def results(self) -> dict[str, Any]:
        return json.loads(self.file.read_text(encoding="utf-8"))


def evaluate(folder: Path, *arguments: str, processes: int = 1) -> Evaluated:
    """Run the tool, offline; its figures go to a file in ``folder``."""
    file = folder / "evaluation.json"
    file.unlink(missing_ok=True)
    script = str(REPOSITORY / "tools" / "evaluate.py")
    command = [*launcher(processes), script, "--output", str(file), *arguments]
    return Evaluated(*run(command, folder), file)


def launcher(processes: int) -> list[str]:
    """What starts a script in so many processes."""
    if processes == 1:
        return [sys.executable]
    distributed = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return [sys.executable, *distributed, "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0"]  # fmt: skip


def run(command: Sequence[str], folder: Path) -> tuple[int, str]:
    """Exit status and output of a command; what it caches stays in ``folder``."""
    result = subprocess.run(
        command,
        env={
            **ENVIRONMENT,
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "huggingface"),
        },
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return result.returncode, result.stdout


def save_reference(root: Path) -> ReferenceGPT:
    """A checkpoint of our trainer with the weights of the reference, which is returned."""
    from host import tiny_model

    from megatron_acodm.megatron.checkpoint import save_checkpoint

    reference = ReferenceGPT(tied=True, biases=True, dtype=torch.float32)
    model = tiny_model(vocabulary=VOCABULARY)
    with torch.no_grad():
        for name, parameter in model.chunks[0].module.named_parameters():
            parameter.copy_(reference.parameters[name])
    save_checkpoint(root, 3, model, None, {})
    return reference


def save_like_megatron_lm(root: Path, args: Namespace, weights: dict[str, torch.Tensor]) -> None:
    """A checkpoint as Megatron-LM lays it out, with the arguments of its run."""
    from megatron.core import dist_checkpointing

    from megatron_acodm.evaluation.model import build_evaluation_model

    start_megatron()
    module = build_evaluation_model(args)
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("_extra_state") for name in missing)
    folder = root / "iter_0000005"
    folder.mkdir(parents=True)
    state = {"model": module.sharded_state_dict(), "args": args, "iteration": 5}
    dist_checkpointing.save(state, str(folder))
    (root / "latest_checkpointed_iteration.txt").write_text("5", encoding="utf-8")


def open_scorer(root: Path, tokenizer: Any, batch_size: int = 3, processes: int = 1) -> Scorer:
    """The scorer of a checkpoint, at a tensor-parallel size under a parallel state of that size."""
    from megatron_acodm.evaluation.arguments import build_parser
    from megatron_acodm.evaluation.checkpoint import open_checkpoint
    from megatron_acodm.evaluation.model import build_evaluation_model, settle_shape
    from megatron_acodm.megatron.model import check_transformer_impl

    size = ["--tensor-model-parallel-size", str(processes)]
    args = build_parser().parse_args(["--load", str(root), *size])
    check_transformer_impl(args)
    checkpoint = open_checkpoint(root, None, processes)
    model = settle_shape(args, checkpoint)
    module = build_evaluation_model(model)
    checkpoint.load_into(module)
    return Scorer(module, tokenizer, model.seq_length, batch_size)
