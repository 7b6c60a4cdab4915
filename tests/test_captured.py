"""The captured estimator: sequences of one micro-batch told apart, right on average, in bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Train

from megatron_acodm.alignment import CapturedEstimator
from megatron_acodm.alignment.folding import Folding
from megatron_acodm.config import AlignmentConfig

K = 3
SHAPES = [(24, 40), (50, 16)]
TOKENS = 8
# Three micro-batches of four sequences; the last is of one domain.
DOMAINS = [[0, 1, 1, 2], [2, 0, 1, 0], [1, 1, 1, 1]]
Sides = list[list[tuple[torch.Tensor, torch.Tensor]]]


def sides(seed: int, dtype: torch.dtype = torch.float32) -> Sides:
    """X and dY of each layer in each micro-batch, with directions that all tokens share."""
    generator = torch.Generator().manual_seed(seed)

    def side(size: int) -> torch.Tensor:
        common = torch.randn(size, generator=generator)
        noise = torch.randn(TOKENS, 4, size, generator=generator)
        return (common + noise).to(dtype)

    return [[(side(inputs), side(outputs)) for outputs, inputs in SHAPES] for _ in DOMAINS]


def captured(width: int, size: int = 1 << 16, seed: int = 0) -> CapturedEstimator:
    return CapturedEstimator(SHAPES, K, 0, "cpu", size, width, seed)


def measure(estimator: CapturedEstimator, step: Sides) -> CapturedEstimator:
    estimator.begin_step()
    for domains, layers in zip(DOMAINS, step, strict=True):
        for index, (inputs, output_grad) in enumerate(layers):
            estimator.add_sides(
                index,
                domains,
                estimator.fold_input(index, inputs),
                estimator.fold_output_grad(index, output_grad),
            )
    return estimator


def reference_gram(step: Sides) -> torch.Tensor:
    """[K, K] products of the domains' gradients, from single tokens in float64."""
    gram = torch.zeros(K, K, dtype=torch.float64)
    for index, shape in enumerate(SHAPES):
        rows = torch.zeros(K, *shape, dtype=torch.float64)
        for domains, layers in zip(DOMAINS, step, strict=True):
            inputs, output_grad = (side.double() for side in layers[index])
            for sequence, domain in enumerate(domains):
                for token in range(TOKENS):
                    rows[domain] += torch.outer(
                        output_grad[token, sequence], inputs[token, sequence]
                    )
        gram += rows.flatten(1) @ rows.flatten(1).T
    return gram


def errors(width: int, size: int, seeds: int) -> np.ndarray:
    """[seeds, K, K] errors of the Gram matrix, relative to the products of the norms."""
    step = sides(1)
    expected = reference_gram(step)
    norms = expected.diagonal().sqrt()
    found = []
    for seed in range(seeds):
        rows = measure(captured(width, size, seed), step).rows.double()
        found.append(((rows @ rows.T - expected) / torch.outer(norms, norms)).numpy())
    return np.stack(found)


def test_unfolded_sides_give_the_gradients_of_single_sequences() -> None:
    step = sides(0)
    expected = reference_gram(step)
    W, sq_norm = measure(captured(width=64, size=1 << 22), step).products()
    right = expected.sum(1) - expected.diagonal()
    scale = expected.abs().max().item()
    # A sketch of four million numbers is all that is left of the error.
    torch.testing.assert_close(W, right, rtol=0, atol=0.01 * scale)
    torch.testing.assert_close(sq_norm, expected.diagonal(), rtol=0.01, atol=0)


def test_products_are_right_on_average_and_as_far_off_as_promised() -> None:
    width, size, seeds = 8, 1024, 200
    found = errors(width, size, seeds)
    bound = (2 / width + 1 / size) ** 0.5
    spread = np.sqrt((found**2).mean(0))
    # For equal vectors the bound doubles under the root; the mean of 200 has a 14th of the spread.
    assert spread.max() < 2**0.5 * bound * 1.1
    assert np.abs(found.mean(0)).max() < 4 * spread.max() / seeds**0.5


def test_the_error_falls_with_the_width() -> None:
    spreads = [np.sqrt((errors(width, 4096, 40) ** 2).mean()) for width in (4, 16, 64)]
    assert spreads[0] > 1.4 * spreads[1] > 1.4**2 * spreads[2]


def test_bfloat16_sides_agree_to_their_precision() -> None:
    step = sides(2, torch.bfloat16)
    expected = reference_gram(step)
    rows = measure(captured(width=64, size=1 << 20), step).rows.double()
    scale = expected.abs().max().item()
    torch.testing.assert_close(rows @ rows.T, expected, rtol=0, atol=0.01 * scale)


@pytest.mark.parametrize(("size", "width"), [(5, 5), (5, 8), (6, 5), (40, 8), (43, 8)])
def test_folding_keeps_every_number_once(size: int, width: int) -> None:
    folding = Folding(size, width, 3, "cpu")
    assert folding.width == min(size, width)
    folded = folding(torch.eye(size))
    assert folded.shape == (size, min(size, width))
    assert torch.equal(folded.abs().sum(1), torch.ones(size))
    counts = folded.abs().sum(0)
    assert counts.max() - counts.min() <= 1
    if size > width:
        assert (folded < 0).any() and (folded > 0).any()
    else:
        assert torch.equal(folded, torch.eye(size))


def test_sides_that_do_not_fit_are_refused() -> None:
    estimator = captured(width=64)
    inputs, output_grad = sides(0)[0][0]
    with pytest.raises(ValueError, match=r"3 sequences .* \[8, 4\].*packed"):
        estimator.add_sides(0, [0, 1, 2], inputs, output_grad)
    with pytest.raises(ValueError, match="domain 3 of a micro-batch"):
        estimator.add_sides(0, [0, 1, 2, 3], inputs, output_grad)
    with pytest.raises(ValueError, match="captured_width is 4; it must be at least 8"):
        AlignmentConfig(captured_width=4)


def test_training_mixes_domains_within_micro_batches(train: Train, learning: str) -> None:
    mixed = ("--acodm-config", learning, "--acodm-granule", "sequence")
    run = train(
        *mixed, "--acodm-estimator", "captured", "--train-iters", "4", "--eval-interval", "0"
    )
    assert run.code == 0, run.output
    samples = [d["samples"] for step in run.steps for d in step["domains"].values()]
    assert any(count % 2 for count in samples)  # micro-batches are of two sequences
    for step in run.steps:
        for domain in step["domains"].values():
            assert domain["reward"] is not None and np.isfinite(domain["reward"])
    refused = train(*mixed, "--acodm-estimator", "sketch", "--train-iters", "4")
    assert refused.code != 0
    assert "use alignment.estimator 'captured'" in refused.output
