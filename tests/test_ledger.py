"""The ledger: counts follow weights, sequences come once an epoch, order is a pure function."""

from __future__ import annotations

import logging
import zlib
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import mixtures

from megatron_acodm.blending import Ledger, mapping, quotas
from megatron_acodm.blending.mapping import ONE

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15

needs_compiler = pytest.mark.skipif(
    mapping.compiled is None, reason="the compiled ledger was not built"
)


# A naive reference, in Python integers: enumerates every sample of every stage. --------------


def finalize(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def permuted(x: int, n: int, seed: int, stream: int, counter: int) -> int:
    key = finalize(finalize(seed + GAMMA & MASK) ^ stream)
    key = finalize((key + GAMMA & MASK) ^ counter)
    bits = (n - 1).bit_length()
    shift = bits // 2
    while True:
        low, high = x & (1 << shift) - 1, x >> shift
        for i in range(1, 25 if n <= 16 else 9):
            half = low if i % 2 else high
            h = (half ^ finalize(key + i * GAMMA & MASK)) * 0xBF58476D1CE4E5B9 & MASK
            h = ((h ^ h >> 32) * 0x94D049BB133111EB & MASK) >> 32
            if i % 2:
                high ^= h & (1 << bits - shift) - 1
            else:
                low ^= h & (1 << shift) - 1
        x = high << shift | low
        if x < n:
            return x


def naive_quota(units: list[int], granules: int, due: list[int]) -> list[int]:
    """Updates ``due``; deadlines as exact fractions of a granule from now."""
    quota = [0] * len(units)
    for _ in range(granules):
        for k, unit in enumerate(units):
            due[k] += unit
        active = [k for k, unit in enumerate(units) if unit > 0]

        def urgency(k: int) -> tuple:
            if due[k] >= ONE:
                return 0, -due[k], k
            if due[k] > 0:
                return 1, Fraction(ONE - 1 - due[k], units[k]) // 1, k
            return 2, -due[k], k

        winner = min(active, key=urgency)
        due[winner] -= ONE
        quota[winner] += 1
    return quota


def naive_samples(ledger: Ledger, stages: list) -> list[tuple[int, int, int, int]]:
    """(domain, position, epoch, sequence) of every sample of all stages (weights, count)."""
    granule_size, seed = ledger.granule_size, ledger.seed
    due, cursor = [0] * ledger.num_domains, [0] * ledger.num_domains
    samples = []
    for stage, (weights, count) in enumerate(stages):
        units = quotas.to_units(weights).tolist()
        n = count // granule_size
        dealt = [
            (k, cursor[k] + j * granule_size)
            for k, quota in enumerate(naive_quota(units, n, due))
            for j in range(quota)
        ]
        for k, _ in dealt:
            cursor[k] += granule_size
        for slot in range(n):
            k, start = dealt[permuted(slot, n, seed, 0x5354414745, stage)]
            for position in range(start, start + granule_size):
                epoch, rank = divmod(position, int(ledger.sizes[k]))
                stream = mapping.domain_stream(ledger.names[k])
                sequence = permuted(rank, int(ledger.sizes[k]), seed, stream, epoch)
                samples.append((k, position, epoch, sequence))
    return samples


# Strategies -----------------------------------------------------------------------------------


@st.composite
def runs(draw, max_domains: int = 6):
    """A ledger, and the stages (weights, count) that were appended to it."""
    num_domains = draw(st.integers(1, max_domains))
    sizes = draw(st.lists(st.integers(1, 40), min_size=num_domains, max_size=num_domains))
    granule_size = draw(st.integers(1, 4))
    ledger = Ledger(sizes, granule_size, seed=draw(st.integers(0, 2**63 - 1)))
    stages = draw(
        st.lists(st.tuples(mixtures(num_domains), st.integers(1, 40)), min_size=1, max_size=6)
    )
    stages = [(weights, granules * granule_size) for weights, granules in stages]
    for weights, count in stages:
        ledger.append(weights, count)
    return ledger, stages


def everything(ledger: Ledger) -> list[np.ndarray]:
    """Domain, position, epoch and sequence of every decided sample."""
    domains, positions = ledger.locate(np.arange(ledger.first_sample, ledger.num_samples))
    return [domains, positions, *ledger.epoch_and_index(domains, positions)]


# Order ----------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(runs())
def test_every_sample_is_where_the_naive_reference_puts_it(run):
    ledger, stages = run
    assert list(zip(*(a.tolist() for a in everything(ledger)), strict=True)) == naive_samples(
        ledger, stages
    )


@needs_compiler
@settings(max_examples=40)
@given(runs(max_domains=30), st.randoms(use_true_random=False))
def test_compiled_and_numpy_agree_bit_for_bit(run, random):
    ledger, _ = run
    indices = np.array(random.choices(range(ledger.num_samples), k=500), dtype=np.int64)
    rows = ledger.state_dict()["rows"].numpy()
    arguments = rows, 0, ledger.granule_size, ledger.seed, indices
    for ours, reference in zip(
        mapping.compiled.locate(*arguments), mapping.numpy_locate(*arguments), strict=True
    ):
        assert ours.dtype == reference.dtype
        np.testing.assert_array_equal(ours, reference)


@needs_compiler
@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 1000, 2**31 + 11, 2**45 + 7])
def test_compiled_and_numpy_agree_on_epochs_of_any_size(size):
    rng = np.random.default_rng(size)
    sizes = np.array([size, 7], dtype=np.int64)
    streams = np.array([mapping.domain_stream("web"), mapping.domain_stream("code")], np.uint64)
    domains = rng.integers(0, 2, 3000).astype(np.int32)
    positions = rng.integers(0, 3 * size + 5, 3000)
    for implementation in (mapping.compiled.epoch_and_index, mapping.numpy_epoch_and_index):
        epochs, sequences = implementation(domains, positions, sizes, streams, 99)
        np.testing.assert_array_equal(epochs, positions // sizes[domains])
        assert ((sequences >= 0) & (sequences < sizes[domains])).all()
    np.testing.assert_array_equal(
        sequences, mapping.compiled.epoch_and_index(domains, positions, sizes, streams, 99)[1]
    )


def test_the_order_of_scheme_1_never_changes():
    # A changed order would silently repeat and skip samples of runs that are resumed.
    ledger = Ledger([5, 1000, 33, 1], 2, seed=1234, names=["web", "code", "books", "one"])
    for stage in range(50):
        ledger.append(np.array([4, 3, stage % 3, 1]) / (8 + stage % 3), 2 * (1 + stage))
    assert zlib.crc32(np.stack(everything(ledger)).tobytes()) == 2760507734


@settings(max_examples=30)
@given(runs(), st.lists(st.integers(0, 10**6), max_size=5), st.randoms(use_true_random=False))
def test_how_a_query_is_split_or_ordered_does_not_matter(run, cuts, random):
    ledger, _ = run
    domains, positions = ledger.locate(np.arange(ledger.num_samples))
    edges = sorted({0, ledger.num_samples, *(cut % (ledger.num_samples + 1) for cut in cuts)})
    for low, high in pairwise(edges):
        part = ledger.locate(np.arange(low, high))
        np.testing.assert_array_equal(part[0], domains[low:high])
        np.testing.assert_array_equal(part[1], positions[low:high])
    shuffled = list(range(ledger.num_samples))
    random.shuffle(shuffled)
    np.testing.assert_array_equal(ledger.locate(shuffled)[0], domains[shuffled])
    np.testing.assert_array_equal(ledger.locate(shuffled)[1], positions[shuffled])


@settings(max_examples=40)
@given(runs())
def test_every_sequence_is_drawn_exactly_once_an_epoch(run):
    ledger, _ = run
    domains, positions, epochs, sequences = everything(ledger)
    for k, size in enumerate(ledger.sizes.tolist()):
        mine = domains == k
        assert sorted(positions[mine].tolist()) == list(range(mine.sum()))
        for epoch in range(epochs[mine].max(initial=-1) + 1):
            drawn = sorted(sequences[mine & (epochs == epoch)].tolist())
            if epoch < mine.sum() // size:
                assert drawn == list(range(size))
            else:
                assert len(set(drawn)) == len(drawn) == mine.sum() % size


@settings(max_examples=30)
@given(runs())
def test_a_granule_is_of_one_domain_and_consecutive_positions(run):
    ledger, _ = run
    domains, positions = ledger.locate(np.arange(ledger.num_samples))
    domains = domains.reshape(-1, ledger.granule_size)
    steps = positions.reshape(-1, ledger.granule_size) - positions[:: ledger.granule_size, None]
    assert (domains == domains[:, :1]).all()
    assert (steps == np.arange(ledger.granule_size)).all()


def test_a_domain_keeps_its_order_when_others_come_or_go():
    few = Ledger([100, 50], 1, seed=3, names=["code", "web"])
    many = Ledger([7, 50, 100], 1, seed=3, names=["books", "web", "code"])
    positions = np.arange(250)
    code = few.epoch_and_index(np.zeros(250), positions)[1]
    np.testing.assert_array_equal(code, many.epoch_and_index(np.full(250, 2), positions)[1])
    assert (code != few.epoch_and_index(np.ones(250), positions)[1]).any()


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_small_stages_meet_every_order_equally_often(n):
    # One stage a row; the position in the (only) domain tells how its granules were shuffled.
    stages = 24_000
    ledger = Ledger([n], 1, seed=5)
    for _ in range(stages):
        ledger.append([1.0], n)
    orders = (everything(ledger)[1] % n).reshape(stages, n)
    codes = orders @ (n ** np.arange(n))
    counts = np.unique(codes, return_counts=True)[1]
    num_orders = np.prod(np.arange(1, n + 1))
    assert len(counts) == num_orders
    expected = stages / num_orders
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < num_orders - 1 + 4 * np.sqrt(2 * num_orders)


@pytest.mark.parametrize("n", [6, 16, 37, 144])
def test_shuffles_are_uniform_in_place_and_in_succession(n):
    epochs = 400
    ledger = Ledger([n], 1, seed=11)
    _, sequences = ledger.epoch_and_index(np.zeros(epochs * n), np.arange(epochs * n))
    orders = sequences.reshape(epochs, n)
    place = np.zeros((n, n))
    np.add.at(place, (np.broadcast_to(np.arange(n), orders.shape), orders), 1)
    succession = np.bincount(((orders[:, 1:] - orders[:, :-1]) % n).ravel(), minlength=n)[1:]
    for counts, freedom in ((place, n * (n - 1)), (succession, n - 2)):
        expected = counts.mean()
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


# Counts ---------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_constant_weights_are_followed_within_one_granule_at_every_moment(data):
    num_domains = data.draw(st.integers(1, 40))
    weights = data.draw(mixtures(num_domains))
    ledger = Ledger([10] * num_domains, 3, seed=0)
    for granules in data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=30)):
        ledger.append(weights, 3 * granules)
        due = np.array(weights) * ledger.num_samples / 3
        assert ledger.drawn.sum() == ledger.num_samples
        assert (np.abs(ledger.drawn / 3 - due) < 1 + 1e-9).all()


@settings(max_examples=60)
@given(st.data())
def test_cutting_a_stage_in_two_changes_no_count(data):
    num_domains = data.draw(st.integers(1, 8))
    whole, cut = (Ledger([10] * num_domains, 2, seed=0) for _ in range(2))
    for _ in range(data.draw(st.integers(1, 5))):
        weights = data.draw(mixtures(num_domains))
        first, second = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
        whole.append(weights, 2 * (first + second))
        cut.append(weights, 2 * first)
        cut.append(weights, 2 * second)
        np.testing.assert_array_equal(whole.drawn, cut.drawn)


def test_drifting_weights_are_followed_within_one_granule_for_20000_stages():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, 22)
    ledger = Ledger([1000] * 22, 1, seed=0)
    due = np.zeros(22)
    for _ in range(20_000):
        logits = 0.999 * logits + rng.normal(0, 0.02, 22)
        weights = np.exp(logits) / np.exp(logits).sum()
        ledger.append(weights, 16)
        due += 16 * weights
        assert np.abs(ledger.drawn - due).max() < 1
    assert ledger.state_dict()["carry"].sum() == 0


def test_arbitrary_weights_are_followed_within_the_harmonic_bound():
    # The worst case known: whoever was served gets nothing more, the rest share alike.
    num_domains = 22
    ledger = Ledger([1000] * num_domains, 1, seed=0)
    waiting = set(range(num_domains))
    due, worst = np.zeros(num_domains), 0.0
    while waiting:
        weights = np.array([k in waiting for k in range(num_domains)]) / len(waiting)
        before = ledger.drawn
        ledger.append(weights, 1)
        due += weights
        worst = max(worst, np.abs(due - ledger.drawn).max())
        waiting -= set(np.flatnonzero(ledger.drawn - before).tolist())
    assert worst <= sum(1 / k for k in range(2, num_domains + 1)) + 1e-9


@settings(max_examples=40)
@given(runs())
def test_a_domain_of_weight_zero_is_never_drawn(run):
    ledger, stages = run
    first = 0
    for weights, count in stages:
        drawn = ledger.counts(first, count)
        assert drawn.sum() == count
        assert (drawn[np.array(weights) == 0] == 0).all()
        np.testing.assert_allclose(ledger.weights_at(first + count - 1), weights, atol=1e-12)
        assert ledger.weights_at(first).sum() == 1
        first += count


@settings(max_examples=30)
@given(runs(), st.integers(0, 500), st.integers(0, 500))
def test_counts_of_any_range_are_those_of_its_samples(run, a, b):
    ledger, _ = run
    first, end = sorted((a % (ledger.num_samples + 1), b % (ledger.num_samples + 1)))
    expected = np.bincount(ledger.locate(np.arange(first, end))[0], minlength=ledger.num_domains)
    np.testing.assert_array_equal(ledger.counts(first, end - first), expected)


@pytest.mark.parametrize("num_domains", [1, 2, 22, 1000])
@pytest.mark.parametrize("shape", ["one-hot", "uniform", "tiny"])
def test_extreme_mixtures_over_any_number_of_domains(num_domains, shape):
    ledger = Ledger([1] * num_domains, 1, seed=7)
    weights = np.full(num_domains, {"one-hot": 0.0, "uniform": 1.0, "tiny": 1e-12}[shape])
    weights[num_domains // 2] = 1.0
    for count in (1, 2, 3, 500):
        ledger.append(weights / weights.sum(), count)
    domains, positions, epochs, sequences = everything(ledger)
    assert ledger.drawn.sum() == len(domains) == 506
    assert (sequences == 0).all()
    np.testing.assert_array_equal(epochs, positions)
    due = 506 * weights / weights.sum()
    assert (np.abs(np.bincount(domains, minlength=num_domains) - due) < 1 + 1e-6).all()


def test_epochs_are_counted_and_a_repeated_one_is_logged(caplog):
    ledger = Ledger([10, 1000], 1, seed=0, names=["small", "large"])
    with caplog.at_level(logging.INFO, logger="megatron_acodm.blending.repetition"):
        for _ in range(2):
            ledger.append([0.5, 0.5], 10)
        assert not caplog.messages  # used up, but nothing is repeated yet
        ledger.append([0.5, 0.5], 10)
    np.testing.assert_allclose(ledger.epochs(), [1.5, 0.015])
    assert len(caplog.messages) == 1
    assert "domain small repeats: epoch 2 of its 10 sequences" in caplog.text


# Saving and restoring -------------------------------------------------------------------------


def small_ledger(stages: int = 5, **changes) -> Ledger:
    settings = {"sizes": [5, 9, 3], "granule_size": 2, "seed": 17, "names": ["web", "code", "law"]}
    ledger = Ledger(**{**settings, **changes})
    for stage in range(stages):
        ledger.append(np.array([3, 2, 1 + stage]) / (6 + stage), 2 * (3 + stage))
    return ledger


@pytest.mark.parametrize("saved_stages", [0, 1, 4])
def test_a_restored_ledger_continues_as_if_never_interrupted(saved_stages):
    uninterrupted = small_ledger(saved_stages)
    resumed = small_ledger(0 if saved_stages == 4 else 2)  # what it held before is forgotten
    resumed.load_state_dict(uninterrupted.state_dict())
    for ledger in (uninterrupted, resumed):
        for count in (6, 2, 10):
            ledger.append([0.15, 0.05, 0.8], count)
    assert resumed.digest == uninterrupted.digest
    for ours, reference in zip(everything(resumed), everything(uninterrupted), strict=True):
        np.testing.assert_array_equal(ours, reference)


def test_a_saved_state_is_a_snapshot():
    ledger = small_ledger(2)
    state = ledger.state_dict()
    rows = state["rows"].clone()
    ledger.append([1, 0, 0], 2)
    assert torch.equal(state["rows"], rows)
    restored = small_ledger(0)
    restored.load_state_dict(state)
    restored.append([0, 1, 0], 2)
    assert torch.equal(state["rows"], rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 18}, "seed: saved 17, now 18"),
        ({"granule_size": 1}, "granule_size: saved 2, now 1"),
        ({"sizes": [5, 8, 3]}, "domain 'code': saved with 9 sequences, now has 8"),
        ({"names": ["web", "code", "art"]}, "'law': saved, but missing(.|\n)*'art': new"),
        ({"sizes": [5, 9], "names": ["web", "code"]}, "'law': saved, but missing now"),
        ({"sizes": [9, 5, 3], "names": ["code", "web", "law"]}, "order of the domains"),
    ],
)
def test_the_state_of_another_run_is_refused_with_the_difference(changes, message):
    with pytest.raises(ValueError, match=message):
        small_ledger(0, **changes).load_state_dict(small_ledger().state_dict())


@settings(max_examples=50)
@given(stage=st.integers(0, 4), column=st.integers(0, 7), bit=st.integers(0, 62))
def test_an_altered_stage_is_refused_by_number(stage, column, bit):
    state = small_ledger().state_dict()
    state["rows"][stage + 1, column] ^= 1 << bit
    ledger = small_ledger(1)
    before = ledger.digest
    with pytest.raises(ValueError, match=f"damaged at stage {stage}"):
        ledger.load_state_dict(state)
    assert ledger.digest == before


def test_a_torn_or_altered_head_is_refused():
    def check(damage, message):
        state = small_ledger().state_dict()
        damage(state)
        with pytest.raises(ValueError, match=message):
            small_ledger(0).load_state_dict(state)

    check(lambda s: s["carry"].add_(torch.tensor([1, -1, 0])), "every stage is whole")
    check(lambda s: s.update(rows=s["rows"][:-1].contiguous()), "every stage is whole")
    check(lambda s: s.update(base_stage=1), "every stage is whole")
    check(lambda s: s.update(rows=s["rows"][:, :-2].contiguous()), "its rows are int64")
    check(lambda s: s.update(rows=s["rows"].double()), "its rows are float64")
    check(lambda s: s.pop("rows"), "not the state of a ledger")
    check(lambda s: s["fingerprint"].pop("seed"), "not the state of a ledger")
    check(lambda s: s.update(format=99), "format 99")


def test_dropped_stages_change_nothing_that_follows():
    whole, short = small_ledger(6), small_ledger(6)
    short.drop_before(0)
    assert short.first_sample == 0
    short.drop_before(10)  # stages are 6, 8, 10, 12, ... samples
    assert short.first_sample == 6
    restored = small_ledger(0)
    restored.load_state_dict(short.state_dict())
    for ledger in (whole, short, restored):
        ledger.append([0.2, 0.2, 0.6], 8)
    indices = np.arange(6, whole.num_samples)
    for ledger in (short, restored):
        assert ledger.num_stages == whole.num_stages
        assert ledger.digest == whole.digest
        for ours, reference in zip(ledger.locate(indices), whole.locate(indices), strict=True):
            np.testing.assert_array_equal(ours, reference)
        np.testing.assert_array_equal(ledger.counts(7, 20), whole.counts(7, 20))
        with pytest.raises(ValueError, match="before sample 6 are not held"):
            ledger.locate([5])
    short.drop_before(short.num_samples)
    short.append([1, 0, 0], 2)
    assert short.locate([short.num_samples - 1])[0].tolist() == [0]


# Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": []}, "at least one domain"),
        ({"sizes": [3, 0, 2]}, "domain 'code' has 0 sequences"),
        ({"sizes": [3, 1]}, "2 sizes need as many different names"),
        ({"names": ["web", "web", "law"]}, "different names"),
        ({"granule_size": 0}, "granule_size is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_ledger(0, **arguments)


@pytest.mark.parametrize(
    ("weights", "count", "message"),
    [
        ([0.5, 0.5], 4, r"shape \[2\]; 3 domains"),
        ([0.5, -0.1, 0.6], 4, "weight of domain 'code' is -0.1"),
        ([0.5, 0.5, float("nan")], 4, "weight of domain 'law' is nan"),
        ([0.5, 0.5, 0.5], 4, "sum to 1.5"),
        ([0.0, 0.0, 0.0], 4, "sum to 0"),
        ([0.5, 0.5, 0.0], 3, "3 samples is not a positive multiple of the granule size 2"),
        ([0.5, 0.5, 0.0], 0, "0 samples is not a positive multiple"),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused_and_leaves_the_ledger_alone(
    weights, count, message
):
    ledger = small_ledger(1)
    before = ledger.digest
    with pytest.raises(ValueError, match=message):
        ledger.append(weights, count)
    assert (ledger.digest, ledger.num_samples) == (before, 6)


@pytest.mark.parametrize("index", [-1, 6, 10**12])
def test_a_sample_that_is_not_decided_is_refused(index):
    ledger = small_ledger(1)
    with pytest.raises(ValueError, match=f"sample {index} cannot be located"):
        ledger.locate([0, index])
    with pytest.raises(ValueError, match="cannot be located"):
        ledger.weights_at(index)


def test_asking_for_nothing_gives_nothing():
    assert [len(a) for a in small_ledger(0).locate([])] == [0, 0]
    assert small_ledger(1).counts(3, 0).tolist() == [0, 0, 0]
