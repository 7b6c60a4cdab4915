"""The captured estimator: gradients from the two sides of a layer, for mixed micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_acodm.alignment.estimator import Estimator
from megatron_acodm.alignment.folding import Folding
from megatron_acodm.ops import add_sketch_


class CapturedEstimator(Estimator):
    """Tells the sequences of a micro-batch apart, which no gradient of a whole one can.

    The gradient of a linear layer's weight is ``dY^T X``, summed over tokens: X is what went into
    the layer, dY the gradient of what came out. Over one sequence's tokens it is that sequence's
    gradient. Both sides are folded to at most ``width`` numbers a token before the product, which
    would otherwise cost as much as the layer's own; the product is sketched to m numbers
    (``ops.add_sketch_``), and the sketch added to the row of the sequence's domain.

    A product errs by about ``sqrt(2 / width + 1 / m)`` of the norms where gradients are nearly of
    rank one, and less otherwise: docs/alignment.md has what that means on real gradients.

    Args:
        shapes: [outputs, inputs] of each selected weight (shard) that this rank contributes.
        num_domains: K.
        num_extra: further float32 numbers per step that travel in the same reduction.
        device: where activations live.
        size: m, a multiple of 64.
        width: numbers a token of either side.
        seed: which maps.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        num_domains: int,
        num_extra: int,
        device: torch.device | str,
        size: int,
        width: int,
        seed: int,
    ) -> None:
        super().__init__(num_domains, size if len(shapes) > 0 else 0, num_extra, device)
        self._keys = [(seed << 24) + index for index in range(len(shapes))]
        self._fold_outputs = [
            Folding(outputs, width, 2 * key, device)
            for key, (outputs, _) in zip(self._keys, shapes, strict=True)
        ]
        self._fold_inputs = [
            Folding(inputs, width, 2 * key + 1, device)
            for key, (_, inputs) in zip(self._keys, shapes, strict=True)
        ]

    def begin_step(self) -> None:
        """Forget the last step."""
        self._packed.zero_()

    def fold_input(self, index: int, inputs: Tensor) -> Tensor:
        """Fold X [..., inputs] of the ``index``-th layer to [..., at most width] float32."""
        return self._fold_inputs[index](inputs.detach())

    def fold_output_grad(self, index: int, output_grad: Tensor) -> Tensor:
        """Fold dY [..., outputs] of the ``index``-th layer to [..., at most width] float32."""
        return self._fold_outputs[index](output_grad.detach())

    def add_sides(
        self, index: int, domains: Sequence[int], inputs: Tensor, output_grad: Tensor
    ) -> None:
        """Add a micro-batch's gradient of the ``index``-th layer, each sequence to its domain.

        Args:
            index: position of the layer in the selection.
            domains: domain of each sequence.
            inputs: [tokens, sequences, ·] float32, folded X.
            output_grad: [tokens, sequences, ·] float32, folded dY.

        Raises:
            ValueError: a domain does not exist, or the sides have other numbers of sequences.
        """
        if not inputs.shape[:2] == output_grad.shape[:2] == (len(inputs), len(domains)):
            raise ValueError(
                f"a micro-batch of {len(domains)} sequences went into a layer as "
                f"{list(inputs.shape[:2])} and its gradient came back as "
                f"{list(output_grad.shape[:2])}; both must be [tokens, sequences] (packed "
                "sequences are not supported)"
            )
        for domain in domains:
            self._check_domain(domain)
        if len(set(domains)) == 1:
            gradient = output_grad.flatten(0, 1).T @ inputs.flatten(0, 1)
            add_sketch_(self._rows[domains[0]], gradient, self._keys[index])
            return
        gradients = output_grad.permute(1, 2, 0) @ inputs.transpose(0, 1)
        for domain, gradient in zip(domains, gradients, strict=True):
            add_sketch_(self._rows[domain], gradient, self._keys[index])

    def _settle(self) -> None:
        """Rows are always current."""
