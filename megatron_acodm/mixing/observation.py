"""What a policy is told after each optimizer step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Observation:
    """The measurements of one step over K domains and D probed layers (Policy.needs_probes)."""

    iteration: int
    """The step just measured, counted from 1."""

    progress: float
    """iteration / train_iters, in [0, 1]."""

    weights: np.ndarray
    """[K] float64: the weights that drew this step's batch (with decision lag, older ones)."""

    samples: np.ndarray
    """[K] int64: sequences of each domain in this step's batch."""

    available: np.ndarray
    """[K] bool: the domains with data left for the next undecided step."""

    loss: np.ndarray
    """[K] float64: mean token loss; nan where the domain was not drawn."""

    alignment: np.ndarray | None
    """[K] float64: w_i = <g_i, sum over j != i of a_j g_j> with g the mean gradients and a the
    realised shares of the batch; nan where the domain was not drawn."""

    grad_sq_norm: np.ndarray | None
    """[K] float64: ||g_i||^2; nan where the domain was not drawn."""

    affinity: np.ndarray | None
    """[K, K] float64: <g_i, m_j> with m_j the moving average of g_j over the steps before; rows of
    domains that were not drawn are nan, columns of those that never were are 0. In the
    step that first draws a domain its gradient counts as its average, and <g_i, m_i> is 0."""

    weight_norm: np.ndarray | None
    """[D] float64: root mean square of each probed layer's weights."""

    weight_delta_norm: np.ndarray | None
    """[D] float64: root mean square of their change since the step before."""

    def in_order(self, order: np.ndarray) -> Observation:
        """The same with domain ``order[i]`` in place i; ``order`` is a permutation [K]."""

        def taken(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[order]

        return replace(
            self,
            weights=self.weights[order],
            samples=self.samples[order],
            available=self.available[order],
            loss=self.loss[order],
            alignment=taken(self.alignment),
            grad_sq_norm=taken(self.grad_sq_norm),
            affinity=None if self.affinity is None else self.affinity[np.ix_(order, order)],
        )
