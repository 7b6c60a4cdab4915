"""Reads flat dataclasses from JSON, and refuses values of another kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_Record = TypeVar("_Record")


def read_record(cls: Callable[..., _Record], values: Any, directory: Path) -> _Record:
    """Build a dataclass whose fields are of type int, str or Path, or one of these or None.

    Args:
        cls: The dataclass.
        values: What JSON gave for it; members that it has no field for are passed over.
        directory: What its paths are relative to; they may not lead out of it.

    Raises:
        KeyError: when a member is missing.
        ValueError: when one is of another kind, or a negative number.
        TypeError: when ``values`` is no object.
    """
    arguments = {}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        value = values[item.name]
        kind, optional = str(item.type).removesuffix(" | None"), str(item.type).endswith("None")
        if not (optional and value is None):
            value = check_value(kind, value)
            value = directory / value if kind == "Path" else value
        arguments[item.name] = value
    return cls(**arguments)


def check_value(kind: str, value: Any) -> Any:
    """Return ``value``.

    Raises:
        ValueError: when it is not of this kind ("int", "str" or "Path").
    """
    if kind == "int":
        good = type(value) is int and value >= 0
    elif kind == "str":
        good = isinstance(value, str)
    else:
        assert kind == "Path"
        good = isinstance(value, str) and bool(value)
        good = good and not Path(value).is_absolute() and ".." not in Path(value).parts
    if not good:
        raise ValueError(f"{value!r} is not a valid {kind}")
    return value
