"""A fixed random map of vectors to fewer numbers, for the two sides of a layer's gradient."""

from __future__ import annotations

import torch
from torch import Tensor


class Folding:
    """Cuts a vector into blocks of ``width`` numbers and adds these up, rotated and under signs.

    As in ``ops.add_sketch_``, each block has a random shift and random signs: two numbers of
    different blocks meet with probability ``1 / width``, two of one block never do.
    Products of folded vectors are those of the vectors on average over seeds, within about
    ``1 / sqrt(width)`` of the norms. A vector of at most ``width`` numbers stays as it is.

    Args:
        size: numbers of a vector.
        width: numbers that it is folded to.
        seed: which map.
        device: where vectors live.
    """

    def __init__(self, size: int, width: int, seed: int, device: torch.device | str) -> None:
        self.size = size
        self.width = min(size, width)
        self._pieces: list[tuple[int, int, Tensor]] = []  # where from, where to, signs
        if size <= width:
            return
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, size, width):
            length = min(width, size - start)
            shift = int(torch.randint(0, width, (1,), generator=generator))
            signs = 2.0 * torch.randint(0, 2, (length,), generator=generator) - 1.0
            head = min(length, width - shift)  # before the rotation wraps round
            self._pieces.append((start, shift, signs[:head].to(device)))
            if head < length:
                self._pieces.append((start + head, 0, signs[head:].to(device)))

    def __call__(self, vectors: Tensor) -> Tensor:
        """Fold ``vectors`` [..., size] of any float dtype to [..., width] float32."""
        if self.size == self.width:
            return vectors.float()
        folded = vectors.new_zeros((*vectors.shape[:-1], self.width), dtype=torch.float32)
        for start, bucket, signs in self._pieces:
            length = len(signs)
            folded.narrow(-1, bucket, length).addcmul_(vectors.narrow(-1, start, length), signs)
        return folded
