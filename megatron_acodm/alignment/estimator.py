"""The interface of an alignment estimator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_acodm.ops import MAX_DOMAINS, domain_alignment, gram


class Estimator(ABC):
    """Collects what each domain's gradient adds up to in a step, and multiplies it out.

    The order of a step, and what is summed over which ranks:

    1. ``begin_step()``;
    2. each micro-batch is added, in the way of the subclass;
    3. the caller sums ``packed()`` over DP×CP, in place: a product of sums is not the sum of
       products, so the rows must be whole before
    4. ``products()``, whose results the caller sums over TP×PP: a rank's products are over the
       parameters (or slices of them) that it holds, and those add up. A parameter that several
       ranks hold must be given to one of them only.

    Each subclass decides what a row is: any linear function of the gradient.

    Args:
        num_domains: K, 1 to 256.
        row_length: numbers that stand for a domain's gradient on this rank; may be 0.
        num_extra: further numbers per step that travel in the same reduction.
        device: where the numbers live.

    Raises:
        ValueError: ``num_domains`` is out of range, or a count is negative.
    """

    def __init__(
        self, num_domains: int, row_length: int, num_extra: int, device: torch.device | str
    ) -> None:
        if num_domains < 1 or (row_length > 0 and num_domains > MAX_DOMAINS):
            raise ValueError(
                f"there are {num_domains} domains; alignment is measured between 1 to {MAX_DOMAINS}"
            )
        if min(row_length, num_extra) < 0:
            raise ValueError(
                f"row_length is {row_length} and num_extra {num_extra}; neither may be negative"
            )
        self.num_domains = num_domains
        size = num_domains * row_length
        self._packed = torch.zeros(size + num_extra, dtype=torch.float32, device=device)
        self._rows = self._packed[:size].view(num_domains, row_length)
        self.extra = self._packed[size:]
        """[num_extra] float32: the caller's own statistics of the step."""

    @abstractmethod
    def begin_step(self) -> None:
        """Forget the last step: rows and extra numbers are zero again."""

    @abstractmethod
    def _settle(self) -> None:
        """Make what ``_rows`` holds readable, whatever a subclass has put off until now."""

    @property
    def rows(self) -> Tensor:
        """[K, row_length] float32: what each domain's gradient amounts to so far."""
        self._settle()
        return self._rows

    def packed(self) -> Tensor:
        """Rows and extra numbers as one flat float32 tensor, to be summed over DP×CP in place."""
        self._settle()
        return self._packed

    @property
    def packed_bytes(self) -> int:
        """Bytes that a rank puts into the reduction over DP×CP, per step."""
        return self._packed.nbytes

    def products(self) -> tuple[Tensor, Tensor]:
        """This rank's part of the alignment, from the reduced rows.

        Returns:
            W: [K] float64, the product of each row with the sum of the others.
            sq_norm: [K] float64, the squared norm of each row.
        """
        if self.rows.numel() == 0:
            W = self.rows.new_zeros(self.num_domains, dtype=torch.float64)
            return W, W.clone()
        return domain_alignment(self.rows)

    def gram(self) -> Tensor:
        """This rank's part of all products of rows, [K, K] float64, from the reduced rows."""
        rows = self.rows
        if rows.numel() == 0:
            return rows.new_zeros(self.num_domains, self.num_domains, dtype=torch.float64)
        return gram(rows)

    def _check_domain(self, domain: int) -> None:
        if not 0 <= domain < self.num_domains:
            raise ValueError(f"domain {domain} of a micro-batch is not in [0, {self.num_domains})")


class GradientEstimator(Estimator):
    """Is given the gradient of each micro-batch, which must be of one domain.

    Args:
        numels: size of each selected parameter that this rank contributes; may be empty.
        num_domains: K, 1 to 256.
        row_length: numbers that stand for a domain's gradient on this rank; may be 0.
        num_extra: further numbers per step that travel in the same reduction.
        device: where the numbers live.

    Raises:
        ValueError: ``num_domains`` is out of range, or a size or count is negative.
    """

    def __init__(
        self,
        numels: Sequence[int],
        num_domains: int,
        row_length: int,
        num_extra: int,
        device: torch.device | str,
    ) -> None:
        if min(numels, default=0) < 0:
            raise ValueError(f"the selected parameters have {list(numels)} numbers")
        super().__init__(num_domains, row_length, num_extra, device)
        self._numels = list(numels)

    @abstractmethod
    def add_gradient(self, index: int, domain: int, grad: Tensor) -> None:
        """Add a micro-batch's gradient of the ``index``-th selected parameter to a domain.

        Args:
            index: position of the parameter in the selection.
            domain: domain of the micro-batch.
            grad: the parameter's gradient, of any shape and float dtype.

        Raises:
            ValueError: the domain does not exist, or the size is not the parameter's.
        """

    @abstractmethod
    def add_growth(self, index: int, domain: int, main_grad: Tensor) -> None:
        """Add what a parameter's ``main_grad`` has grown by since the last call.

        For hosts that fuse the accumulation into the backward GEMM, so that no tensor holds the
        micro-batch's gradient alone. ``main_grad`` must have been zero at ``begin_step``.

        Args:
            index: position of the parameter in the selection.
            domain: domain of the micro-batch that has just been added.
            main_grad: of any float dtype, contiguous: the accumulated gradient.

        Raises:
            ValueError: the domain does not exist, or the size is not the parameter's.
        """

    def _check(self, index: int, domain: int, grad: Tensor) -> None:
        self._check_domain(domain)
        self._check_size(index, grad, self._numels)

    @staticmethod
    def _check_size(index: int, grad: Tensor, numels: Sequence[int]) -> None:
        if grad.numel() != numels[index]:
            raise ValueError(
                f"the gradient of selected parameter {index} holds {grad.numel()} numbers, the "
                f"parameter {numels[index]}"
            )
