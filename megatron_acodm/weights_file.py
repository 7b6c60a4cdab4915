"""Reads domain weights from a file: a plain mapping, or as DoReMi, DoGE and RegMix publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def read_weights(path: str | Path) -> dict[str, float]:
    """Weight by domain name, on the file's scale, from JSON (``.json``) or YAML.

    The forms, told apart by their keys:

    - ``{domain: weight, ...}``
    - DoReMi's (sangmichaelxie/doremi, ``configs/*.json``):
      ``{"train_domain_weights": {domain: weight, ...}, ...}``
    - DoGE's (Olivia-fsm/DoGE, ``config/**/*.json``): ``{"train_domains": "a,b", "train_dw":
      "0.7,0.3,0", ...}``, where weights beyond the domains must be 0
    - RegMix's (sail-sg/regmix, ``mixture_config/**/*.yaml``):
      ``{train: {domain: weight, ...}, ...}``

    Names are taken as they stand; policy ``static`` finds the domains they mean.

    Raises:
        ValueError: if the file cannot be read or has another form.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the weights {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    try:
        if Path(path).suffix == ".json":
            return _weights(json.loads(text, object_pairs_hook=_without_repeats))
        return _weights(yaml.load(text, _UniqueKeys))
    except (ValueError, yaml.YAMLError) as error:  # JSON's errors are ValueErrors
        raise ValueError(f"{path}: {error}") from error


def _without_repeats(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping of the pairs; where a key comes twice, both parsers would keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        raise ValueError(f"{', '.join(repeated)} comes more than once; keep one")
    return content


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which no key comes twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node; raises ValueError for a key that comes twice."""
        _without_repeats([(self.construct_object(key, deep=True), None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def _weights(content: Any) -> dict[str, float]:
    if not isinstance(content, dict) or not content:
        raise ValueError("it holds no weights; give a mapping from domain to weight")
    for key in ("train_domain_weights", "train"):  # DoReMi, RegMix
        if isinstance(content.get(key), dict):
            return _weights(content[key])
    names, values = content.get("train_domains"), content.get("train_dw")
    if isinstance(names, str) and isinstance(values, str):
        return _doge(names.split(","), values.split(","))
    return {str(name): _number(str(name), value) for name, value in content.items()}


def _doge(names: list[str], values: list[str]) -> dict[str, float]:
    numbers = [_number(f"train_dw number {i}", value) for i, value in enumerate(values, start=1)]
    if len(numbers) < len(names) or any(numbers[len(names) :]):
        raise ValueError(
            f"train_dw has {len(numbers)} numbers for the {len(names)} names of train_domains; "
            "give one each, and 0 for any beyond"
        )
    return dict(zip(names, numbers[: len(names)], strict=True))


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)  # text too: YAML takes 1e-5 for one
    except ValueError:
        pass
    raise ValueError(f"the weight of {name} is {value!r}; it must be a number")
