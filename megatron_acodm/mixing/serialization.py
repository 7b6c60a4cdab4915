"""State dicts on disk: tensors as safetensors, the rest as JSON beside it; never a pickle."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from megatron_acodm.files import write_atomically

_TENSOR = "$tensor"
_FLOAT = "$float"
_FORMAT = 1


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Split a nested state into its tensors by name, and a JSON-able rest that refers to them.

    Args:
        state: nested dicts (string keys) and lists of tensors, int, float, str, bool and None.

    Raises:
        ValueError: for any other value or key, with its place.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _strip(state, "", tensors)


def unflatten(tensors: dict[str, Tensor], rest: Any) -> Any:
    """The state that ``flatten`` split; raises ValueError if a tensor is missing."""
    if isinstance(rest, list):
        return [unflatten(tensors, item) for item in rest]
    if not isinstance(rest, dict):
        return rest
    if _FLOAT in rest:
        return float(rest[_FLOAT])
    if _TENSOR in rest:
        name = rest[_TENSOR]
        if name not in tensors:
            raise ValueError(f"tensor {name!r} is missing")
        return tensors[name]
    return {key: unflatten(tensors, item) for key, item in rest.items()}


def save_state(prefix: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``<prefix>.safetensors`` and ``<prefix>.json``.

    Each file appears complete or not at all. The JSON comes last and holds the checksum of the
    other, so a pair that was torn by a crash in between is refused on loading.

    Raises:
        ValueError: if the state holds what cannot be stored.
    """
    tensors, rest = flatten(state)
    # clones: safetensors refuses views that share memory
    blob = safetensors.torch.save(
        {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
    )
    header = {
        "format": _FORMAT,
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
        "state_sha256": _digest(rest),
        "state": rest,
    }
    tensor_path, json_path = _paths(prefix)
    write_atomically(tensor_path, blob)
    write_atomically(json_path, json.dumps(header, indent=1, allow_nan=False).encode())


def load_state(prefix: str | Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote.

    Raises:
        ValueError: if a file is missing, torn, altered or of another format.
    """
    tensor_path, json_path = _paths(prefix)
    try:
        text, blob = json_path.read_bytes(), tensor_path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot read the saved state {error.filename}: {error.strerror}"
        ) from error
    try:
        header = json.loads(text)
        found = header["format"]
        rest, tensor_digest, digest = (
            header[key] for key in ("state", "tensors_sha256", "state_sha256")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{json_path} is damaged: {error}; use another checkpoint") from error
    if found != _FORMAT:
        raise ValueError(f"{json_path} has format {found}; this version reads {_FORMAT}")
    if _digest(rest) != digest:
        raise ValueError(f"{json_path} was altered (checksum); use another checkpoint")
    if hashlib.sha256(blob).hexdigest() != tensor_digest:
        raise ValueError(
            f"{tensor_path} does not belong to {json_path.name}, or was altered (checksum); "
            "use another checkpoint"
        )
    return unflatten(safetensors.torch.load(blob), rest)


def _strip(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}  # JSON has no nan
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_strip(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or "/" in key or key.startswith("$"):
                raise ValueError(
                    f"state{name} has the key {key!r}; keys are strings without / or $"
                )
        return {key: _strip(item, f"{name}/{key}", tensors) for key, item in value.items()}
    raise ValueError(f"state{name} is a {type(value).__name__}, which a state cannot hold")


def _digest(rest: Any) -> str:
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _paths(prefix: str | Path) -> tuple[Path, Path]:
    return Path(f"{prefix}.safetensors"), Path(f"{prefix}.json")
