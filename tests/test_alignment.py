from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_acodm import config as config_module
from megatron_acodm.alignment import (
    CapturedEstimator,
    ExactEstimator,
    SketchEstimator,
    build_estimator,
    layers_at_depths,
    mean_gradient_scores,
    probe_layers,
)
from megatron_acodm.config import AlignmentConfig

K = 3
SHAPES = [(6, 8), (4, 8), (5,)]  # two weights and a bias, none a whole number of cache lines


def numels(shapes: list[tuple[int, ...]]) -> list[int]:
    return [math.prod(shape) for shape in shapes]


def micro_batches(seed: int, count: int) -> list[tuple[int, list[torch.Tensor]]]:
    """Domain and per-parameter gradients of each micro-batch of a step."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (i % K, [torch.randn(shape, generator=generator) for shape in SHAPES]) for i in range(count)
    ]


def reference(step: list[tuple[int, list[torch.Tensor]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """W and squared norms of a whole step's contributions, in float64 on one process."""
    rows = torch.zeros(K, sum(numels(SHAPES)), dtype=torch.float64)
    for domain, grads in step:
        rows[domain] += torch.cat([grad.double().flatten() for grad in grads])
    gram = rows @ rows.T
    return gram.sum(1) - gram.diagonal(), gram.diagonal()


def add_all(estimator: Any, step: list[tuple[int, list[torch.Tensor]]]) -> None:
    for domain, grads in step:
        for index, grad in enumerate(grads):
            estimator.add_gradient(index, domain, grad)


# ---------------------------------------------------------------- the estimator on one process


def test_exact_agrees_with_float64_on_one_process():
    step = micro_batches(seed=0, count=7)
    estimator = build_estimator(AlignmentConfig(estimator="exact"), SHAPES, K, 0, "cpu")
    estimator.begin_step()
    add_all(estimator, step)
    for measured, expected in zip(estimator.products(), reference(step), strict=True):
        torch.testing.assert_close(measured, expected, rtol=1e-5, atol=1e-4)


def test_growth_of_main_grad_gives_what_the_gradients_give():
    by_gradient = ExactEstimator(numels(SHAPES), K, 0, "cpu")
    by_growth = ExactEstimator(numels(SHAPES), K, 0, "cpu")
    for seed in (1, 2):  # the second step starts from main_grad zeroed by the host
        step = micro_batches(seed, count=8)
        by_gradient.begin_step()
        by_growth.begin_step()
        add_all(by_gradient, step)
        main_grads = [torch.zeros(shape) for shape in SHAPES]
        for domain, grads in step:
            for index, (main_grad, grad) in enumerate(zip(main_grads, grads, strict=True)):
                main_grad += grad
                by_growth.add_growth(index, domain, main_grad)
        torch.testing.assert_close(by_growth.rows, by_gradient.rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_any_float_dtype_are_summed_in_float32(dtype):
    estimator = ExactEstimator([4], 2, 0, "cpu")
    grad = torch.tensor([[1.0, 2.0], [3.0, 1e-4]], dtype=dtype, requires_grad=True)
    for _ in range(256):  # bfloat16 sums would stop growing at 256
        estimator.add_gradient(0, 1, 1.0 * grad)
    expected = 256 * grad.detach().float().flatten()
    torch.testing.assert_close(estimator.rows[1, :4], expected)
    assert not estimator.rows[0].any()
    assert not estimator.rows.requires_grad


def test_nothing_of_one_step_is_left_in_the_next():
    estimator = ExactEstimator(numels(SHAPES), K, 4, "cpu")
    add_all(estimator, micro_batches(seed=3, count=6))
    estimator.extra += 5
    estimator.packed().mul_(2)  # the reduction of the first step
    estimator.begin_step()
    assert not estimator.packed().any()
    add_all(estimator, micro_batches(seed=4, count=6))

    estimator.begin_step()
    step = micro_batches(seed=5, count=2)  # the last domain is not drawn
    add_all(estimator, step)
    assert not estimator.rows[K - 1].any()
    torch.testing.assert_close(estimator.products()[0], reference(step)[0], rtol=1e-5, atol=1e-4)


def test_a_gradient_that_was_not_finite_is_forgotten_with_its_step():
    estimator = ExactEstimator([4], K, 0, "cpu")
    estimator.add_gradient(0, 1, torch.full((4,), float("nan")))
    assert estimator.products()[0].isnan().all()
    for add in (estimator.add_gradient, estimator.add_growth):
        estimator.begin_step()
        add(0, 1, torch.ones(4))
        assert estimator.products()[1].tolist() == [0.0, 4.0, 0.0]


def test_reading_the_rows_in_the_middle_of_a_step_changes_nothing():
    estimator = ExactEstimator(numels(SHAPES), K, 0, "cpu")
    step = micro_batches(seed=6, count=7)
    estimator.begin_step()
    for i in range(7):
        add_all(estimator, step[i : i + 1])
        assert estimator.rows[i % K].any()
    torch.testing.assert_close(estimator.products()[0], reference(step)[0], rtol=1e-5, atol=1e-4)


def test_rows_and_extra_statistics_travel_in_one_buffer():
    estimator = ExactEstimator(numels(SHAPES), K, 2, "cpu")
    add_all(estimator, micro_batches(seed=4, count=3))
    estimator.extra[1] = 7.0
    before, _ = estimator.products()
    estimator.packed().mul_(2)  # as a reduction over two equal ranks would
    assert estimator.extra.tolist() == [0.0, 14.0]
    torch.testing.assert_close(estimator.products()[0], 4 * before)
    assert estimator.packed_bytes == estimator.packed().numel() * 4


def test_a_rank_without_a_selected_parameter_adds_nothing():
    estimator = ExactEstimator([], K, 2, "cpu")
    estimator.begin_step()
    W, sq_norm = estimator.products()
    assert W.tolist() == sq_norm.tolist() == [0.0] * K
    assert estimator.packed().numel() == 2


def test_every_parameter_starts_on_a_cache_line_and_rows_spread_over_a_cache():
    estimator = ExactEstimator([7, 1 << 14], K, 0, "cpu")
    ones = torch.ones(1 << 14)
    estimator.add_gradient(1, 1, ones)
    assert estimator.rows[1].nonzero()[0].item() == 16
    assert estimator.rows.stride(0) % 32 == 16
    assert estimator.products()[1].tolist() == [0.0, float(1 << 14), 0.0]


@pytest.mark.parametrize(
    ("index", "domain", "size", "message"),
    [(0, 3, 48, r"domain 3.*\[0, 3\)"), (0, -1, 48, "domain -1"), (1, 0, 48, "48 numbers.*32")],
)
def test_a_gradient_that_does_not_belong_is_refused(index, domain, size, message):
    estimator = ExactEstimator(numels(SHAPES), K, 0, "cpu")
    for add in (estimator.add_gradient, estimator.add_growth):
        with pytest.raises(ValueError, match=message):
            add(index, domain, torch.zeros(size))


def test_an_impossible_number_of_domains_is_refused():
    for number in (0, 257):
        with pytest.raises(ValueError, match=f"{number} domains.*1 to 256"):
            build_estimator(AlignmentConfig(), [(4,)], number, 0, "cpu")


def test_every_estimator_that_the_config_names_is_there():
    built = [
        build_estimator(AlignmentConfig(estimator=name), [(4, 4)], 2, 0, "cpu")
        for name in config_module.ESTIMATORS
    ]
    assert [type(estimator) for estimator in built] == [
        ExactEstimator,
        SketchEstimator,
        CapturedEstimator,
    ]


# ---------------------------------------------------------------- from contributions to means


@given(
    seed=st.integers(0, 1000),
    counts=st.lists(st.integers(0, 5), min_size=2, max_size=6).filter(any),
    scale=st.sampled_from([1.0, 0.125, 65536.0, 3e-3]),
)
def test_scores_are_those_of_the_mean_gradients(seed, counts, scale):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(len(counts), 11))  # the domains' mean gradients
    share = np.array(counts) / sum(counts)
    contributions = scale * share[:, None] * g
    gram = contributions @ contributions.T
    alignment, sq_norm = mean_gradient_scores(
        gram.sum(1) - np.diag(gram), np.diag(gram), share, scale
    )
    for i, own in enumerate(share):
        if own == 0:
            assert np.isnan(alignment[i])
            assert np.isnan(sq_norm[i])
            continue
        others = sum((share[j] * g[j] for j in range(len(g)) if j != i), start=np.zeros(11))
        assert alignment[i] == pytest.approx(g[i] @ others, rel=1e-9, abs=1e-12)
        assert sq_norm[i] == pytest.approx(g[i] @ g[i], rel=1e-9)


def test_shares_times_scores_are_the_interaction_energy_of_the_batch():
    rng = np.random.default_rng(0)
    g, share = rng.normal(size=(4, 9)), np.array([0.4, 0.3, 0.2, 0.1])
    contributions = share[:, None] * g
    gram = contributions @ contributions.T
    alignment, _ = mean_gradient_scores(gram.sum(1) - np.diag(gram), np.diag(gram), share, 1.0)
    mixed = share @ g
    energy = mixed @ mixed - sum(a**2 * (v @ v) for a, v in zip(share, g, strict=True))
    assert share @ alignment == pytest.approx(energy)


def test_scores_of_extreme_scales_neither_overflow_nor_vanish():
    alignment, sq_norm = mean_gradient_scores([1e-280, 0.0], [1e-280, 0.0], [1e-6, 0.999], 1e-160)
    assert alignment[0] == pytest.approx(1e46)
    assert sq_norm[0] == pytest.approx(1e52)


@pytest.mark.parametrize(
    ("share", "scale", "message"),
    [
        ([0.5, 0.6, 0.1], 1.0, "shapes"),
        ([-0.1, 1.1], 1.0, r"share is \[-0.1, 1.1\]"),
        ([float("nan"), 1.0], 1.0, "share is"),
        ([0.5, 0.5], 0.0, "scale is 0.0"),
        ([0.5, 0.5], float("inf"), "scale is inf"),
    ],
)
def test_scores_refuse_shares_and_scales_that_cannot_be(share, scale, message):
    with pytest.raises(ValueError, match=message):
        mean_gradient_scores([1.0, 1.0], [1.0, 1.0], share, scale)


# ---------------------------------------------------------------- which layers


def test_the_papers_depths_select_the_papers_layers():
    assert layers_at_depths((0.75, 0.875, 1.0), 16) == [12, 14, 16]


@pytest.mark.parametrize(
    ("depths", "num_layers", "expected"),
    [
        ((0.75, 0.875, 1.0), 4, [3, 4]),
        ((0.75, 0.875, 1.0), 1, [1]),
        ((0.07,), 100, [7]),  # 0.07 * 100 is a little more than 7
        ((1.0, 0.01), 12, [1, 12]),
    ],
)
def test_depths_select_layers_of_any_model(depths, num_layers, expected):
    assert layers_at_depths(depths, num_layers) == expected


@given(st.integers(1, 40), st.integers(1, 130))
def test_probes_spread_evenly_from_first_to_last(num_probes, num_layers):
    layers = probe_layers(num_probes, num_layers)
    assert len(layers) == num_probes
    assert layers[0] == 1
    assert layers[-1] == (num_layers if num_probes > 1 else 1)
    steps = np.diff(layers)
    assert all(steps >= 0)
    if num_probes > 1:
        assert np.ptp(steps) <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers_at_depths((0.5,), 0), "0 layers"),
        (lambda: layers_at_depths((1.5,), 4), "depth 1.5"),
        (lambda: layers_at_depths((0.0,), 4), "depth 0.0"),
        (lambda: probe_layers(0, 4), "num_probes is 0"),
        (lambda: probe_layers(2, 0), "0 layers"),
    ],
)
def test_impossible_selections_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- two processes


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor


def _data_parallel(rank: int) -> dict[str, Any]:
    """Each rank has every second micro-batch, so domains are spread unevenly."""
    step = micro_batches(seed=10, count=7)
    estimator = ExactEstimator(numels(SHAPES), K, 1, "cpu")
    add_all(estimator, step[rank::2])
    estimator.extra[0] = 1 + rank
    products_summed = _sum(estimator.products()[0])
    _sum(estimator.packed())
    W, sq_norm = estimator.products()
    return {
        "W": W,
        "sq_norm": sq_norm,
        "products summed": products_summed,
        "extra": estimator.extra.clone(),
    }


def _tensor_parallel(rank: int) -> dict[str, Any]:
    """The weights are split by columns; the bias is on both ranks, and counts on the first."""
    step = [
        (domain, [grads[0][:, 4 * rank :][:, :4], grads[1][:, 4 * rank :][:, :4], *grads[2:]])
        for domain, grads in micro_batches(seed=11, count=7)
    ]
    own = 3 if rank == 0 else 2
    estimator = ExactEstimator([24, 16, 5][:own], K, 0, "cpu")
    add_all(estimator, [(domain, grads[:own]) for domain, grads in step])
    W, sq_norm = (_sum(part) for part in estimator.products())

    sharded = ExactEstimator([24, 16], K, 0, "cpu")
    add_all(sharded, [(domain, grads[:2]) for domain, grads in step])
    _sum(sharded.packed())  # unlike shards, added up
    twice = ExactEstimator([24, 16, 5], K, 0, "cpu")
    add_all(twice, step)
    return {
        "W": W,
        "sq_norm": sq_norm,
        "rows summed": sharded.products()[0],
        "bias twice": _sum(twice.products()[0]),
    }


def _pipeline_parallel(rank: int) -> dict[str, Any]:
    """The first rank holds no selected layer."""
    estimator = ExactEstimator(numels(SHAPES) if rank == 1 else [], K, 0, "cpu")
    if rank == 1:
        add_all(estimator, micro_batches(seed=12, count=7))
    W, sq_norm = (_sum(part) for part in estimator.products())
    return {"W": W, "sq_norm": sq_norm}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    layouts = {"DP": _data_parallel, "TP": _tensor_parallel, "PP": _pipeline_parallel}
    torch.save({name: run(rank) for name, run in layouts.items()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each of two real processes measured, in every layout."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("layout", "seed"), [("DP", 10), ("TP", 11), ("PP", 12)])
def test_every_rank_measures_what_one_process_would(two_ranks, layout, seed):
    W, sq_norm = reference(micro_batches(seed, count=7))
    for results in two_ranks:
        torch.testing.assert_close(results[layout]["W"], W, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(results[layout]["sq_norm"], sq_norm, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "seed", "mistake"),
    [("DP", 10, "products summed"), ("TP", 11, "rows summed"), ("TP", 11, "bias twice")],
)
def test_a_sum_in_the_wrong_place_would_be_noticed(two_ranks, layout, seed, mistake):
    W, _ = reference(micro_batches(seed, count=7))
    for results in two_ranks:
        assert ((results[layout][mistake] - W).abs() > 0.01 * W.abs().max()).any()


def test_extra_statistics_are_summed_with_the_rows(two_ranks):
    assert [results["DP"]["extra"].tolist() for results in two_ranks] == [[3.0], [3.0]]


# ---------------------------------------------------------------- the benchmark


def test_the_benchmark_writes_figures_of_ways_that_agree(tmp_path, capsys):
    path = Path(__file__).resolve().parent.parent / "tools" / "benchmark_alignment.py"
    spec = importlib.util.spec_from_file_location("benchmark_alignment", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    options = "--domains 3 --numbers 300 --micro-batches 4 --rounds 2 --json"
    assert benchmark.main([*options.split(), str(tmp_path / "figures.json")]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("domain_alignment", "gram", "sketch, by growth"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    (shape,) = figures["shapes"]
    assert all(row["ratio"] > 0 for row in shape["operators"] + shape["reward_path"])
    assert figures["machine"]["torch"] == torch.__version__

    # The published way and ours are timed on the same work: they find the same products.
    way = benchmark.RewardPath(3, 300, 4, 8, 1 << 18, torch.device("cpu"))
    way.published()
    expected = benchmark.published_products(way.matrix).double()
    for path in (way.by_gradient, way.by_growth):
        path(way.exact)
        torch.testing.assert_close(way.exact.products()[0], expected, rtol=1e-5, atol=1e-3)
        path(way.sketch)  # of so many numbers that hardly any share one
        torch.testing.assert_close(way.sketch.products()[0], expected, rtol=0.05, atol=1.0)
