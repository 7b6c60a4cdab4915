"""Online data mixing for LLM pretraining on Megatron-Core.

``patch`` and ``unpatch`` are loaded on first use: importing the package imports neither torch
nor Megatron.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_acodm.config import AcodmConfig
    from megatron_acodm.megatron.mixer import Mixer
    from megatron_acodm.megatron.patches import patch, unpatch
    from megatron_acodm.megatron.run import RunShape
    from megatron_acodm.megatron.sidecar import load_sidecar, save_sidecar

__version__ = "0.1.0"

__all__ = [
    "AcodmConfig",
    "Mixer",
    "RunShape",
    "load_sidecar",
    "patch",
    "save_sidecar",
    "unpatch",
]

_HOME = {
    "AcodmConfig": "megatron_acodm.config",
    "Mixer": "megatron_acodm.megatron.mixer",
    "RunShape": "megatron_acodm.megatron.run",
    "load_sidecar": "megatron_acodm.megatron.sidecar",
    "patch": "megatron_acodm.megatron.patches",
    "save_sidecar": "megatron_acodm.megatron.sidecar",
    "unpatch": "megatron_acodm.megatron.patches",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
