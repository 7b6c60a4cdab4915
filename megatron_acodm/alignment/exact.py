"""The exact estimator: a row is the domain's gradient itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_acodm.alignment.estimator import GradientEstimator
from megatron_acodm.ops import DTYPES, accumulate_domain_grad_

_CACHE_LINE = 16  # float32 numbers in 64 bytes


class ExactEstimator(GradientEstimator):
    """Keeps the gradient of each domain over the selected parameters, K×P float32.

    Each parameter starts on a cache line, and rows lie an odd number of cache lines apart, so
    that the kernels load aligned and the rows of a column do not compete for the same places in
    a cache. The numbers in between stay zero.

    The first gradient of a step that a row receives from a parameter overwrites what the last
    step left there; what received none is cleared when the rows are read. Clearing K×P numbers
    and adding to them would cost as much as the products.

    ``add_growth`` keeps a copy of each ``main_grad`` that it is given, made at the first call.

    Args:
        numels: size of each selected parameter that this rank contributes; may be empty.
        num_domains: K.
        num_extra: further float32 numbers per step that travel in the same reduction.
        device: where gradients live.
    """

    def __init__(
        self,
        numels: Sequence[int],
        num_domains: int,
        num_extra: int,
        device: torch.device | str,
    ) -> None:
        starts, lines = [], 0
        for numel in numels:
            starts.append(lines * _CACHE_LINE)
            lines += -(-numel // _CACHE_LINE)
        if lines % 2 == 0 and lines > 0:
            lines += 1
        super().__init__(numels, num_domains, lines * _CACHE_LINE, num_extra, device)
        # [parameter][domain]: where a parameter's gradient of a domain is summed, and whether
        # what is there belongs to this step.
        self._targets = [
            list(self._rows[:, start : start + numel])
            for start, numel in zip(starts, numels, strict=True)
        ]
        self._current = [[True] * num_domains for _ in numels]
        self._seen: list[Tensor | None] = [None] * len(numels)

    def begin_step(self) -> None:
        """Forget the last step, with what was seen of each ``main_grad``."""
        self.extra.zero_()
        for current in self._current:
            current[:] = [False] * self.num_domains
        for seen in self._seen:
            if seen is not None:
                seen.zero_()

    def add_gradient(self, index: int, domain: int, grad: Tensor) -> None:
        """See ``GradientEstimator.add_gradient``."""
        self._check(index, domain, grad)
        target, grad = self._targets[index][domain], grad.detach().reshape(-1)
        if self._current[index][domain]:
            target.add_(grad)
        else:
            target.copy_(grad)
            self._current[index][domain] = True

    def add_growth(self, index: int, domain: int, main_grad: Tensor) -> None:
        """See ``GradientEstimator.add_growth``."""
        self._check(index, domain, main_grad)
        target, seen = self._targets[index][domain], self._seen[index]
        if main_grad.dtype not in DTYPES:
            main_grad = main_grad.float()
        if seen is None:
            seen = self._seen[index] = torch.zeros_like(main_grad)
        if not self._current[index][domain]:
            target.zero_()
            self._current[index][domain] = True
        accumulate_domain_grad_(target, main_grad.detach(), seen)

    def _settle(self) -> None:
        for targets, current in zip(self._targets, self._current, strict=True):
            for domain in range(self.num_domains):
                if not current[domain]:
                    targets[domain].zero_()
                    current[domain] = True
