"""What the mixture is to lower, and from that how much a domain's gradient is worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_acodm.mixing.observation import Observation

_LOSS_SMOOTHING = 0.9
"""Share of the average that a step's loss leaves."""


class Objective:
    """Turns a step's measurements into the alignment w [K] that domains are rewarded for.

    A step along g_i changes a function F of the domains' losses by -<g_i, sum_j c_j g_j> with
    c_j = dF/dl_j. So, with c scaled to sum 1,

    - ``perplexity``: F is the mean of the domains' perplexities, c_j is in proportion to exp(l_j);
    - ``loss``: F is the mean of their losses, c_j = 1/K;
    - ``batch``: c are the shares of the batch, and j = i is left out: the paper's reading.

    The first two use affinities, <g_i, m_j> with moving averages m_j; there j = i counts, as what a
    domain learns of itself is most of what it learns, and is measured without the bias of noise.
    Losses are training losses, smoothed; a domain never drawn counts as having their mean.

    Args:
        name: one of ``config.OBJECTIVES``.
        num_domains: K.
    """

    def __init__(self, name: str, num_domains: int) -> None:
        self.name = name
        self._loss = np.full(num_domains, np.nan)

    @property
    def needs_affinity(self) -> bool:
        """Whether observations must carry affinities."""
        return self.name != "batch"

    def alignment(self, observation: Observation) -> np.ndarray:
        """The step's w [K] float64; nan where a domain was not drawn."""
        if not self.needs_affinity:
            assert observation.alignment is not None  # the controller sees to it
            return observation.alignment
        assert observation.affinity is not None
        return observation.affinity @ self._importance(observation.loss)

    def _importance(self, loss: np.ndarray) -> np.ndarray:
        """The c [K] after a step with these losses."""
        smoothed = _LOSS_SMOOTHING * self._loss + (1.0 - _LOSS_SMOOTHING) * loss
        latest = np.where(np.isnan(loss), self._loss, loss)
        self._loss = np.where(np.isnan(smoothed), latest, smoothed)
        known = np.isfinite(self._loss)
        if self.name == "loss" or not known.any():
            return np.full(len(loss), 1.0 / len(loss))
        filled = np.where(known, self._loss, self._loss[known].mean())
        perplexity = np.exp(filled - filled.max())
        return perplexity / perplexity.sum()

    def state_dict(self) -> dict[str, Any]:
        """The smoothed losses."""
        return {"loss": torch.from_numpy(self._loss.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._loss = state["loss"].numpy().copy()
