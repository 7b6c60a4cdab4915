"""Hooks that show an alignment estimator what each micro-batch's backward pass computes."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron_acodm.alignment import (
    CapturedEstimator,
    Estimator,
    GradientEstimator,
    build_estimator,
)
from megatron_acodm.config import AlignmentConfig
from megatron_acodm.megatron.parameters import SelectedParameter, layer_of

OnBackward = Callable[..., None]
"""Called with the position of a parameter in the selection and what its backward pass showed."""


class Capture(ABC):
    """What the backward passes of the selected parameters show, and the estimator it goes to.

    Args:
        names: of the selected parameters that this rank contributes.
        estimator: what measures their gradients.
    """

    def __init__(self, names: Sequence[str], estimator: Estimator) -> None:
        self.names = list(names)
        self.estimator = estimator
        self.sent_bytes = 0
        """Bytes that this rank has sent to tensor-parallel peers while capturing."""

    @abstractmethod
    def register(
        self, is_active: Callable[[], bool], on_backward: OnBackward
    ) -> list[RemovableHandle]:
        """Hook the model: ``on_backward(index, *tensors)`` once a micro-batch and parameter."""

    @abstractmethod
    def add(self, index: int, domains: Sequence[int], *tensors: Tensor) -> None:
        """Give the estimator what a backward pass showed.

        Args:
            index: position of the parameter in the selection.
            domains: of the micro-batch's sequences.
            tensors: what ``on_backward`` was called with.
        """


class GradientCapture(Capture):
    """The gradient of each micro-batch, before the host adds it to ``main_grad``.

    A tensor hook on the parameter receives it, once a micro-batch also under activation recompute,
    and before the hook in which the host starts an overlapped reduction. Where the host fuses the
    accumulation into the backward GEMM, what is read is the growth of ``main_grad``.
    """

    estimator: GradientEstimator

    def __init__(
        self, parameters: Sequence[SelectedParameter], estimator: GradientEstimator
    ) -> None:
        super().__init__([selected.name for selected in parameters], estimator)
        self._parameters = [selected.parameter for selected in parameters]

    def register(
        self, is_active: Callable[[], bool], on_backward: OnBackward
    ) -> list[RemovableHandle]:
        """See ``Capture.register``."""
        del is_active
        return [
            parameter.register_hook(functools.partial(on_backward, index))
            for index, parameter in enumerate(self._parameters)
        ]

    def add(self, index: int, domains: Sequence[int], *tensors: Tensor) -> None:
        """See ``Capture.add``; the micro-batch is of one domain."""
        parameter = self._parameters[index]
        if getattr(parameter, "grad_added_to_main_grad", False):
            self.estimator.add_growth(index, domains[0], parameter.main_grad)
        else:
            self.estimator.add_gradient(index, domains[0], tensors[0])


class SideCapture(Capture):
    """What goes into each selected layer, and the gradient of what comes out.

    A forward hook keeps the layer's input until the gradient of its output arrives: the tensor that
    the layer's own backward pass needs next, unless the host keeps a smaller copy or offloads it
    (8-bit layers, activation offloading), when it costs its memory. A forward pass without
    gradients, as the first one under activation recompute, is not looked at. Under sequence
    parallelism one side is a slice of the sequence: it is folded, and then gathered.
    """

    estimator: CapturedEstimator

    def __init__(
        self,
        parameters: Sequence[SelectedParameter],
        model_chunks: Sequence[torch.nn.Module],
        estimator: CapturedEstimator,
    ) -> None:
        from megatron.core.utils import get_model_config

        super().__init__([selected.name for selected in parameters], estimator)
        self._layers = [layer_of(selected, model_chunks) for selected in parameters]
        self._weights = [selected.parameter for selected in parameters]
        self._is_sequence_cut = get_model_config(model_chunks[0]).sequence_parallel

    def register(
        self, is_active: Callable[[], bool], on_backward: OnBackward
    ) -> list[RemovableHandle]:
        """See ``Capture.register``."""

        def forward(index: int, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            del module
            result = output[0] if isinstance(output, tuple) else output
            if is_active() and result.requires_grad:
                kept = [inputs[0]]  # let go with the hook's call, before the graph is
                result.register_hook(lambda grad: on_backward(index, kept.pop(), grad))

        return [
            layer.register_forward_hook(functools.partial(forward, index))
            for index, layer in enumerate(self._layers)
        ]

    def add(self, index: int, domains: Sequence[int], *tensors: Tensor) -> None:
        """See ``Capture.add``."""
        inputs = self.estimator.fold_input(index, tensors[0])
        output_grad = self.estimator.fold_output_grad(index, tensors[1])
        if self._is_sequence_cut:
            if self._weights[index].partition_dim == 1:  # row-parallel: its output is scattered
                output_grad = self._gather(output_grad, tensors[1].dtype)
            else:
                inputs = self._gather(inputs, tensors[0].dtype)
        self.estimator.add_sides(index, domains, inputs, output_grad)

    def _gather(self, side: Tensor, dtype: torch.dtype) -> Tensor:
        """Whole sequences from this rank's slice ``[tokens / TP, sequences, ·]``."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        side = side.to(dtype)  # half the bytes under bfloat16
        self.sent_bytes += side.nbytes
        return gather_from_sequence_parallel_region(side).float()


def build_capture(
    config: AlignmentConfig,
    model_chunks: Sequence[torch.nn.Module],
    parameters: Sequence[SelectedParameter],
    num_domains: int,
    num_extra: int,
    device: torch.device,
) -> Capture:
    """The capture that an estimator needs.

    Args:
        config: names the estimator.
        model_chunks: the model, wrapped in the host's DDP.
        parameters: the selected ones that this rank contributes; may be empty.
        num_domains: K.
        num_extra: further float32 numbers per step that travel in the estimator's reduction.
        device: where the model lives.

    Raises:
        ValueError: the estimator cannot see the gradient of a selected parameter.
    """
    shapes = [selected.parameter.shape for selected in parameters]
    estimator = build_estimator(config, shapes, num_domains, num_extra, device)
    if isinstance(estimator, CapturedEstimator):
        return SideCapture(parameters, model_chunks, estimator)
    assert isinstance(estimator, GradientEstimator)
    return GradientCapture(parameters, estimator)
