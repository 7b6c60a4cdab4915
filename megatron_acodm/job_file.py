"""The one YAML file of a job: the mixture's settings, and the arguments of the training script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ARGUMENTS = "arguments"
"""Section with arguments for whichever script trains: our trainer, or one of Megatron-LM."""

MEGATRON_LM = "megatron_lm"
"""Section with further arguments, for a script of Megatron-LM only."""


def read_yaml(path: str | Path) -> Any:
    """What the file holds; an empty one holds an empty mapping.

    Raises:
        ValueError: when it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.safe_load(file) or {}
    except OSError as error:
        raise ValueError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def read_arguments(path: str | Path, sections: Sequence[str]) -> list[str]:
    """The command line that these sections of a job file stand for.

    ``name: value`` is ``--name value``, a list gives several values, and ``true`` is the flag
    alone. What is empty is left out. ``false`` is refused, as leaving the flag out may mean yes.

    Raises:
        ValueError: when the file cannot be read, or holds something else.
    """
    content = read_yaml(path)
    words: list[str] = []
    for section in sections:
        values = content.get(section) if isinstance(content, dict) else None
        if values is not None and not isinstance(values, dict):
            raise ValueError(f"{path}: {section} must be a mapping, not {values!r}")
        for name, value in (values or {}).items():
            words += _as_words(f"--{str(name).replace('_', '-')}", value, f"{path}: {section}")
    return words


def _as_words(flag: str, value: Any, place: str) -> list[str]:
    if value is None:
        return []
    if value is False:
        name = flag[2:]
        raise ValueError(
            f"{place}: {name} is false, which no command line can say; remove the line, or give "
            f"the script's flag against it (often no-{name}: true)"
        )
    if value is True:
        return [flag]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(item, (dict, list, bool)) or item is None for item in values):
        raise ValueError(f"{place}: {flag[2:]} is {value!r}; give a value, or a list of values")
    return [flag, *map(str, values)]


def config_file(arguments: Sequence[str]) -> str | None:
    """The file that a command line names with ``--acodm-config``, the last one if several."""
    found = None
    for word, after in zip(arguments, [*arguments[1:], None], strict=True):
        if word == "--acodm-config":
            found = after
        elif word.startswith("--acodm-config="):
            found = word.partition("=")[2]
    return found
