"""Configuration: one dataclass a room, validated on construction, readable from one YAML file."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_acodm.checks import require, require_in_range
from megatron_acodm.job_file import ARGUMENTS, MEGATRON_LM, read_yaml
from megatron_acodm.policy_config import AdoConfig, AgentConfig, OdmConfig, PikeConfig
from megatron_acodm.weights_file import read_weights

POLICIES = ("acodm", "static", "uniform", "frozen", "odm", "ado", "pike")
ESTIMATORS = ("exact", "sketch", "captured")
GRANULES = ("micro-batch", "sequence")
PARAMETER_KINDS = ("fc1", "fc2", "qkv", "proj")


@dataclass(frozen=True)
class MixingConfig:
    """Which policy sets the mixture, and the rails that it stays within."""

    policy: str = "acodm"
    """One of POLICIES."""

    weights: dict[str, float] | None = None
    """Policy ``static``: weight by domain, any positive scale; None means natural weights."""

    weights_file: str | None = None
    """Policy ``static``: file that ``weights`` is read from.

    JSON or YAML: a mapping from domain to weight, or what DoReMi, DoGE or RegMix publish.
    """

    policy_file: str | None = None
    """Policy ``frozen``: the policy, as a run with --acodm-save-policy wrote it."""

    initial_weights: str = "natural"
    """The mixture before the policy has seen anything: ``natural`` (by size) or ``uniform``."""

    min_weight: float | None = None
    """Lowest share an online policy may give to a domain.

    None: what blending.minimum_quota amounts to, or the policy's own, if that is more: a tenth of
    the uniform share (acodm, pike), 0.01 (ado), its exploration rate (odm).
    """

    max_weight: float = 1.0
    """Highest share an online policy may give to a domain."""

    collapse_weight: float | None = None
    """Weight of one domain above which a policy counts as collapsed onto it, and a warning says so.

    None: nine tenths of the way from the uniform share to the most that the floors of the others
    leave. A domain that starts above it is no collapse.
    """

    collapse_steps: int = 100
    """Steps in a row that a domain must be above ``collapse_weight``."""

    agent: AgentConfig = field(default_factory=AgentConfig)
    """The agent of policy ``acodm``."""

    odm: OdmConfig = field(default_factory=OdmConfig)
    """Policy ``odm``."""

    ado: AdoConfig = field(default_factory=AdoConfig)
    """Policy ``ado``."""

    pike: PikeConfig = field(default_factory=PikeConfig)
    """Policy ``pike``."""

    def __post_init__(self) -> None:
        require(
            self.policy in POLICIES,
            f"mixing.policy is {self.policy!r}; the policies are {', '.join(POLICIES)}",
        )
        require(
            self.initial_weights in ("natural", "uniform"),
            f"mixing.initial_weights is {self.initial_weights!r}; use 'natural' or 'uniform'",
        )
        require_in_range("mixing.max_weight", self.max_weight, 0.0, 1.0)
        if self.min_weight is not None:
            require_in_range("mixing.min_weight", self.min_weight, 0.0, self.max_weight)
        if self.collapse_weight is not None:
            require_in_range("mixing.collapse_weight", self.collapse_weight, 0.0, 1.0)
        require(
            self.collapse_steps >= 1,
            f"mixing.collapse_steps is {self.collapse_steps}; it must be at least 1",
        )
        require(
            self.weights is None or self.policy == "static",
            f"mixing.weights is for policy 'static', not {self.policy!r}; remove the weights or "
            "change the policy",
        )
        require(
            self.policy_file is None or self.policy == "frozen",
            f"mixing.policy_file is for policy 'frozen', not {self.policy!r}; remove it or change "
            "the policy",
        )
        if self.weights_file is not None:
            self._read_weights_file(self.weights_file)

    def _read_weights_file(self, path: str) -> None:
        """Fill in ``weights``, so that they are what a run records and compares."""
        require(
            self.policy == "static",
            f"mixing.weights_file is for policy 'static', not {self.policy!r}; remove it or change "
            "the policy",
        )
        weights = read_weights(path)
        require(
            self.weights is None or self.weights == weights,
            f"mixing.weights differ from those of mixing.weights_file {path}; give one of them",
        )
        object.__setattr__(self, "weights", weights)


@dataclass(frozen=True)
class BlendingConfig:
    """How decisions become samples."""

    granule: str = "micro-batch"
    """What is drawn from one domain as a whole: one of GRANULES.

    ``sequence`` mixes within micro-batches, so that weights are followed within one sequence. The
    gradients of a micro-batch are then of several domains: policies that compare gradients need
    micro-batches of one sequence for it.
    """

    minimum_quota: int | None = None
    """Least granules of every domain in a step (published code: 1); 0: none.

    None: 1 under policies that compare gradients, so that every domain is measured in every step,
    where that takes at most a tenth of the step's granules; otherwise 0. Weights below what the
    minimum amounts to are raised to it.
    """

    repetition: str = "repeat"
    """What happens when a domain's sequences are used up.

    ``repeat``: it starts over in another order. ``cap N``: it may be gone through N times (any
    positive number), then its weight goes to the others; when too little is left of all, training
    ends with a checkpoint. ``error``: training ends with a checkpoint and an error before a
    sequence comes twice.
    """

    decision_lag: int = 1
    """Steps between a measurement and the first step that it can influence, beyond the next one.

    0: the stage of step t+1 is decided from step t. 1: the stage of step t+2 is, so that data
    loading never waits for the agent.
    """

    stage_timeout_s: float = 3600.0
    """How long a data-loading worker waits for a stage that is not decided yet.

    Workers end at once with the training process; this bounds a training process that hangs, and
    must exceed the longest pause between steps (a validation, a checkpoint).
    """

    def __post_init__(self) -> None:
        require(
            self.granule in GRANULES,
            f"blending.granule is {self.granule!r}; the granules are {', '.join(GRANULES)}",
        )
        require(
            self.minimum_quota is None or self.minimum_quota >= 0,
            f"blending.minimum_quota is {self.minimum_quota}; it must be at least 0",
        )
        cap = self.max_epochs
        require(
            self.repetition in ("repeat", "error") or (cap is not None and 0 < cap < math.inf),
            f"blending.repetition is {self.repetition!r}; use 'repeat', 'cap N' with a positive "
            "number N of epochs, or 'error'",
        )
        require_in_range("blending.decision_lag", self.decision_lag, 0, 64)
        require(
            self.stage_timeout_s > 0,
            f"blending.stage_timeout_s is {self.stage_timeout_s}; it must be positive",
        )

    @property
    def max_epochs(self) -> float | None:
        """How often a domain may be gone through; None without a limit."""
        if self.repetition == "error":
            return 1.0
        kind, _, number = self.repetition.partition(" ")
        try:
            return float(number) if kind == "cap" else None
        except ValueError:
            return None


@dataclass(frozen=True)
class AlignmentConfig:
    """Which gradients are compared, and how."""

    estimator: str = "sketch"
    """One of ESTIMATORS.

    ``sketch`` keeps a random projection of each domain's gradient to ``sketch_size`` numbers:
    products within about 1 / sqrt(sketch_size) of the norms (docs/alignment.md). ``exact`` keeps
    the gradient of the selected parameters itself, once a domain: far more memory and traffic.
    ``captured`` is ``sketch`` for micro-batches of several domains (blending.granule ``sequence``):
    it takes each sequence's gradient from the inputs and output gradients of the selected layers.
    """

    sketch_size: int = 16384
    """Numbers a domain that ``sketch`` and ``captured`` keep and sum over ranks; multiple of 64."""

    captured_width: int = 512
    """Estimator ``captured``: numbers a token that a layer's inputs and output gradients are folded
    to; products are within about sqrt(2 / captured_width) of the norms, mostly far closer."""

    coordinates: float | None = None
    """Estimator ``exact``: share of the coordinates that it keeps, chosen at random; None: all."""

    seed: int = 0
    """Which random projection, or subset of coordinates; the same in every step of a run."""

    kind: str = "fc2"
    """Which weight of a selected transformer layer: one of PARAMETER_KINDS (paper: fc2)."""

    depths: tuple[float, ...] = (0.75, 0.875, 1.0)
    """Relative depths of the selected layers, in (0, 1] (paper: layers 12, 14, 16 of 16)."""

    parameters: tuple[str, ...] | None = None
    """Parameters by name, in place of ``kind`` at ``depths``: patterns of Python's fnmatch.

    Names are Megatron's, with the layer's number in the whole model counted from 0, such as
    ``decoder.layers.11.mlp.linear_fc2.weight`` or ``decoder.layers.*.self_attention.*.weight``.
    """

    smoothing: float = 0.9
    """beta in the moving average of each domain's gradients, average <- beta * average +
    (1 - beta) * gradient a step, that later gradients are compared with."""

    gram_interval: int = 0
    """Steps between records of all products of the domains' mean gradients; 0: none."""

    num_probes: int = 4
    """Layers, evenly spread over the depth, whose weight norms the state holds."""

    def __post_init__(self) -> None:
        require(
            self.estimator in ESTIMATORS,
            f"alignment.estimator is {self.estimator!r}; the estimators are "
            f"{', '.join(ESTIMATORS)}",
        )
        require(
            self.kind in PARAMETER_KINDS,
            f"alignment.kind is {self.kind!r}; the kinds are {', '.join(PARAMETER_KINDS)}",
        )
        require(len(self.depths) > 0, "alignment.depths is empty; name at least one depth")
        for depth in self.depths:
            require(
                0.0 < depth <= 1.0,
                f"alignment.depths holds {depth}; a depth lies in (0, 1], 1 is the last layer",
            )
        require(
            self.parameters is None or len(self.parameters) > 0,
            "alignment.parameters is empty; name parameters, or leave it out for kind and depths",
        )
        require(
            64 <= self.sketch_size <= 1 << 24 and self.sketch_size % 64 == 0,
            f"alignment.sketch_size is {self.sketch_size}; it must be a multiple of 64, from 64 to "
            f"{1 << 24}",
        )
        require(
            self.captured_width >= 8,
            f"alignment.captured_width is {self.captured_width}; it must be at least 8",
        )
        require(
            self.coordinates is None or 0.0 < self.coordinates < 1.0,
            f"alignment.coordinates is {self.coordinates}; a share of coordinates lies in (0, 1), "
            "leave it out for all of them",
        )
        require(
            self.coordinates is None or self.estimator == "exact",
            "alignment.coordinates is for estimator 'exact', not "
            f"{self.estimator!r}; choose one of them",
        )
        require_in_range("alignment.seed", self.seed, 0, 2**32 - 1)
        require(
            0.0 <= self.smoothing < 1.0,
            f"alignment.smoothing is {self.smoothing}; it must lie in [0, 1)",
        )
        require(
            self.gram_interval >= 0,
            f"alignment.gram_interval is {self.gram_interval}; it must be at least 0",
        )
        require(self.num_probes >= 1, f"alignment.num_probes is {self.num_probes}; at least 1")


@dataclass(frozen=True)
class AcodmConfig:
    """Everything that megatron-acodm adds to a run."""

    mixing: MixingConfig = field(default_factory=MixingConfig)
    """What mixture next?"""

    blending: BlendingConfig = field(default_factory=BlendingConfig)
    """Which sample next?"""

    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    """Which way did each domain pull?"""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AcodmConfig:
        """Build a config from nested dictionaries.

        Raises:
            ValueError: for an unknown key (the message lists the known ones) or a bad value.
        """
        return _build(cls, values, "")

    @classmethod
    def from_yaml(cls, path: str | Path) -> AcodmConfig:
        """Read a config from a YAML file with the sections mixing, blending, alignment.

        Those of ``job_file``, which are for the training script, are passed over.
        """
        values = read_yaml(path)
        if isinstance(values, dict):
            values = {k: v for k, v in values.items() if k not in (ARGUMENTS, MEGATRON_LM)}
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The config as nested plain dictionaries, as ``from_dict`` takes them."""
        return dataclasses.asdict(self)


_SECTIONS = {
    "mixing": MixingConfig,
    "blending": BlendingConfig,
    "alignment": AlignmentConfig,
    "agent": AgentConfig,
    "odm": OdmConfig,
    "ado": AdoConfig,
    "pike": PikeConfig,
}


def _build(cls: type, values: Any, prefix: str) -> Any:
    require(isinstance(values, dict), f"{prefix or 'the config'} must be a mapping, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        require(
            key in fields,
            f"unknown key {prefix}{key}; the keys here are {', '.join(sorted(fields))}",
        )
        if key in _SECTIONS:
            value = _build(_SECTIONS[key], value, f"{prefix}{key}.")
        else:
            value = _checked(value, str(fields[key].type), prefix + key)
        arguments[key] = value
    return cls(**arguments)


def _is_exponential(value: str) -> bool:
    """Whether YAML took a number without a point, such as 1e-4, for a text."""
    return re.fullmatch(r"[+-]?[0-9]+[eE][+-]?[0-9]+", value) is not None


def _checked(value: Any, annotation: str, name: str) -> Any:
    """``value`` as a field of this annotation takes it.

    Raises:
        ValueError: when it is of another type.
    """
    kind = annotation.removesuffix(" | None")
    if value is None and kind != annotation:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "int" and is_number and value % 1 == 0:  # not so of infinity and nan
        return int(value)
    if kind == "float" and (is_number or (isinstance(value, str) and _is_exponential(value))):
        return float(value)
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "tuple[float, ...]" and isinstance(value, (list, tuple)):
        return tuple(_checked(item, "float", name) for item in value)
    if kind == "tuple[str, ...]" and isinstance(value, (list, tuple)):
        return tuple(_checked(item, "str", name) for item in value)
    if kind == "dict[str, float]" and isinstance(value, dict):
        return {str(key): _checked(item, "float", f"{name}.{key}") for key, item in value.items()}
    raise ValueError(f"{name} is {value!r}; it must be of type {kind}")
