"""What a policy is: it looks at a step and says what the next undecided batch is mixed of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from megatron_acodm.config import MixingConfig
from megatron_acodm.mixing.observation import Observation
from megatron_acodm.mixing.simplex import Bounds


@dataclass(frozen=True)
class Setting:
    """What a policy knows of the run before it starts."""

    domains: list[str]
    """K names, in the order of every vector."""

    sizes: np.ndarray
    """[K] natural weights, on any scale: sequences per epoch; 0 masks a domain out."""

    num_probes: int
    """D, the number of probed layers in an observation of policies that need them."""

    train_iters: int
    """Length of the run in optimizer steps."""

    seed: int
    """Seed of every random choice of the policy."""

    lowest_share: float = 0.0
    """Share of a batch that every domain with a weight gets, however small that is."""

    def __post_init__(self) -> None:
        count = len(self.domains)
        repeated = sorted({name for name in self.domains if self.domains.count(name) > 1})
        if repeated:
            raise ValueError(f"domain names repeat: {', '.join(repeated)}; make them unique")
        if np.shape(self.sizes) != (count,):
            raise ValueError(
                f"sizes have shape {list(np.shape(self.sizes))}; give one for each of the "
                f"{count} domains"
            )
        if not np.all(np.isfinite(self.sizes)) or np.any(np.less(self.sizes, 0)):
            raise ValueError(f"domain sizes are {list(self.sizes)}; each must be 0 or more")
        if not np.any(self.active):
            raise ValueError("every domain is empty; add data to at least one")

    @property
    def active(self) -> np.ndarray:
        """[K] bool: the domains that have data."""
        return np.greater(self.sizes, 0)


class Policy(ABC):
    """Chooses mixtures of K domains: one file a policy, and one line in ``registry.py``."""

    name: ClassVar[str]
    """As in ``mixing.policy`` of the config."""

    needs_alignment: bool = False
    """Whether observations must carry alignments."""

    needs_probes: ClassVar[bool] = False
    """Whether they must carry weight norms."""

    needs_affinity: bool = False
    """Whether they must carry affinities too."""

    setting: Setting
    """The run that it was built for."""

    bounds: Bounds
    """The mixtures that it may choose."""

    initial_weights: np.ndarray
    """[K] float64: the mixture before anything was observed."""

    @abstractmethod
    def __init__(self, config: MixingConfig, setting: Setting) -> None:
        """Raises ValueError if the config does not fit the setting."""

    @classmethod
    def compares_gradients(cls, config: MixingConfig) -> bool:
        """Whether one that is built so needs alignments; known before there is data."""
        return cls.needs_alignment

    @abstractmethod
    def decide(self, observation: Observation) -> np.ndarray:
        """Weights [K] float64, within ``bounds``, for the next stage that is not decided yet."""

    def restrict(self, available: np.ndarray) -> None:  # noqa: B027 (see below)
        """From now on only the ``available`` [K] bool domains, at least one, can be drawn.

        Whatever weight a policy gives to others goes to the available ones in proportion, so a
        policy that does not learn from what its weights do need not care.
        """

    def interrupt(self) -> None:  # noqa: B027 (most policies link no step to the one before)
        """A step was lost: the next observation does not follow from the last one."""

    @property
    def rewards(self) -> np.ndarray | None:
        """[K] reward of each domain for the metrics, nan where unknown; None without rewards."""
        return None

    def diagnostics(self) -> dict[str, float]:
        """Figures about the policy's own state, for the metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts with string keys, or lists, of tensors, numbers, strings, bools, None."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (see state_dict)
        """Continue from ``state_dict`` as if never interrupted, bit for bit."""
