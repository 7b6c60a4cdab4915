"""Checks that the installed Megatron-Core is one that this package was written for."""

from __future__ import annotations

import importlib
from typing import Any

SUPPORTED = ((0, 16), (0, 21))
"""Half-open range of megatron-core (major, minor) versions that are known to work.

The tests run on the oldest, which the package requires; docs/hosts.md says what ran on the others.
"""


class UnsupportedHostError(RuntimeError):
    """The installed Megatron-Core lacks something this package needs, or has the wrong version."""


def check_host_version() -> str:
    """Return the version of megatron-core.

    Raises:
        UnsupportedHostError: when megatron-core is missing or its version is out of range.
    """
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    remedy = f"install it with: pip install 'megatron-core>={low},<{high}'"
    try:
        version = importlib.import_module("megatron.core").__version__
    except ImportError as error:
        raise UnsupportedHostError(
            f"megatron-core cannot be imported ({error}); {remedy}"
        ) from error
    parts = tuple(int(part) for part in version.split(".")[:2])
    if not SUPPORTED[0] <= parts < SUPPORTED[1]:
        raise UnsupportedHostError(
            f"megatron-core {version} is installed; versions >={low},<{high} are supported; "
            f"{remedy}"
        )
    return str(version)


def host_symbol(path: str) -> tuple[Any, str, Any]:
    """Resolve a dotted host symbol such as ``megatron.core.x.Class.method``.

    Returns:
        Its owner (module or class), its name there, and the object itself.

    Raises:
        UnsupportedHostError: naming the symbol that is not where it is expected.
    """
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        try:
            for name in parts[split:-1]:
                owner = getattr(owner, name)
            return owner, parts[-1], getattr(owner, parts[-1])
        except AttributeError:
            break
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    raise UnsupportedHostError(
        f"{path} is not in the installed Megatron-Core; it is in versions >={low},<{high}"
    )
