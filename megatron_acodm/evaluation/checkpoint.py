"""Finds a checkpoint of our trainer or of Megatron-LM, reads its settings and loads its weights."""

from __future__ import annotations

import pickle
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_acodm.megatron.checkpoint import TRACKER

_METADATA = "metadata.json"
_LEGACY_FILE = "model_optim_rng.pt"
_WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
_TENSORS = ".metadata"
_DCP = "torch.distributed.checkpoint"
_LISTED = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    f"{_DCP}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    f"{_DCP}.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    f"{_DCP}.planner": (
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    ),
}  # fmt: skip
"""What the list of a checkpoint's tensors is made of, by module."""

# Where layers with fused norms (TransformerEngine's) keep what the others keep in modules.
_FUSED_NORMS = (
    (
        re.compile(r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)$"),
        r".input_layernorm.\1",
    ),
    (re.compile(r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$"), r".pre_mlp_layernorm.\1"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk, and what it says of itself."""

    folder: Path
    iteration: int | None
    """Steps of its training, where it says so."""
    args: Namespace | None
    """The arguments of its run; None where it keeps none."""
    padded_vocab_size: int
    """Rows of its word embeddings, over all tensor-parallel ranks."""
    legacy: dict[str, Any] | None
    """``--ckpt-format torch``: the weights of this rank's part; None for ``torch_dist``."""

    def load_into(self, module: Any, *, averages: bool = False) -> None:
        """Load the weights into a bare GPT; collective.

        Args:
            module: This rank's part of the model, at any parallel sizes for ``torch_dist``.
            averages: Load the averaged weights that our trainer validates under
                ``--eval-ema-decay`` in place of the last ones.

        Raises:
            ValueError: when the weights do not fit the model.
        """
        if averages and self.legacy is not None:
            raise ValueError(f"{self.folder} has no averaged weights; leave --averages out")
        if self.legacy is not None:
            state = _without_extra_state(self.legacy)
            if any("input_layernorm" in name for name, _ in module.named_parameters()):
                state = {_separate_norm(name): value for name, value in state.items()}
            self._take(module, state)
            return
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.core import CheckpointingException
        from torch.distributed.checkpoint.api import CheckpointException

        common = dist_checkpointing.load_common_state_dict(str(self.folder))
        metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
        wanted = _without_extra_state(module.sharded_state_dict(metadata=metadata))
        if averages:
            wanted = {name: _averaged(tensor) for name, tensor in wanted.items()}
        try:
            state = dist_checkpointing.load({"model": wanted}, str(self.folder))["model"]
        except (CheckpointingException, CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1]
            hint = " (--averages needs a run with --eval-ema-decay)" if averages else ""
            raise ValueError(f"{self.folder} does not fit its model: {reason}{hint}") from error
        self._take(module, state)

    def _take(self, module: Any, state: dict[str, Any]) -> None:
        try:
            missing, unexpected = module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise ValueError(f"{self.folder} does not fit its model: {error}") from error
        wrong = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]
        if wrong:
            raise ValueError(
                f"{self.folder} does not fit its model, first at {wrong[0]}; check its settings, "
                "and --transformer-impl"
            )


def open_checkpoint(path: str | Path, step: int | None, tensor_parallel_size: int) -> Checkpoint:
    """Find a checkpoint and read what it says of itself; every rank for itself.

    Args:
        path: The ``--save`` folder of a run, or one checkpoint in it.
        step: The iteration, in place of the latest.
        tensor_parallel_size: That of the evaluation.

    Raises:
        ValueError: when there is none, or none that can be loaded here.
    """
    folder, iteration = _locate(Path(path), step)
    if (folder / _METADATA).is_file():
        return _open_distributed(folder, iteration)
    return _open_legacy(folder, iteration, tensor_parallel_size)


def _locate(path: Path, step: int | None) -> tuple[Path, int | None]:
    if not path.is_dir():
        raise ValueError(f"--load: {path} is not a folder; name a run's --save folder")
    tracker = path / TRACKER
    if step is not None:
        folder = path / f"iter_{step:07d}"
    elif tracker.is_file():
        name = tracker.read_text(encoding="utf-8").strip()
        folder = path / (f"iter_{int(name):07d}" if name.isdigit() else name)
    else:
        folder = path
    if not folder.is_dir():
        there = ", ".join(sorted(entry.name for entry in path.glob("iter_*"))) or "none"
        raise ValueError(f"--load: {folder} does not exist; checkpoints in {path}: {there}")
    number = folder.name.removeprefix("iter_")
    return folder, int(number) if number.isdigit() else None


def _open_distributed(folder: Path, iteration: int | None) -> Checkpoint:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        _refuse_code(folder / _TENSORS)
        common = dist_checkpointing.load_common_state_dict(str(folder))
        tensors = dist_checkpointing.load_tensors_metadata(str(folder))
    except (CheckpointingException, OSError) as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
    except pickle.UnpicklingError as error:
        raise _unknown_objects(folder, error) from error
    embeddings = tensors.get(f"model.{_WORD_EMBEDDINGS}", tensors.get(_WORD_EMBEDDINGS))
    if embeddings is None:
        raise ValueError(f"{folder} has no {_WORD_EMBEDDINGS}; it is not that of a GPT")
    return Checkpoint(folder, iteration, common.get("args"), embeddings.global_shape[0], None)


class _MetadataReader(pickle.Unpickler):
    """Reads the list of tensors as torch will, but knows no function that could do harm.

    torch reads that file with plain pickle, which runs what the file names.
    """

    def find_class(self, module: str, name: str) -> Any:
        """What ``module`` and ``name`` stand for, if a list of tensors may hold it."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _LISTED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _refuse_code(file: Path) -> None:
    with open(file, "rb") as stream:
        _MetadataReader(stream).load()


def _open_legacy(folder: Path, iteration: int | None, tensor_parallel_size: int) -> Checkpoint:
    from megatron.core import parallel_state

    parts = sorted(part.parent.name for part in folder.glob(f"mp_rank_*/{_LEGACY_FILE}"))
    if not parts:
        raise ValueError(
            f"{folder} holds no checkpoint in the format torch_dist or torch; name a run's --save "
            "folder, or one iter_… folder in it"
        )
    if parts != [f"mp_rank_{rank:02d}" for rank in range(tensor_parallel_size)]:
        raise ValueError(
            f"{folder} is in the format torch, which is loaded as it was saved: its parts are "
            f"{', '.join(parts)}, and --tensor-model-parallel-size is {tensor_parallel_size}; give "
            "the size it was saved with, or (also for pipeline parallelism) convert it with "
            "Megatron-LM's --ckpt-convert-format torch_dist"
        )
    part = parts[parallel_state.get_tensor_model_parallel_rank()]
    try:
        # Megatron-Core has told torch which of its classes are safe to load.
        state = torch.load(folder / part / _LEGACY_FILE, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unknown_objects(folder, error) from error
    rows = state["model"][_WORD_EMBEDDINGS].shape[0] * tensor_parallel_size
    return Checkpoint(folder, iteration, state.get("args"), rows, state["model"])


def _unknown_objects(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{folder} cannot be read safely: it is damaged, or holds objects of another version than "
        f"the installed Megatron-Core ({str(error).splitlines()[0]}); evaluate with the version "
        "that saved it"
    )


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """Without what TransformerEngine keeps for FP8, which evaluation does not use."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def _separate_norm(name: str) -> str:
    for pattern, replacement in _FUSED_NORMS:
        name = pattern.sub(replacement, name)
    return name


def _averaged(tensor: Any) -> Any:
    """The weight's average, as ``AveragedWeights.sharded_state`` names it; in float32."""
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    return make_sharded_optimizer_tensor(tensor, tensor.data.float(), "average")
