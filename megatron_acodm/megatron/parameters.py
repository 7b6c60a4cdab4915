"""Finds the host model's parameters whose gradients are compared and whose norms are probed."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

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
    """A parameter of one transformer layer that this rank holds (a shard of)."""

    name: str  # Megatron's, with the layer's number in the whole model
    parameter: Any  # torch.nn.Parameter with the attributes that Megatron's DDP adds


class WeightProbe:
    """Norm of one layer's weight and of its change over a step, on a fixed subset of rows.

    The subset is taken along the dimension that tensor parallelism does not cut, so that the
    shards of all ranks add up to the same numbers in every layout.

    Args:
        index: position among the state's probes.
        parameter: the weight.
        owned: the range of its numbers that this rank's optimizer updates, where those of others
            come later (overlapped parameter gathering): others are left out. None: all.
    """

    def __init__(
        self, index: int, parameter: torch.nn.Parameter, owned: range | None = None
    ) -> None:
        self.index = index
        self._parameter = parameter
        self._dim = 1 - getattr(parameter, "partition_dim", 1)
        length = parameter.shape[self._dim]
        self._rows = torch.arange(0, length, max(1, length // _PROBE_ROWS), device=parameter.device)
        self._is_owned: torch.Tensor | None = None
        if owned is not None:
            is_owned = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device)
            is_owned[owned.start : owned.stop] = True
            self._is_owned = self._sampled_rows(is_owned.view(parameter.shape))
        self._before: torch.Tensor | None = None

    def _sampled_rows(self, values: torch.Tensor) -> torch.Tensor:
        return values.index_select(self._dim, self._rows)

    def _sample(self) -> torch.Tensor:
        sample = self._sampled_rows(self._parameter.detach()).float()
        return sample if self._is_owned is None else torch.where(self._is_owned, sample, 0.0)

    def before_update(self) -> None:
        """Remember the weights before the optimizer changes them."""
        self._before = self._sample()

    def after_update(self) -> torch.Tensor:
        """``[3]`` float64: sum of squares of the weights, of their change, and the count."""
        after = self._sample()
        before = after if self._before is None else self._before
        self._before = None
        norms = [
            torch.linalg.vector_norm(values, dtype=torch.float64)
            for values in (after, after - before)
        ]
        count = torch.full_like(norms[0], float(after.numel()))
        if self._is_owned is not None:
            count = self._is_owned.sum(dtype=torch.float64)
        return torch.stack([norms[0].square(), norms[1].square(), count])


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


def layer_of(
    selected: SelectedParameter, model_chunks: Sequence[torch.nn.Module]
) -> torch.nn.Module:
    """The linear layer whose weight was selected, where its input and output show the gradient.

    Raises:
        ValueError: it is no such weight.
    """
    for layer in _layers(model_chunks).values():
        for path in _WEIGHT_OF_KIND.values():
            module: Any = layer
            for name in path:
                module = getattr(module, name, None)
            if getattr(module, "weight", None) is not selected.parameter:
                continue
            if hasattr(module, "layer_norm_weight"):
                raise ValueError(
                    f"alignment.estimator 'captured' cannot see what goes into {selected.name}: "
                    f"{type(module).__name__} normalises its input within; select fc2 or proj"
                )
            return module
    raise ValueError(
        "alignment.estimator 'captured' measures the weights of linear layers, not "
        f"{selected.name}; select fc1, fc2, qkv or proj weights"
    )


def select_parameters(
    model_chunks: Sequence[torch.nn.Module], num_layers: int, config: AlignmentConfig
) -> list[SelectedParameter]:
    """The parameters to compare whose gradients this rank contributes (may be none under PP).

    With ``config.parameters`` it is collective over the pipeline stages.

    Raises:
        ValueError: a layer has no such weight, or a pattern matches no parameter of any stage.
    """
    layers = _layers(model_chunks)
    if config.parameters is not None:
        return _match(layers, config.parameters)
    name = ".".join(_WEIGHT_OF_KIND[config.kind])
    return [
        SelectedParameter(
            f"decoder.layers.{n - 1}.{name}.weight", _weight(layers[n], n, config.kind)
        )
        for n in layers_at_depths(config.depths, num_layers)
        if n in layers
    ]


def _match(layers: dict[int, torch.nn.Module], patterns: Sequence[str]) -> list[SelectedParameter]:
    """The parameters of these layers whose names match one of the patterns."""
    from megatron.core import parallel_state

    found = [
        SelectedParameter(f"decoder.layers.{n - 1}.{name}", parameter)
        for n, layer in sorted(layers.items())
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad
    ]
    stages: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(
        stages,
        [selected.name for selected in found],
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    names = [name for stage in stages for name in stage]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            kinds = dict.fromkeys(re.sub(r"layers\.\d+\.", "layers.N.", name) for name in names)
            raise ValueError(
                f"alignment.parameters: {pattern!r} matches no parameter; with N from 0 to "
                f"{max(map(_layer_index, names), default=0)} there are {', '.join(kinds)}"
            )
    holders = {
        parameter: module
        for layer in layers.values()
        for module in layer.modules()
        for parameter in module.parameters(recurse=False)
    }
    wanted = [s for s in found if any(fnmatch.fnmatchcase(s.name, p) for p in patterns)]
    return [s for s in wanted if _is_contributed(s, holders[s.parameter])]


def _layer_index(name: str) -> int:
    return int(name.split(".")[2])


def _is_contributed(selected: SelectedParameter, holder: torch.nn.Module) -> bool:
    """Whether this rank contributes the gradient: of tensor-parallel copies, the first alone.

    Args:
        selected: the parameter.
        holder: the module that it is a parameter of.

    Raises:
        ValueError: no rank holds the whole gradient.
    """
    from megatron.core import parallel_state

    if reason := _why_not_measured(selected):
        raise ValueError(
            f"alignment.parameters selects {selected.name}, {reason}; select weights of dense "
            "linear layers that tensor parallelism cuts"
        )
    is_cut = getattr(selected.parameter, "tensor_model_parallel", False)
    # TransformerEngine marks every linear layer's weight as cut, those of which each rank has a
    # copy too; such layers have no parallel mode. (Nor have those of experts, which are cut.)
    if not _is_expert(selected) and getattr(holder, "parallel_mode", "") is None:
        is_cut = False
    return is_cut or parallel_state.get_tensor_model_parallel_rank() == 0


def _why_not_measured(selected: SelectedParameter) -> str | None:
    """Why neither one rank's gradient nor the parts of all make up the whole, where that is so."""
    from megatron.core import parallel_state

    size = parallel_state.get_tensor_model_parallel_world_size()
    expert_size = parallel_state.get_expert_tensor_parallel_world_size()
    if _is_expert(selected) and expert_size != size:
        return (
            f"a weight of experts, which {expert_size} tensor-parallel ranks share where {size} "
            "share the other layers"
        )
    if size == 1:
        return None
    if getattr(selected.parameter, "sequence_parallel", False):
        return "whose gradient is spread over the tensor-parallel ranks under sequence parallelism"
    if re.search(r"[qk]_layernorm", selected.name):
        return "whose gradient is spread over the tensor-parallel ranks with the attention heads"
    return None


def _is_expert(selected: SelectedParameter) -> bool:
    return ".experts." in selected.name


def make_probes(
    model_chunks: Sequence[torch.nn.Module], num_layers: int, config: AlignmentConfig
) -> list[WeightProbe]:
    """The state's weight probes whose layers live on this rank.

    Raises:
        ValueError: a layer has no such weight, or nothing says which part of it this rank updates.
    """
    layers = _layers(model_chunks)
    probes = []
    for index, n in enumerate(probe_layers(config.num_probes, num_layers)):
        if n in layers:
            weight = _weight(layers[n], n, config.kind)
            owned = _owned(weight, model_chunks) if gathers_late(model_chunks) else None
            probes.append(WeightProbe(index, weight, owned))
    return probes


def gathers_late(model_chunks: Sequence[Any]) -> bool:
    """Whether a step ends before all ranks have its new weights (``--overlap-param-gather``).

    Then each has those that its own shard of the distributed optimizer has updated.
    """
    return any(chunk.ddp_config.overlap_param_gather for chunk in model_chunks)


def _owned(weight: torch.nn.Parameter, model_chunks: Sequence[Any]) -> range:
    """Which of a weight's numbers this rank's shard of the distributed optimizer updates.

    Raises:
        ValueError: the weight is not a part of what the host gathers.
    """
    groups = [group for chunk in model_chunks for group in chunk.bucket_groups]
    for group in groups:
        for bucket in group.buckets:
            if weight not in bucket.params:
                continue
            if not _is_part(weight.data, bucket.param_data):
                break
            size = bucket.param_data.numel() // group.intra_distributed_optimizer_instance_size
            start = bucket.param_data.storage_offset() - weight.data.storage_offset()
            start += group.intra_distributed_optimizer_instance_rank * size
            return range(
                min(max(start, 0), weight.numel()), min(max(start + size, 0), weight.numel())
            )
    raise ValueError(
        "--overlap-param-gather is not supported with these weights, which are not themselves a "
        "part of what the distributed optimizer gathers (weights in fewer bits, say); remove the "
        "flag"
    )


def _is_part(weight: torch.Tensor, buffer: torch.Tensor | None) -> bool:
    """Whether a weight's numbers lie in a buffer as they are."""
    # Quantised weights are of other types, which may say that they share its storage.
    if buffer is None or type(weight) is not torch.Tensor or weight.dtype != buffer.dtype:
        return False
    same = weight.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    start = weight.storage_offset() - buffer.storage_offset()
    return same and 0 <= start <= buffer.numel() - weight.numel()
