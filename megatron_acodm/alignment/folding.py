"""A fixed random map of vectors to fewer numbers, for the two sides of a layer's gradient."""

from __future__ import annotations

import torch
from torch import Tensor


class Folding:
    """Adds a vector's numbers up in ``width`` buckets under random signs.

    A random order deals the numbers to the buckets, as many to each, so that neighbours and other
    regular patterns do not meet. Products of folded vectors are those of the vectors on average
    over seeds, within about ``1 / sqrt(width)`` of the norms. A vector of at most ``width`` numbers
    stays as it is.

    Args:
        size: numbers of a vector.
        width: numbers that it is folded to.
        seed: which map.
        device: where vectors live.
    """

    def __init__(self, size: int, width: int, seed: int, device: torch.device | str) -> None:
        self.size = size
        self.width = min(size, width)
        if size <= width:
            return
        generator = torch.Generator().manual_seed(seed)
        depth = -(-size // width)
        order = torch.zeros(depth * width, dtype=torch.int64)
        order[:size] = torch.randperm(size, generator=generator)
        signs = 2.0 * torch.randint(0, 2, (depth, width), generator=generator) - 1.0
        signs.view(-1)[size:] = 0.0  # the last row may be longer than what is left
        self._order = order.to(device)
        self._signs = signs.to(device)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Fold ``vectors`` [..., size] of any float dtype to [..., width] float32."""
        if self.size == self.width:
            return vectors.float()
        dealt = vectors.index_select(-1, self._order).unflatten(-1, self._signs.shape)
        return dealt.mul_(self._signs.to(vectors.dtype)).sum(-2, dtype=torch.float32)
