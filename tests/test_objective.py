"""What a step's measurements say about the objective, against finite differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy import ToyEnvironment, block_gram

from megatron_acodm.mixing.objective import Objective
from megatron_acodm.mixing.observation import Observation

GRAM = np.array([[2.0, 0.5, -0.3], [0.5, 1.0, 0.2], [-0.3, 0.2, 3.0]])
LOSS = np.array([2.0, 3.5, 1.0])


def _seen(loss: np.ndarray = LOSS) -> Observation:
    toy = ToyEnvironment(block_gram(3, 2), seed=0, steps=10)
    seen = toy.step(1, np.full(3, 1 / 3))
    return replace(seen, loss=loss, affinity=GRAM)


@pytest.mark.parametrize(
    ("name", "function"),
    [("perplexity", lambda loss: np.exp(loss).mean()), ("loss", lambda loss: loss.mean())],
)
def test_it_is_the_slope_of_the_objective_along_each_domains_gradient(name, function) -> None:  # type: ignore[no-untyped-def]
    measured = Objective(name, 3).alignment(_seen())
    # A step of -h g_i changes the loss of domain j by -h <g_i, g_j>.
    h = 1e-5
    slopes = [(function(LOSS) - function(LOSS - h * GRAM[i])) / h for i in range(3)]
    scale = np.exp(LOSS).mean() if name == "perplexity" else 1.0  # c sums to 1
    np.testing.assert_allclose(measured, np.array(slopes) / scale, rtol=1e-4)


def test_the_papers_objective_is_the_alignment_as_measured() -> None:
    seen = _seen()
    assert Objective("batch", 3).alignment(seen) is seen.alignment
    assert not Objective("batch", 3).needs_affinity


def test_losses_are_smoothed_and_a_domain_not_drawn_keeps_its_own() -> None:
    objective = Objective("perplexity", 3)
    objective.alignment(_seen())
    measured = objective.alignment(_seen(np.array([3.0, np.nan, 1.0])))
    importance = np.exp([0.9 * 2.0 + 0.1 * 3.0, 3.5, 1.0])
    np.testing.assert_allclose(measured, GRAM @ importance / importance.sum())


def test_a_domain_never_drawn_counts_as_having_the_mean_loss_of_the_others() -> None:
    measured = Objective("perplexity", 3).alignment(_seen(np.array([2.0, np.nan, 1.0])))
    importance = np.exp([2.0, 1.5, 1.0])
    np.testing.assert_allclose(measured, GRAM @ importance / importance.sum())


def test_it_continues_from_its_state() -> None:
    left, right = Objective("perplexity", 3), Objective("perplexity", 3)
    left.alignment(_seen())
    right.load_state_dict(left.state_dict())
    later = _seen(np.array([1.0, 2.0, 3.0]))
    assert left.alignment(later).tolist() == right.alignment(later).tolist()
