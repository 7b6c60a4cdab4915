"""Estimators that keep less than the gradients: right on average, and as far off as promised."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megatron_acodm.alignment import (
    CapturedEstimator,
    Estimator,
    ExactEstimator,
    SampledEstimator,
    SketchEstimator,
    build_estimator,
)
from megatron_acodm.config import AcodmConfig, AlignmentConfig

K, M = 4, 256
SHAPES = [(24, 64), (10, 96), (7,)]
NUMELS = [math.prod(shape) for shape in SHAPES]
Step = list[tuple[int, list[torch.Tensor]]]


def a_step(seed: int, count: int = 9) -> Step:
    """Domain and gradients of each micro-batch; the domains agree in part, a column is large."""
    generator = torch.Generator().manual_seed(seed)
    common = [torch.randn(shape, generator=generator) for shape in SHAPES]
    common[0][:, 5] *= 10
    return [
        (i % K, [torch.randn(c.shape, generator=generator) + 0.3 * c for c in common])
        for i in range(count)
    ]


def rows_of(step: Step) -> torch.Tensor:
    rows = torch.zeros(K, sum(NUMELS), dtype=torch.float64)
    for domain, grads in step:
        rows[domain] += torch.cat([grad.double().flatten() for grad in grads])
    return rows


def add_all(estimator: Estimator, step: Step) -> Estimator:
    for domain, grads in step:
        for index, grad in enumerate(grads):
            estimator.add_gradient(index, domain, grad)
    return estimator


def grow_all(estimator: Estimator, step: Step) -> Estimator:
    main_grads = [torch.zeros(shape) for shape in SHAPES]
    for domain, grads in step:
        for index, (main_grad, grad) in enumerate(zip(main_grads, grads, strict=True)):
            main_grad += grad
            estimator.add_growth(index, domain, main_grad)
    return estimator


def a_sketch(seed: int = 0, size: int = M) -> SketchEstimator:
    return SketchEstimator(NUMELS, K, 0, "cpu", size, seed)


def a_sample(seed: int = 0) -> SampledEstimator:
    return SampledEstimator(NUMELS, K, 0, "cpu", 0.25, seed)


EITHER = pytest.mark.parametrize("make", [a_sketch, a_sample], ids=["sketch", "coordinates"])
Make = Callable[..., Estimator]


@EITHER
def test_products_are_those_of_float64_on_average_over_seeds(make: Make) -> None:
    step, seeds = a_step(0), 500
    gram = rows_of(step) @ rows_of(step).T
    expected = torch.stack([gram.sum(1) - gram.diagonal(), gram.diagonal()])
    found = torch.stack(
        [torch.stack(add_all(make(seed), step).products()) for seed in range(seeds)]
    )
    error = found.mean(0) - expected
    assert torch.all(error.abs() < 4.5 * found.std(0) / seeds**0.5)


def test_a_sketch_errs_by_no_more_than_its_size_allows() -> None:
    step, rows = a_step(1), rows_of(a_step(1))
    others = rows.sum(0) - rows
    W = (rows * others).sum(1)
    bound = (rows.square().sum(1) * others.square().sum(1) + W**2) / M
    found = torch.stack([add_all(a_sketch(seed), step).products()[0] for seed in range(500)])
    mean_square = (found - W).square().mean(0)
    assert torch.all(mean_square < 1.35 * bound)
    assert torch.all(mean_square > 0.3 * bound)  # the bound says something


def test_four_times_the_size_halves_the_error() -> None:
    step, rows = a_step(2), rows_of(a_step(2))
    W = (rows * (rows.sum(0) - rows)).sum(1)

    def error(size: int) -> float:
        found = [add_all(a_sketch(seed, size), step).products()[0] - W for seed in range(200)]
        return torch.stack(found).square().mean().sqrt().item()

    assert error(256) == pytest.approx(error(64) / 2, rel=0.15)


@EITHER
def test_growth_of_main_grad_gives_what_the_gradients_give(make: Make) -> None:
    by_gradient, by_growth = make(), make()
    for seed in (3, 4):  # the second step starts from main_grad zeroed by the host
        by_gradient.begin_step()
        by_growth.begin_step()
        add_all(by_gradient, a_step(seed))
        grow_all(by_growth, a_step(seed))
        torch.testing.assert_close(by_growth.rows, by_gradient.rows, rtol=0, atol=2e-4)


@EITHER
def test_sums_over_data_parallel_ranks_are_what_one_process_would_keep(make: Make) -> None:
    step = a_step(5)
    ranks = [add_all(make(), step[rank::2]) for rank in range(2)]
    together = ranks[0].packed() + ranks[1].packed()
    torch.testing.assert_close(together, add_all(make(), step).packed(), rtol=0, atol=2e-5)


@EITHER
def test_nothing_of_one_step_is_left_in_the_next(make: Make) -> None:
    estimator, fresh = make(), make()
    bad = a_step(6)
    bad[0][1][0][0, 0] = float("nan")
    grow_all(estimator, bad)
    for add in (add_all, grow_all):
        estimator.begin_step()
        fresh.begin_step()
        assert torch.equal(add(estimator, a_step(7)).rows, add(fresh, a_step(7)).rows)


@EITHER
def test_a_gradient_that_was_not_finite_shows(make: Make) -> None:
    step = a_step(8)
    step[0][1][0].fill_(float("inf"))
    W, sq_norm = add_all(make(), step).products()
    assert not torch.isfinite(W).any()
    assert not torch.isfinite(sq_norm[0])


@EITHER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_any_float_dtype_are_summed_in_float32(make: Make, dtype: torch.dtype) -> None:
    estimator, expected = make(), make()
    grad = torch.randn(SHAPES[0]).to(dtype).requires_grad_()
    estimator.add_gradient(0, 1, 1.0 * grad)
    expected.add_gradient(0, 1, grad.detach().float())
    assert torch.equal(estimator.rows, expected.rows)
    assert estimator.rows.dtype == torch.float32 and not estimator.rows.requires_grad


@pytest.mark.parametrize(
    "make",
    [a_sketch, a_sample, lambda: ExactEstimator(NUMELS, K, 0, "cpu")],
    ids=["sketch", "coordinates", "exact"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_main_grads_of_any_float_dtype_are_read_in_float32(make: Make, dtype: torch.dtype) -> None:
    estimator, expected = make(), make()
    main_grad, added = torch.zeros(SHAPES[0], dtype=dtype), torch.randn(2, *SHAPES[0]).to(dtype)
    for _ in range(2):
        for each in (estimator, expected):
            each.begin_step()
        main_grad.zero_()
        for domain in range(2):
            main_grad += added[domain]
            estimator.add_growth(0, domain, main_grad)
            expected.add_growth(0, domain, main_grad.float())
        assert torch.equal(estimator.rows, expected.rows)
        assert (estimator.rows[:2] != 0.0).any(dim=1).all()


@EITHER
@pytest.mark.parametrize(
    ("index", "domain", "size", "message"),
    [(0, 4, 1536, r"domain 4.*\[0, 4\)"), (0, -1, 1536, "domain -1"), (1, 0, 7, "7 numbers.*960")],
)
def test_a_gradient_that_does_not_belong_is_refused(make, index, domain, size, message) -> None:
    for add in (make().add_gradient, make().add_growth):
        with pytest.raises(ValueError, match=message):
            add(index, domain, torch.zeros(size))


def test_a_sketch_reduces_so_many_numbers_however_large_the_model_is() -> None:
    for numels in ([10], [10**6, 10**6]):
        estimator = SketchEstimator(numels, K, 3, "cpu", M, 0)
        assert estimator.packed_bytes == 4 * (K * M + 3)


def test_a_rank_without_a_selected_parameter_keeps_nothing() -> None:
    config = AlignmentConfig(estimator="sketch")
    estimator = build_estimator(config, [], K, 2, "cpu")
    estimator.begin_step()
    assert estimator.packed().numel() == 2
    assert estimator.products()[0].tolist() == [0.0] * K


def test_alike_gradients_of_two_parameters_are_not_taken_for_alignment() -> None:
    g = torch.randn(4096)
    found = []
    for seed in range(100):
        estimator = SketchEstimator([4096, 4096], 2, 0, "cpu", 1024, seed)
        estimator.add_gradient(0, 0, g)
        estimator.add_gradient(1, 1, g)
        found.append(estimator.products()[0][0] / (g @ g))
    assert abs(torch.stack(found).mean()) < 4 / (100 * 1024) ** 0.5


def test_the_config_chooses_the_estimator_and_its_size() -> None:
    built = build_estimator(
        AlignmentConfig(estimator="sketch", sketch_size=128), [(30, 30)], K, 0, "cpu"
    )
    assert isinstance(built, SketchEstimator)
    assert built.rows.shape == (K, 128)
    config = AlignmentConfig(estimator="exact", coordinates=0.1)
    kept = build_estimator(config, [(30, 30)], K, 0, "cpu")
    assert isinstance(kept, SampledEstimator)
    kept.add_gradient(0, 0, torch.ones(900))
    assert int(kept.rows[0].count_nonzero()) == 90
    assert kept.products()[1][0].item() == pytest.approx(900)
    exact = build_estimator(AlignmentConfig(estimator="exact"), [(900,)], K, 0, "cpu")
    assert type(exact) is ExactEstimator
    config = AlignmentConfig(estimator="captured", sketch_size=192, captured_width=16)
    captured = build_estimator(config, [(30, 30)], K, 0, "cpu")
    assert isinstance(captured, CapturedEstimator)
    assert captured.rows.shape == (K, 192)
    assert captured.fold_input(0, torch.ones(2, 30)).shape == (2, 16)
    assert isinstance(build_estimator(AlignmentConfig(), [(900,)], K, 0, "cpu"), SketchEstimator)


def test_another_seed_is_another_map() -> None:
    step = a_step(9)
    for make in (a_sketch, a_sample):
        assert torch.equal(add_all(make(1), step).rows, add_all(make(1), step).rows)
        assert not torch.equal(add_all(make(1), step).rows, add_all(make(2), step).rows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"estimator": "sketched"}, "'sketched'; the estimators are exact, sketch, captured"),
        ({"sketch_size": 1000}, "sketch_size is 1000; it must be a multiple of 64"),
        ({"sketch_size": 0}, "sketch_size is 0"),
        ({"coordinates": 1.5}, r"coordinates is 1.5; .*\(0, 1\)"),
        ({"coordinates": 0.0}, "coordinates is 0.0"),
        ({"coordinates": 0.5, "estimator": "sketch"}, "for estimator 'exact', not 'sketch'"),
        ({"parameters": []}, "alignment.parameters is empty"),
        ({"parameters": "decoder.*"}, "parameters is 'decoder.*'; .* tuple"),
        ({"parameters": [3]}, "parameters is 3; .* str"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AcodmConfig.from_dict({"alignment": values})
