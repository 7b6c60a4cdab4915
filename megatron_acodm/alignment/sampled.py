"""The exact estimator on a random subset of coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_acodm.alignment.exact import ExactEstimator


class SampledEstimator(ExactEstimator):
    """Keeps a fixed random subset of each selected parameter's gradient, K times.

    Kept numbers are scaled so that products are those of the whole gradients on average over
    seeds. A few large coordinates make them err: the sketch, which mixes all coordinates, does not
    depend on which are large. The subset is the same on every data-parallel rank and in every step.

    Args:
        numels: size of each selected parameter that this rank contributes; may be empty.
        num_domains: K.
        num_extra: further float32 numbers per step that travel in the same reduction.
        device: where gradients live.
        fraction: share of each parameter's coordinates that is kept, in (0, 1); one at least.
        seed: which subset.
    """

    def __init__(
        self,
        numels: Sequence[int],
        num_domains: int,
        num_extra: int,
        device: torch.device | str,
        fraction: float,
        seed: int,
    ) -> None:
        counts = [min(numel, max(1, round(fraction * numel))) for numel in numels]
        super().__init__(counts, num_domains, num_extra, device)
        self._full_numels = list(numels)
        generator = torch.Generator().manual_seed(seed)
        self._kept = [
            torch.randperm(numel, generator=generator)[:count].sort().values.to(device)
            for numel, count in zip(numels, counts, strict=True)
        ]
        self._scales = [
            (numel / count) ** 0.5 if count else 1.0
            for numel, count in zip(numels, counts, strict=True)
        ]

    def add_gradient(self, index: int, domain: int, grad: Tensor) -> None:
        """See ``GradientEstimator.add_gradient``."""
        super().add_gradient(index, domain, self._sample(index, grad))

    def add_growth(self, index: int, domain: int, main_grad: Tensor) -> None:
        """See ``GradientEstimator.add_growth``."""
        super().add_growth(index, domain, self._sample(index, main_grad))

    def _sample(self, index: int, grad: Tensor) -> Tensor:
        self._check_size(index, grad, self._full_numels)
        return grad.detach().reshape(-1)[self._kept[index]].float() * self._scales[index]
