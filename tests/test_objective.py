"""What a step's measurements say about the objective, against finite differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy import ToyEnvironment, block_gram

from megatron_acodm.mixing.objective import Objective
from megatron_acodm.mixing.observation import Observation

GRAM = np.array([[2.0, 0.5, -0.3], [0.5, 1.0, 0.2], [-0.3, 0.2, 3.0]])
LOSS = np.array([2.0, 2.5, 1.0])
COUNTS = np.array([0.5, 0.2, 0.3])  # how much each domain counts


def _seen(loss: np.ndarray = LOSS) -> Observation:
    toy = ToyEnvironment(block_gram(3, 2), seed=0, steps=10)
    seen = toy.step(1, np.full(3, 1 / 3))
    return replace(seen, loss=loss, affinity=GRAM)


def _measured(objective: Objective, loss: np.ndarray = LOSS) -> np.ndarray:
    objective.observe(loss)
    return objective.alignment(_seen(loss))


@pytest.mark.parametrize(
    ("name", "function"),
    [("perplexity", lambda loss: COUNTS @ np.exp(loss)), ("loss", lambda loss: COUNTS @ loss)],
)
def test_it_is_the_slope_of_the_objective_along_each_domains_gradient(name, function) -> None:  # type: ignore[no-untyped-def]
    measured = _measured(Objective(name, COUNTS))
    # A step of -h g_i changes the loss of domain j by -h <g_i, g_j>.
    h = 1e-5
    slopes = [(function(LOSS) - function(LOSS - h * GRAM[i])) / h for i in range(3)]
    scale = COUNTS @ np.exp(LOSS) if name == "perplexity" else 1.0  # c sums to 1
    np.testing.assert_allclose(measured, np.array(slopes) / scale, rtol=1e-4)


def test_the_papers_objective_is_the_alignment_as_measured() -> None:
    seen = _seen()
    objective = Objective("batch", COUNTS)
    objective.observe(LOSS)
    assert objective.alignment(seen) is seen.alignment
    assert not objective.needs_affinity
    assert objective.mixture.tolist() == COUNTS.tolist()


def test_training_on_its_mixture_is_descent_on_it() -> None:
    objective = Objective("perplexity", COUNTS)
    assert objective.mixture.tolist() == COUNTS.tolist()  # nothing is known yet
    objective.observe(LOSS)
    slope = COUNTS * np.exp(LOSS)  # of the mean perplexity by each loss
    np.testing.assert_allclose(objective.mixture, slope / slope.sum())


def test_losses_are_smoothed_and_a_domain_not_drawn_keeps_its_own() -> None:
    objective = Objective("perplexity", COUNTS)
    objective.observe(LOSS)
    objective.observe(np.array([3.0, np.nan, 1.0]))
    worth = COUNTS * np.exp([0.9 * 2.0 + 0.1 * 3.0, 2.5, 1.0])
    np.testing.assert_allclose(objective.mixture, worth / worth.sum())


def test_a_domain_never_drawn_counts_as_having_the_mean_loss_of_the_others() -> None:
    objective = Objective("perplexity", COUNTS)
    objective.observe(np.array([2.0, np.nan, 1.0]))
    worth = COUNTS * np.exp([2.0, 1.5, 1.0])
    np.testing.assert_allclose(objective.mixture, worth / worth.sum())


def test_a_domain_that_cannot_be_learned_does_not_become_the_objective() -> None:
    counts = np.array([0.1, 0.05, 0.0, 0.35, 0.5])
    objective = Objective("perplexity", counts)
    objective.observe(np.array([11.0, 9.0, np.nan, 2.0, 3.0]))
    mixture = objective.mixture
    assert mixture.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(mixture[:3], 4 * counts[:3])
    assert mixture[4] / mixture[3] == pytest.approx(0.5 / 0.35 * np.e)  # as without the others


def test_nor_does_it_among_few_domains_or_with_a_loss_beyond_all_bounds() -> None:
    for counts in (np.full(2, 0.5), np.full(3, 1 / 3), np.array([0.4, 0.3, 0.3])):
        objective = Objective("perplexity", counts)
        objective.observe(np.array([1e5] + [3.0] * (len(counts) - 1)))
        assert objective.mixture.sum() == pytest.approx(1.0)
        assert objective.mixture[0] == pytest.approx((1 + counts[0]) / 2)


def test_it_continues_from_its_state() -> None:
    left, right = Objective("perplexity", COUNTS), Objective("perplexity", COUNTS)
    left.observe(LOSS)
    right.load_state_dict(left.state_dict())
    later = np.array([1.0, 2.0, 3.0])
    assert _measured(left, later).tolist() == _measured(right, later).tolist()
