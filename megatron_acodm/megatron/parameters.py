"""Finds the host model's parameters whose gradients are compared and whose norms are probed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_acodm.alignment.selection import layers_at_depths, probe_layers
from megatron_acodm.config import AlignmentConfig

_WEIGHT_OF_KIND = {
    "fc1": ("mlp", "linear_fc1"),
    "fc2": ("mlp", "linear_fc2"),
    "qkv": ("self_attention", "linear_qkv"),
    "proj": ("self_attention", "linear_proj"),
}

_PROBE_ROWS = 64
"""Rows of a probed weight that its norm is measured on; bounds the copy that the change needs."""


@dataclass(frozen=True)
class SelectedParameter:
    """A weight of one transformer layer that this rank holds (a shard of)."""

    name: str
    parameter: Any  # torch.nn.Parameter with the attributes that Megatron's DDP adds


class WeightProbe:
    """Norm of one layer's weight and of its change over a step, on a fixed subset of rows.

    The subset is taken along the dimension that tensor parallelism does not cut, so that the
    shards of all ranks add up to the same numbers in every layout.
    """

    def __init__(self, index: int, parameter: torch.nn.Parameter) -> None:
        self.index = index  # position among the state's probes
        self._parameter = parameter
        self._dim = 1 - getattr(parameter, "partition_dim", 1)
        length = parameter.shape[self._dim]
        self._stride = max(1, length // _PROBE_ROWS)
        self._before: torch.Tensor | None = None

    def _sample(self) -> torch.Tensor:
        rows = torch.arange(
            0, self._parameter.shape[self._dim], self._stride, device=self._parameter.device
        )
        return self._parameter.detach().index_select(self._dim, rows).float()

    def before_update(self) -> None:
        """Remember the weights before the optimizer changes them."""
        self._before = self._sample()

    def after_update(self) -> torch.Tensor:
        """``[3]`` float64: sum of squares of the weights, of their change, and the count."""
        after = self._sample().double()
        before = after if self._before is None else self._before.double()
        self._before = None
        count = torch.tensor(float(after.numel()), dtype=torch.float64, device=after.device)
        return torch.stack([after.square().sum(), (after - before).square().sum(), count])


def _layers(model_chunks: Sequence[torch.nn.Module]) -> dict[int, torch.nn.Module]:
    """Transformer layers on this rank by their number in the whole model, counted from 1."""
    from megatron.core.utils import get_attr_wrapped_model

    layers = {}
    for chunk in model_chunks:
        for layer in get_attr_wrapped_model(chunk, "decoder").layers:
            layers[layer.layer_number] = layer
    return layers


def _weight(layer: torch.nn.Module, number: int, kind: str) -> torch.nn.Parameter:
    path = _WEIGHT_OF_KIND[kind]
    module: object = layer
    for name in path:
        module = getattr(module, name, None)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.nn.Parameter):
        present = [
            other
            for other, (first, second) in _WEIGHT_OF_KIND.items()
            if hasattr(getattr(layer, first, None), second)
        ]
        raise ValueError(
            f"layer {number} has no dense weight {'.'.join(path)}.weight; alignment.kind "
            f"{kind!r} cannot be measured there (this layer has: {', '.join(present) or 'none'})"
        )
    return weight


def select_parameters(
    model_chunks: Sequence[torch.nn.Module], num_layers: int, config: AlignmentConfig
) -> list[SelectedParameter]:
    """The weights at the configured depths that live on this rank (may be none under PP)."""
    layers = _layers(model_chunks)
    return [
        SelectedParameter(f"decoder.layers.{n}.{config.kind}", _weight(layers[n], n, config.kind))
        for n in layers_at_depths(config.depths, num_layers)
        if n in layers
    ]


def make_probes(
    model_chunks: Sequence[torch.nn.Module], num_layers: int, config: AlignmentConfig
) -> list[WeightProbe]:
    """The state's weight probes whose layers live on this rank."""
    layers = _layers(model_chunks)
    return [
        WeightProbe(index, _weight(layers[n], n, config.kind))
        for index, n in enumerate(probe_layers(config.num_probes, num_layers))
        if n in layers
    ]
