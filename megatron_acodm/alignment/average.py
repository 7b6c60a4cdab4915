"""Moving averages of the domains' mean gradients: the direction that a step's gradients serve."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_COLUMNS = 1 << 16
"""Columns of the rows that are worked on at a time."""


class AverageGradients:
    """For each domain j the moving average m_j of its mean gradients in the steps so far.

    Products of one step's gradients with each other share the noise of that step, above all a
    domain's product with itself. An average of *earlier* steps has other noise, and far less of it.
    The optimizer has moved along it since, and comes back from what it overshot: <g_i, m_j> is not
    the slope of the moment, but nearer to what of a gain is there to stay. It is far less, and may
    be negative (docs/log.md).

    What is averaged is what an estimator's rows stand for, so a rank holds the part of its own
    parameters, and products add up over the model's shards as the estimator's do.

    Args:
        num_domains: K.
        row_length: of the estimator's rows on this rank; may be 0.
        smoothing: beta in m <- beta m + (1 - beta) g; beta^t for a domain that is drawn again
            after t steps, so that the averages of all domains are of the same time.
        device: where the rows live.
    """

    def __init__(
        self, num_domains: int, row_length: int, smoothing: float, device: torch.device | str
    ) -> None:
        self.smoothing = smoothing
        self.mean = torch.zeros(num_domains, row_length, dtype=torch.float32, device=device)
        """[K, row_length]: the averages; 0 for a domain that was never drawn."""
        self._known = torch.zeros(num_domains, dtype=torch.bool, device=device)
        # What the host has heard of it; it does not wait for the device, and may hear later.
        self._known_to_host = torch.zeros(
            num_domains, dtype=torch.bool, pin_memory=self._known.is_cuda
        )
        self._elapsed = np.full(num_domains, -1, dtype=np.int64)  # steps since drawn; -1: never

    def compare(self, rows: Tensor, share: np.ndarray, scale: Tensor) -> Tensor:
        """Multiply a step's rows with the averages, then take them in.

        A domain's first gradient is its average for the others already in that step; its product
        with itself counts as 0, as it would hold the noise that averages are free of. A row that
        is not finite leaves its average as it is.

        Args:
            rows: [K, row_length] contributions to the step's gradient.
            share: [K] share of each domain in the step's batch.
            scale: [1] what every gradient was multiplied by, on the rows' device.

        Returns:
            This rank's part of <row_i, m_j>, [K, K] float64.
        """
        drawn = share > 0.0
        first = self._elapsed < 0
        rate = np.where(first, 1.0, 1.0 - self.smoothing ** (1.0 + np.maximum(self._elapsed, 0)))
        rate = np.where(drawn, rate, 0.0)
        gain = np.divide(1.0, share, out=np.zeros_like(rate), where=drawn)
        self._elapsed = np.where(drawn, 0, np.where(first, -1, self._elapsed + 1))
        factors = torch.from_numpy(np.stack([rate, gain])).float()
        if rows.is_cuda:  # a copy that the host does not wait for
            factors = factors.pin_memory().to(rows.device, non_blocking=True)
        usual_rate, gain_on_device = factors
        # Which domains are new is known on the device first: their first row may not be finite. A
        # sum that is not finite tells so of its numbers, at a fraction of the time.
        usable = (gain_on_device > 0.0) & rows.sum(dim=1).isfinite()
        new = usable & ~self._known
        gain_on_device = gain_on_device / scale
        usual_rate = torch.where(new, 1.0, usual_rate)
        may_be_new = bool((drawn & ~self._known_to_host.numpy()).any())
        products = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
        # In parts, so that what is made on the way stays small.
        for start in range(0, rows.shape[1], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            part, mean = rows[:, columns], self.mean[:, columns]
            gradient = torch.where(usable[:, None], part * gain_on_device[:, None], mean)
            if may_be_new:
                mean.copy_(torch.where(new[:, None], gradient, mean))
            products += part.double() @ mean.double().T
            mean.lerp_(gradient, usual_rate[:, None])
        products.diagonal().masked_fill_(new, 0.0)
        self._known |= usable
        self._known_to_host.copy_(self._known, non_blocking=True)
        return products

    def state_dict(self) -> dict[str, Any]:
        """This rank's averages, on the CPU."""
        return {
            "mean": self.mean.detach().to("cpu", copy=True),
            "known": self._known.to("cpu", copy=True),
            "elapsed": torch.from_numpy(self._elapsed.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict`` bit for bit.

        Raises:
            ValueError: if it is of other domains or another part of the model.
        """
        if state["mean"].shape != self.mean.shape:
            raise ValueError(
                f"what was saved does not fit this model: averages of gradients are "
                f"{list(state['mean'].shape)}, this rank's are {list(self.mean.shape)}; give the "
                "settings it was saved with"
            )
        self.mean.copy_(state["mean"])
        self._known.copy_(state["known"])
        self._known_to_host.copy_(state["known"])
        self._elapsed = state["elapsed"].numpy().copy()
