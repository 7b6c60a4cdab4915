"""What the mixture is to lower, the mixture that descends on it, and a gradient's worth for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_acodm.mixing.observation import Observation

_LOSS_SMOOTHING = 0.9
"""Share of the average that a step's loss leaves."""

_LARGEST_FACTOR = 4.0
"""A domain of a high loss counts for at most this often its first weight a, and for at most
(1 + a) / 2. One that cannot be learned (hashes, broken text) would else become the objective."""

_LOWEST_EXPONENT = -50.0
"""Perplexities below the largest by more than this power of e are as good as 0."""


class Objective:
    """A function F of the domains' losses that a run is to lower.

    A step along g_i changes F by -<g_i, sum_j c_j g_j> with c_j = dF/dl_j. So, with c scaled to sum
    1, training on the mixture c *is* descent on F, and <g_i, sum_j c_j g_j> is what a sample of
    domain i is worth. With a the first mixture, which says how much each domain counts,

    - ``perplexity``: F = sum_j a_j exp(l_j), the mean perplexity, and
      c_j ~ a_j exp(l_j), cut at 4 a_j and
      at (1 + a_j) / 2;
    - ``loss``: F = sum_j a_j l_j, the mean loss; c = a;
    - ``batch``: c are the shares of the batch, and j = i is left out: the paper's reading. No
      mixture descends on it, so the first one takes that place.

    The first two use affinities, <g_i, m_j> with moving averages m_j; there j = i counts, as what a
    domain learns of itself is most of what it learns, and its own noise is not counted.
    Losses are training losses, smoothed; a domain never drawn counts as having their mean.

    Args:
        name: one of ``config.OBJECTIVES``.
        first_mixture: [K] weights that sum to 1; 0 for a domain without data.
    """

    def __init__(self, name: str, first_mixture: np.ndarray) -> None:
        self.name = name
        self._counts = first_mixture
        self._loss = np.full(len(first_mixture), np.nan)
        self.mixture = self._descending()
        """The c [K] float64 at the losses seen so far; sums to 1."""

    @property
    def needs_affinity(self) -> bool:
        """Whether observations must carry affinities."""
        return self.name != "batch"

    def observe(self, loss: np.ndarray) -> None:
        """Take in a step's losses [K]; nan where a domain was not drawn."""
        smoothed = _LOSS_SMOOTHING * self._loss + (1.0 - _LOSS_SMOOTHING) * loss
        latest = np.where(np.isnan(loss), self._loss, loss)
        self._loss = np.where(np.isnan(smoothed), latest, smoothed)
        self.mixture = self._descending()

    def _descending(self) -> np.ndarray:
        known = np.isfinite(self._loss) & (self._counts > 0.0)
        if self.name != "perplexity" or not known.any():
            return self._counts
        filled = np.where(np.isfinite(self._loss), self._loss, self._loss[known].mean())
        exponents = np.clip(filled - filled[known].max(), _LOWEST_EXPONENT, 0.0)
        worth = self._counts * np.exp(exponents)
        limit = np.minimum(_LARGEST_FACTOR * self._counts, 0.5 * (1.0 + self._counts))
        limit[self._counts == 0.0] = 0.0
        mixture = worth / worth.sum()
        while (mixture > limit).any():  # what is cut goes to the others, which may be cut next
            cut = mixture >= limit
            rest = 1.0 - limit[cut].sum()
            mixture = np.where(cut, limit, rest * worth / worth[~cut].sum())
        return mixture

    def alignment(self, observation: Observation) -> np.ndarray:
        """The w [K] float64 of a step whose losses were observed; nan for a domain not drawn."""
        if not self.needs_affinity:
            assert observation.alignment is not None  # the controller sees to it
            return observation.alignment
        assert observation.affinity is not None
        return observation.affinity @ self.mixture

    def state_dict(self) -> dict[str, Any]:
        """The smoothed losses."""
        return {"loss": torch.from_numpy(self._loss.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._loss = state["loss"].numpy().copy()
        self.mixture = self._descending()
