from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from megatron_acodm import ops

FUSED = ops.has_fused_kernels("cpu")
needs_fused = pytest.mark.skipif(not FUSED, reason="megatron_acodm._C is not built")
# The operator as called, whatever serves it, and the reference beside it.
ALIGNMENTS = pytest.mark.parametrize(
    "alignment", [ops.domain_alignment, ops.domain_alignment_reference], ids=["op", "reference"]
)
GROWTHS = pytest.mark.parametrize(
    "accumulate",
    [ops.accumulate_domain_grad_, ops.accumulate_domain_grad_reference_],
    ids=["op", "reference"],
)
GRAMS = pytest.mark.parametrize("gram", [ops.gram, ops.gram_reference], ids=["op", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])

Alignment = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Accumulate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def by_definition(G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W and squared norms from the Gram matrix, in float64."""
    gram = G.double() @ G.double().T
    return gram.sum(1) - gram.diagonal(), gram.diagonal()


def assert_agrees(alignment: Alignment, G: torch.Tensor) -> None:
    W, sq_norm = alignment(G)
    expected_W, expected_sq_norm = by_definition(G)
    assert W.dtype == sq_norm.dtype == torch.float64
    assert W.shape == sq_norm.shape == (len(G),)
    # float32 rounds each product and each column sum: errors are in proportion to the norms.
    norms = expected_sq_norm.sqrt()
    bound = 1e-6 * norms * norms.sum() + 1e-30
    assert torch.all((W - expected_W).abs() <= bound)
    assert torch.all((sq_norm - expected_sq_norm).abs() <= 1e-6 * expected_sq_norm)


@ALIGNMENTS
@DTYPES
@pytest.mark.parametrize("K", [1, 2, 7, 8, 9, 16, 17, 22, 256])
@pytest.mark.parametrize("P", [1, 31, 32, 33, 1000, 9001])
def test_alignment_is_the_product_with_the_sum_of_the_others(alignment, dtype, K, P):
    torch.manual_seed(K * P)
    assert_agrees(alignment, torch.randn(K, P).to(dtype))


@ALIGNMENTS
@settings(max_examples=60)
@given(data=st.data())
def test_alignment_takes_any_view(alignment, data):
    K = data.draw(st.integers(1, 40))
    P = data.draw(st.integers(0, 200))
    gap = data.draw(st.integers(0, 3))
    offset = data.draw(st.integers(0, 5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    flat = torch.randn(offset + K * (P + gap) + 1).to(dtype)
    G = flat[offset : offset + K * (P + gap)].view(K, P + gap)[:, :P]
    assert_agrees(alignment, G)
    assert_agrees(alignment, torch.randn(P, K).to(dtype).T)
    assert_agrees(alignment, torch.randn(2 * K, 2 * P + 1).to(dtype)[::2, ::2])


@ALIGNMENTS
def test_alignment_of_one_row_repeated_without_memory_of_its_own(alignment):
    assert_agrees(alignment, torch.randn(1, 300).expand(5, 300))
    assert_agrees(alignment, torch.randn(5, 1).expand(5, 300))


@ALIGNMENTS
def test_a_lone_domain_aligns_with_nothing(alignment):
    W, sq_norm = alignment(torch.randn(1, 5000))
    assert W.item() == 0.0
    assert sq_norm.item() > 0.0


@ALIGNMENTS
def test_no_numbers_and_empty_domains_give_zeros(alignment):
    W, sq_norm = alignment(torch.empty(3, 0))
    assert W.tolist() == sq_norm.tolist() == [0.0, 0.0, 0.0]
    G = torch.randn(4, 100)
    G[2] = 0
    W, sq_norm = alignment(G)
    assert W[2] == sq_norm[2] == 0.0
    assert_agrees(alignment, G)


@ALIGNMENTS
def test_a_dominant_row_does_not_drown_what_it_is_compared_with(alignment):
    torch.manual_seed(0)
    G = torch.randn(8, 20_000)
    G[3] *= 1e4
    W, _ = alignment(G)
    expected, _ = by_definition(G)
    # <g, u> - <g, g> in float32 would err by 1e-7 * 2e12 here, as much as W itself.
    assert abs(W[3] - expected[3]) < 1e-3 * abs(expected[3])


@ALIGNMENTS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 517, 1029])
def test_a_number_that_is_not_finite_shows_in_every_product_and_names_its_row(
    alignment, bad, column
):
    G = torch.randn(12, 1030)
    G[4, column] = bad
    W, sq_norm = alignment(G)
    assert not torch.isfinite(W).any()
    assert torch.isfinite(sq_norm).logical_not().nonzero().tolist() == [[4]]


@needs_fused
@DTYPES
def test_results_repeat_bit_for_bit_at_any_number_of_threads(dtype):
    G = torch.randn(22, 300_000).to(dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            results.append(torch.stack(ops.domain_alignment(G)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@ALIGNMENTS
@pytest.mark.parametrize(
    ("G", "message"),
    [
        (torch.zeros(5), r"shape \[5\].*\[domains, numbers\]"),
        (torch.zeros(2, 3, 4), r"shape \[2, 3, 4\]"),
        (torch.zeros(0, 4), "0 rows; 1 to 256"),
        (torch.zeros(257, 4), "257 rows; 1 to 256"),
        (torch.zeros(2, 4, dtype=torch.float16), "float32 or bfloat16"),
        (torch.zeros(2, 4, dtype=torch.float64), "float32 or bfloat16"),
    ],
)
def test_alignment_refuses_what_it_cannot_take(alignment, G, message):
    with pytest.raises(ValueError, match=message):
        alignment(G)


@GROWTHS
@DTYPES
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 1000, 70_001])
def test_growth_is_added_to_the_row_and_remembered(accumulate, dtype, n):
    row, main_grad, seen = torch.randn(n), torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    before = row.clone()
    expected = before + (main_grad.float() - seen.float())
    accumulate(row, main_grad, seen)
    assert torch.equal(row, expected)
    assert torch.equal(seen, main_grad)


@GROWTHS
def test_growths_of_a_step_add_up_to_the_gradient(accumulate):
    torch.manual_seed(0)
    micro_batches = torch.randn(12, 4, 25)
    domains = torch.randint(3, (12,)).tolist()
    rows, main_grad, seen = torch.zeros(3, 100), torch.zeros(4, 25), torch.zeros(4, 25)
    for gradient, domain in zip(micro_batches, domains, strict=True):
        main_grad += gradient
        accumulate(rows[domain], main_grad, seen)
    for domain in range(3):
        own = micro_batches.double()[[d == domain for d in domains]].sum(0).flatten()
        assert torch.allclose(rows[domain].double(), own, atol=1e-5)


@GROWTHS
@DTYPES
def test_growth_takes_misaligned_views_and_leaves_their_surroundings_alone(accumulate, dtype):
    row, main_grad, seen = torch.randn(103), torch.randn(103).to(dtype), torch.zeros(103).to(dtype)
    before_row = row.clone()
    accumulate(row[1:101], main_grad[2:102], seen[3:103])
    assert torch.equal(row[1:101], before_row[1:101] + main_grad[2:102].float())
    assert torch.equal(row[[0, 101, 102]], before_row[[0, 101, 102]])
    assert torch.equal(seen[3:103], main_grad[2:102])
    assert not seen[:3].any()


@GROWTHS
def test_growth_refuses_what_it_cannot_take(accumulate):
    def refused(row, main_grad, seen, message):
        with pytest.raises(ValueError, match=message):
            accumulate(row, main_grad, seen)

    a, b, c = torch.zeros(8), torch.zeros(8), torch.zeros(8)
    refused(a.double(), b, c, "row is of.*float32")
    refused(a, b.half(), c.half(), "main_grad is of.*float32 or bfloat16")
    refused(a, b.bfloat16(), c, "must be alike")
    refused(a, b[:7], c, "8, 7 and 8 numbers")
    refused(a, torch.zeros(16)[::2], c, "must be contiguous")
    refused(a, b, b, "must be a copy of main_grad")
    both = torch.zeros(12)
    refused(a, both[:8], both[4:], "share memory")
    refused(both[:8], both[4:], c, "share memory")


@GRAMS
@DTYPES
@pytest.mark.parametrize("K", [1, 4, 22, 65])
@pytest.mark.parametrize("P", [0, 17, 32, 9001])
def test_gram_is_the_product_of_every_row_with_every_other(gram, dtype, K, P):
    torch.manual_seed(K * P)
    assert_is_gram(gram, torch.randn(K, P).to(dtype))


def assert_is_gram(gram: Callable[[torch.Tensor], torch.Tensor], G: torch.Tensor) -> None:
    H = gram(G)
    expected = G.double() @ G.double().T
    norms = expected.diagonal().sqrt()
    assert H.dtype == torch.float64
    assert H.shape == expected.shape
    assert torch.all((H - expected).abs() <= 1e-6 * norms[:, None] * norms)
    assert torch.equal(H, H.T)


@GRAMS
@DTYPES
def test_gram_takes_any_view(gram, dtype):
    flat = torch.randn(6 * 103 + 1).to(dtype)
    assert_is_gram(gram, flat[1:].view(6, 103)[:, :101])
    assert_is_gram(gram, torch.randn(101, 6).to(dtype).T)
    assert_is_gram(gram, torch.randn(12, 203).to(dtype)[::2, ::2])
    assert_is_gram(gram, torch.randn(1, 300).to(dtype).expand(5, 300))


@GRAMS
def test_a_number_that_is_not_finite_shows_in_its_row_and_column_of_the_gram_matrix(gram):
    G = torch.randn(6, 300)
    G[4, 299] = float("inf")
    bad = torch.zeros(6, 6, dtype=torch.bool)
    bad[4, :] = bad[:, 4] = True
    assert torch.equal(~torch.isfinite(gram(G)), bad)


@GRAMS
def test_gram_refuses_what_it_cannot_take(gram):
    with pytest.raises(ValueError, match=r"shape \[5\].*\[domains, numbers\]"):
        gram(torch.zeros(5))
    with pytest.raises(ValueError, match="257 rows; 1 to 256"):
        gram(torch.zeros(257, 4))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        gram(torch.zeros(2, 4, dtype=torch.float64))


# ---------------------------------------------------------------- the sketch


def sketch(g: torch.Tensor, m: int, key: int = 0) -> torch.Tensor:
    row = torch.zeros(m)
    ops.add_sketch_(row, g, key)
    return row


@DTYPES
@pytest.mark.parametrize("m", [64, 192, 4096])
@pytest.mark.parametrize("n", [0, 1, 64, 1000, 9001])
@pytest.mark.parametrize("key", [0, -1, 2**63 - 1])
def test_the_kernel_and_its_reference_draw_the_same_map(dtype, m, n, key):
    g, row = torch.randn(n).to(dtype), torch.randn(m)
    expected = row.clone()
    ops.add_sketch_(row, g, key)
    ops.add_sketch_reference_(expected, g, key)
    assert torch.equal(row, expected)


def test_the_map_is_the_one_that_saved_figures_were_made_with():
    g = torch.arange(1.0, 201.0)
    assert sketch(g, 64, key=7)[:6].tolist() == [9.0, -10.0, 281.0, 58.0, -59.0, 290.0]


def test_sketching_is_exactly_linear():
    torch.manual_seed(0)
    g, h = torch.randint(-9, 9, (2, 10_000)).float()  # float32 adds these without rounding
    assert torch.equal(sketch(3 * g - 2 * h, 256), 3 * sketch(g, 256) - 2 * sketch(h, 256))


def test_numbers_of_one_block_only_change_places_and_signs():
    g = torch.rand(1024) + 1
    for key in range(5):
        assert torch.equal(sketch(g, 1024, key).abs().sort().values, g.sort().values)


def structured_gradients(width: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of gradients of a weight [32, width], each with a pattern that could collide."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(3, 32, width, generator=generator)
    column = torch.full((32, width), 0.01)
    column[:, 3] = 5.0
    ones = torch.ones(32, width)
    outer = noise[0, :, :1] * noise[1, :1]
    return {
        "unrelated": (noise[0], noise[1]),
        "related": (noise[0], 0.5 * noise[0] + noise[1]),
        "one large column": (column * noise[0], column * noise[0] + 0.01 * noise[2]),
        "constant": (ones, ones),
        "rank one": (outer, outer + 0.1 * noise[2]),
        "one large row": (noise[0] * (torch.arange(32) == 4)[:, None], noise[0]),
    }


@pytest.mark.parametrize("pattern", structured_gradients(64))
@pytest.mark.parametrize("width", [64, 256, 200])
def test_products_of_sketches_are_unbiased_with_the_promised_variance(pattern, width):
    m, keys = 256, 600
    g, h = (part.flatten() for part in structured_gradients(width)[pattern])
    exact = (g.double() @ h.double()).item()
    bound = ((g.double().square().sum() * h.double().square().sum()).item() + exact**2) / m
    found = torch.tensor(
        [(sketch(g, m, key).double() @ sketch(h, m, key).double()).item() for key in range(keys)]
    )
    assert abs(found.mean() - exact) < 4 * (bound / keys) ** 0.5
    assert (found - exact).square().mean() < 1.35 * bound  # 600 draws vary by some 10%


def test_maps_of_different_keys_are_unrelated():
    g = torch.randn(50_000)
    products = torch.stack([sketch(g, 1024, key) for key in range(30)])
    cosines = torch.corrcoef(products)[~torch.eye(30, dtype=torch.bool)]
    assert cosines.abs().max() < 5 / 1024**0.5


@pytest.mark.parametrize("add_sketch_", [ops.add_sketch_, ops.add_sketch_reference_])
@DTYPES
def test_sketch_takes_any_view_and_leaves_its_surroundings_alone(add_sketch_, dtype):
    flat, rows = torch.randn(1005).to(dtype), torch.zeros(200)
    for g in (flat[3:1001], flat[::2], flat[:1000].view(20, 50).T, flat[:1].expand(700)):
        rows.zero_()
        add_sketch_(rows[5:133], g, 1)
        assert torch.equal(rows[5:133], sketch(g.reshape(-1).clone(), 128, 1))
        assert not rows[:5].any() and not rows[133:].any()


@pytest.mark.parametrize("add_sketch_", [ops.add_sketch_, ops.add_sketch_reference_])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stays_in_its_bucket(add_sketch_, bad):
    g, row = torch.randn(1000), torch.zeros(128)
    g[700] = bad
    add_sketch_(row, g, 2)
    assert (~torch.isfinite(row)).sum() == 1


@needs_fused
def test_sketches_repeat_bit_for_bit_at_any_number_of_threads():
    g = torch.randn(500_000)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(torch.cat([sketch(g, 8192), ops.gram(g.view(50, -1)).flatten()]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("add_sketch_", [ops.add_sketch_, ops.add_sketch_reference_])
def test_sketch_refuses_what_it_cannot_take(add_sketch_):
    def refused(row, grad, message):
        with pytest.raises(ValueError, match=message):
            add_sketch_(row, grad, 0)

    row, g = torch.zeros(128), torch.zeros(300)
    refused(row.double(), g, "row is of.*float32")
    refused(row, g.double(), "grad is of.*float32 or bfloat16")
    refused(row[:100], g, r"shape \[100\].*multiple of 64")
    refused(row[:0], g, r"shape \[0\].*multiple of 64")
    refused(row.view(2, 64), g, r"shape \[2, 64\]; it must be flat")
    refused(torch.zeros(128)[::2], g, "row must be contiguous")
    refused(row, g.to("meta"), "row and grad lie on cpu")
    refused(row, row[20:], "share memory")


@pytest.mark.parametrize("K", [1, 5])
def test_operators_pass_torch_opcheck(K):
    alignment = torch.ops.megatron_acodm.domain_alignment.default
    for G in (torch.randn(K, 50), torch.randn(50, K).bfloat16().T):
        torch.library.opcheck(alignment, (G,))
        torch.library.opcheck(torch.ops.megatron_acodm.gram.default, (G,))
    sketch_op = torch.ops.megatron_acodm.add_sketch_.default
    torch.library.opcheck(sketch_op, (torch.randn(128), torch.randn(40, K), 3))
    growth = torch.ops.megatron_acodm.accumulate_domain_grad_.default
    torch.library.opcheck(growth, (torch.randn(20), torch.randn(4, 5), torch.randn(20)))


def test_compiled_and_python_schemas_agree():
    for name, schema in ops._SCHEMAS.items():
        operator = getattr(torch.ops.megatron_acodm, name).default
        assert str(operator._schema) == f"megatron_acodm::{name}{schema}"


def test_without_the_extension_the_reference_serves_and_says_so_once():
    program = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
sys.modules["megatron_acodm._C"] = None  # as if it had not been built
import torch
from megatron_acodm import ops
G = torch.randn(3, 10)
for _ in range(2):
    W, _ = ops.domain_alignment(G)
row, main_grad, seen = torch.zeros(4), torch.ones(4), torch.zeros(4)
ops.accumulate_domain_grad_(row, main_grad, seen)
assert torch.equal(W, ops.domain_alignment_reference(G)[0]) and row.sum() == seen.sum() == 4
z = torch.zeros(64)
ops.add_sketch_(z, torch.ones(9), 4)
assert ops.gram(G).shape == (3, 3) and z.abs().sum() == 9
assert not ops.has_fused_kernels("cpu")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PyTorch reference runs") == 1
    assert "megatron_acodm._C cannot be loaded" in done.stdout


@needs_fused
def test_with_the_extension_nothing_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="megatron_acodm"):
        ops.domain_alignment(torch.randn(2, 3))
    assert not caplog.records
