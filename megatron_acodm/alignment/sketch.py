"""The sketch estimator: a row is a random projection of the domain's gradient to a few numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_acodm.alignment.estimator import GradientEstimator
from megatron_acodm.ops import DTYPES, add_sketch_


class SketchEstimator(GradientEstimator):
    """Keeps K×m numbers: the sum of the selected parameters' sketches, for each domain.

    Every parameter has a map of its own, so the sum sketches the whole gradient; how is told in
    ``ops.add_sketch_``. The maps are the same on every data-parallel rank and in every step.
    Products of sketches are those of the gradients on average over seeds, within about
    ``1 / sqrt(m)`` of the product of the norms: docs/alignment.md has what that means on real
    gradients. Another layout of tensor or pipeline parallelism draws other errors of that size.

    The sketch is linear: what a ``main_grad`` has grown by is the difference of two sketches of it,
    and of each parameter m numbers are kept for that.

    Args:
        numels: size of each selected parameter that this rank contributes; may be empty.
        num_domains: K.
        num_extra: further float32 numbers per step that travel in the same reduction.
        device: where gradients live.
        size: m, a multiple of 64.
        seed: which maps.
    """

    def __init__(
        self,
        numels: Sequence[int],
        num_domains: int,
        num_extra: int,
        device: torch.device | str,
        size: int,
        seed: int,
    ) -> None:
        super().__init__(numels, num_domains, size if len(numels) > 0 else 0, num_extra, device)
        self._keys = [(seed << 24) + index for index in range(len(numels))]
        self._seen: list[Tensor | None] = [None] * len(numels)
        self._next: Tensor | None = None  # takes the next sketch of a main_grad

    def begin_step(self) -> None:
        """Forget the last step, with the sketches of each ``main_grad``."""
        self._packed.zero_()
        for seen in self._seen:
            if seen is not None:
                seen.zero_()

    def add_gradient(self, index: int, domain: int, grad: Tensor) -> None:
        """See ``GradientEstimator.add_gradient``."""
        self._check(index, domain, grad)
        self._add(self._rows[domain], index, grad)

    def add_growth(self, index: int, domain: int, main_grad: Tensor) -> None:
        """See ``GradientEstimator.add_growth``."""
        self._check(index, domain, main_grad)
        row, seen, now = self._rows[domain], self._seen[index], self._next
        if seen is None:
            seen = torch.zeros_like(row)
        now = torch.zeros_like(row) if now is None else now.zero_()
        self._add(now, index, main_grad)
        row.add_(now).sub_(seen)
        self._seen[index], self._next = now, seen

    def _add(self, row: Tensor, index: int, grad: Tensor) -> None:
        grad = grad.detach()
        if grad.dtype not in DTYPES:
            grad = grad.float()
        add_sketch_(row, grad, self._keys[index])

    def _settle(self) -> None:
        """Rows are always current."""
