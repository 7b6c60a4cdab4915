"""Moving averages of gradients, and what they say that a step's own gradients cannot."""

from __future__ import annotations

import numpy as np
import torch

from megatron_acodm.alignment import AverageGradients

K, P = 3, 7
SCALE = torch.tensor([8.0])


def _contributions(gradients: np.ndarray, share: np.ndarray) -> torch.Tensor:
    """Rows as an estimator holds them: each mean gradient in proportion to its share, scaled."""
    return torch.from_numpy(gradients * share[:, None]).float() * SCALE


def test_averages_and_products_are_those_of_mean_gradients_in_float64() -> None:
    rng = np.random.default_rng(0)
    averages, expected = AverageGradients(K, P, 0.75, "cpu"), np.zeros((K, P))
    for step in range(6):
        gradients, share = rng.normal(size=(K, P)), rng.dirichlet(np.ones(K))
        products = averages.compare(_contributions(gradients, share), share, SCALE)
        before = gradients if step == 0 else expected
        assert products.dtype == torch.float64
        expected_products = 8.0 * share[:, None] * gradients @ before.T
        if step == 0:  # of its own noise
            np.fill_diagonal(expected_products, 0.0)
        np.testing.assert_allclose(products, expected_products, rtol=1e-5, atol=1e-5)
        expected = 0.75 * before + 0.25 * gradients
        np.testing.assert_allclose(averages.mean, expected, rtol=1e-5, atol=1e-6)


def test_products_cover_more_columns_than_are_taken_at_a_time() -> None:
    rows = torch.randn(K, (1 << 16) + 5)
    averages = AverageGradients(K, rows.shape[1], 0.9, "cpu")
    products = averages.compare(rows, np.full(K, 0.5), torch.ones(1))
    expected = (2.0 * rows.double() @ rows.double().T).fill_diagonal_(0.0)
    torch.testing.assert_close(products, expected, rtol=1e-5, atol=0.1)


def test_a_domain_that_was_not_drawn_forgets_as_fast_as_the_others() -> None:
    averages, ones = AverageGradients(2, P, 0.5, "cpu"), np.ones((2, P))
    both, first = np.array([0.5, 0.5]), np.array([1.0, 0.0])
    averages.compare(_contributions(ones, both), both, SCALE)
    for _ in range(2):
        averages.compare(_contributions(3 * ones, first), first, SCALE)
    assert averages.mean[1].tolist() == [1.0] * P
    averages.compare(_contributions(3 * ones, both), both, SCALE)
    # Three steps after its last gradient, an eighth of it is left; the other took in three.
    assert averages.mean.tolist() == [[3.0 - 2.0 / 8.0] * P] * 2


def test_a_domain_that_was_never_drawn_counts_for_nothing() -> None:
    averages, share = AverageGradients(2, P, 0.9, "cpu"), np.array([1.0, 0.0])
    products = averages.compare(_contributions(np.ones((2, P)), share), share, SCALE)
    assert (products[:, 1] == 0).all()
    late = np.array([0.5, 0.5])
    averages.compare(_contributions(np.ones((2, P)), late), late, SCALE)
    assert averages.mean[1].tolist() == [1.0] * P  # its first gradient is its average


def test_a_gradient_that_is_not_finite_leaves_its_average_alone() -> None:
    averages, share = AverageGradients(K, P, 0.5, "cpu"), np.full(K, 1 / K)
    averages.compare(_contributions(np.ones((K, P)), share), share, SCALE)
    bad = _contributions(3 * np.ones((K, P)), share)
    bad[0, 2], bad[1, 0] = float("nan"), float("inf")
    averages.compare(bad, share, SCALE)
    np.testing.assert_allclose(averages.mean[:, 0], [1.0, 1.0, 2.0], rtol=1e-6)


def test_a_first_gradient_that_is_not_finite_is_no_first_gradient() -> None:
    averages, share = AverageGradients(K, P, 0.9, "cpu"), np.full(K, 1 / K)
    rows = _contributions(np.ones((K, P)), share)
    averages.compare(torch.full_like(rows, float("inf")), share, SCALE)
    assert (averages.mean == 0).all()
    expected = np.full((K, K), P * 8.0 / K)
    products = averages.compare(rows, share, SCALE)  # the first one
    np.testing.assert_allclose(products, expected * ~np.eye(K, dtype=bool), rtol=1e-6)
    products = averages.compare(rows, share, SCALE)
    np.testing.assert_allclose(products, expected, rtol=1e-6)


def test_the_product_with_itself_is_free_of_the_bias_of_noise() -> None:
    rng = np.random.default_rng(1)
    truth, share = rng.normal(size=(K, P)), np.full(K, 1 / K)
    averages, own, within = AverageGradients(K, P, 0.9, "cpu"), [], []
    for _ in range(4000):
        rows = _contributions(truth + rng.normal(size=(K, P)), share)
        own.append(averages.compare(rows, share, SCALE).diagonal().numpy() * K / 8.0)
        within.append((rows.double() ** 2).sum(1).numpy() * (K / 8.0) ** 2)
    sq_norm = (truth**2).sum(1)
    np.testing.assert_allclose(np.mean(own[100:], axis=0), sq_norm, atol=0.4)
    np.testing.assert_allclose(np.mean(within, axis=0), sq_norm + P, atol=0.4)


def test_it_continues_from_its_state_bit_for_bit() -> None:
    rng, share = np.random.default_rng(2), np.array([0.6, 0.4, 0.0])
    left, right = (AverageGradients(K, P, 0.9, "cpu") for _ in range(2))
    left.compare(_contributions(rng.normal(size=(K, P)), share), share, SCALE)
    right.load_state_dict(left.state_dict())
    for share in (np.array([0.2, 0.3, 0.5]), np.array([0.0, 0.5, 0.5])):
        rows = _contributions(rng.normal(size=(K, P)), share)
        products = [averages.compare(rows, share, SCALE) for averages in (left, right)]
        assert torch.equal(*products)
    assert torch.equal(left.mean, right.mean)
