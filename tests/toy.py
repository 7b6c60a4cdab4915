"""Training runs in a few lines whose best mixture is known."""

from __future__ import annotations

import numpy as np

from megatron_acodm.mixing import MixingController, Observation
from megatron_acodm.mixing.simplex import Bounds

MICRO_BATCHES = 16


class ToyEnvironment:
    """K domains whose mean gradients have the Gram matrix H; a batch is 16 micro-batches.

    The alignment of domain i is what a real step measures: <g_i, sum_{j != i} a_j g_j> for the
    realised shares a, with noise that falls with the number of micro-batches; it shrinks as
    training goes on. A domain without a micro-batch is not measured.
    """

    noise = 0.3
    """Of an alignment, and of an affinity, measured on one micro-batch."""

    def __init__(self, gram: np.ndarray, seed: int, steps: int) -> None:
        self.interaction = gram - np.diag(np.diag(gram))
        self.gram = gram
        self.num_domains = len(gram)
        self.steps = steps
        self._rng, self._affinity_rng = (np.random.default_rng(x) for x in (seed, [seed, 1]))
        self._carry = np.zeros(len(gram))

    def value(self, weights: np.ndarray) -> float:
        """The interaction energy that the agent is to maximise."""
        return float(weights @ self.interaction @ weights)

    def alignment(self, share: np.ndarray) -> np.ndarray:
        """w [K] of a batch with realised ``share`` [K], without noise or scale."""
        return self.interaction @ share

    def step(self, iteration: int, weights: np.ndarray) -> Observation:
        """What step ``iteration`` shows when its batch was drawn with ``weights``."""
        due = weights * MICRO_BATCHES + self._carry
        count = np.maximum(np.floor(due), 0).astype(int)
        for domain in np.argsort(count - due)[: MICRO_BATCHES - count.sum()]:
            count[domain] += 1
        self._carry = due - count
        noise = self._rng.normal(size=(2, self.num_domains)) / np.sqrt(np.maximum(count, 1))
        scale = 1 + 10 * np.exp(-iteration / 20)
        alignment = scale * (self.alignment(count / MICRO_BATCHES) + self.noise * noise[0])
        loss = 2 + 6 * np.exp(-iteration / 100) + 0.1 * noise[1]
        shape = (self.num_domains, self.num_domains)
        spread = self.noise / np.sqrt(np.maximum(count, 1))[:, None]
        affinity = scale * (self.gram + spread * self._affinity_rng.normal(size=shape))
        unseen = np.where(count > 0, 0.0, np.nan)
        return Observation(
            iteration=iteration,
            progress=iteration / self.steps,
            weights=weights,
            samples=4 * count,
            available=np.ones(self.num_domains, dtype=bool),
            loss=loss + unseen,
            alignment=alignment + unseen,
            grad_sq_norm=scale * np.diag(self.gram) + unseen,
            affinity=affinity + unseen[:, None],
            weight_norm=np.full(4, 0.02 + 1e-5 * iteration),
            weight_delta_norm=np.full(4, 1e-4 * scale),
        )


class SharedPeak(ToyEnvironment):
    """All of three domains align alike, best at one mixture: how they differ is pure noise."""

    noise = 0.05
    peak = np.array([0.6, 0.3, 0.1])

    def __init__(self, seed: int, steps: int) -> None:
        super().__init__(np.eye(3), seed, steps)

    def alignment(self, share: np.ndarray) -> np.ndarray:
        """The same for every domain."""
        return np.full(3, 1 - 4 * ((share - self.peak) ** 2).sum())


def block_gram(num_domains: int, helpful: int) -> np.ndarray:
    """The first ``helpful`` domains pull together, every other pair slightly apart."""
    gram = np.full((num_domains, num_domains), -0.1)
    gram[:helpful, :helpful] = 1.0
    np.fill_diagonal(gram, 1.5)
    return gram


def best_mixture(environment: ToyEnvironment, bounds: Bounds) -> np.ndarray:
    """The mixture of highest value within the bounds, by projected ascent from many starts."""
    rng = np.random.default_rng(0)
    best = bounds.project(np.full(environment.num_domains, 1.0))
    for _ in range(10):
        weights = bounds.project(rng.dirichlet(np.ones(environment.num_domains)))
        for _ in range(500):
            weights = bounds.project(weights + 0.05 * environment.interaction @ weights)
        if environment.value(weights) > environment.value(best):
            best = weights
    return best


def play(
    controller: MixingController, environment: ToyEnvironment, lag: int = 1
) -> list[np.ndarray]:
    """Run all steps with a decision lag; the weights that drew each batch."""
    decided = [controller.weights] * (1 + lag)
    drawn = []
    for iteration in range(1, environment.steps + 1):
        weights = decided.pop(0)
        drawn.append(weights)
        decided.append(controller.decide(environment.step(iteration, weights)))
    return drawn
