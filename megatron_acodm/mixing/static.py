"""Policy ``static``: the same given weights at every step, or natural ones."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from megatron_acodm.config import MixingConfig
from megatron_acodm.mixing.observation import Observation
from megatron_acodm.mixing.policy import Policy, Setting
from megatron_acodm.mixing.simplex import Bounds, natural_weights

logger = logging.getLogger(__name__)


class StaticPolicy(Policy):
    """Draws every batch with ``mixing.weights``, by default in proportion to the domains' sizes.

    So it runs what was found before the run: the weights of DoReMi (arXiv 2305.10429), DoGE
    (arXiv 2310.15393), RegMix (arXiv 2407.01492), read from the files that they publish.
    """

    name: ClassVar[str] = "static"

    def __init__(self, config: MixingConfig, setting: Setting) -> None:
        """Raises ValueError if the weights do not name exactly the domains that have data."""
        self.setting = setting
        self.bounds = Bounds.build(setting.active, 0.0, 1.0)
        if config.weights is None:
            self.initial_weights = natural_weights(setting.sizes)
        else:
            self.initial_weights = _given_weights(config.weights, setting, config.weights_file)

    def decide(self, observation: Observation) -> np.ndarray:
        """The given weights [K]."""
        return self.initial_weights


def _given_weights(given: dict[str, float], setting: Setting, source: str | None) -> np.ndarray:
    weights = _by_domain(given, setting.domains)
    unknown = sorted(set(weights) - set(setting.domains))
    missing = sorted(set(setting.domains) - set(weights))
    if unknown or missing:
        raise ValueError(
            f"mixing.weights{f' from {source}' if source else ''} must name every domain once"
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
            + (f"; missing: {', '.join(missing)} (0 leaves a domain out)" if missing else "")
        )
    for name, size in zip(setting.domains, setting.sizes, strict=True):
        if not 0.0 <= weights[name] < math.inf:
            raise ValueError(f"mixing.weights.{name} is {weights[name]}; it must be 0 or more")
        if weights[name] > 0.0 and size == 0:
            raise ValueError(
                f"mixing.weights.{name} is {weights[name]}, but the domain is empty, or has weight "
                "0 in the blend"
            )
    values = np.array([weights[name] for name in setting.domains], dtype=np.float64)
    if values.sum() == 0.0:
        raise ValueError("mixing.weights are all 0; give at least one domain a positive weight")
    return values / values.sum()


def _by_domain(weights: dict[str, float], domains: Sequence[str]) -> dict[str, float]:
    """``weights`` by the run's names of their domains; names that fit none stay.

    A name may differ in case and in what stands between its words: the Pile's "NIH ExPorter" is
    "train_the_pile_nih_exporter" in RegMix's files.
    """
    spellings: dict[str, list[str]] = {}
    for name in domains:
        spellings.setdefault(_spelling(name), []).append(name)
    found: dict[str, float] = {}
    for given, weight in weights.items():
        fitting = spellings.get(_spelling(given), [])
        name = fitting[0] if len(fitting) == 1 and given not in domains else given
        if name != given:
            logger.info("mixing.weights: %r is taken for domain %r", given, name)
        if name in found or (name != given and name in weights):
            raise ValueError(f"mixing.weights has domain {name!r} twice, also as {given!r}")
        found[name] = weight
    return found


def _spelling(name: str) -> str:
    words = re.sub(r"[^\w+#]|_", " ", name.removeprefix("train_the_pile_").casefold())
    return " ".join(words.split()) or name
