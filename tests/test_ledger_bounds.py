"""A stage's bounds: a minimum for each domain, a cap on how often it is gone through."""

from __future__ import annotations

import logging
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mixtures import mixtures

from megatron_acodm.blending import DataExhausted, Ledger, adopt, mapping, quotas
from megatron_acodm.blending.mapping import ONE

needs_compiler = pytest.mark.skipif(
    mapping.compiled is None, reason="the compiled ledger was not built"
)


@st.composite
def divisions(draw):
    """Weights, granules, carry, minimum and limits of a stage that can be divided."""
    num_domains = draw(st.integers(1, 12))
    units = quotas.to_units(draw(mixtures(num_domains)))
    carry = draw(
        st.lists(st.integers(-3 * ONE, 3 * ONE), min_size=num_domains, max_size=num_domains)
    )
    granules = draw(st.integers(1, 60))
    limit = st.one_of(st.integers(0, 40), st.just(mapping.MAX_COUNT))
    limits = np.array(draw(st.lists(limit, min_size=num_domains, max_size=num_domains)))
    drawable = limits[units > 0]
    assume(sum(drawable.tolist()) >= granules)
    highest = granules // max(1, int((drawable > 0).sum()))
    return units, granules, np.array(carry), draw(st.integers(0, highest)), limits


def naive_fit(units, granules, minimum, limits) -> list[Fraction]:
    """The proportional scale at which the bounded weights sum to one, found by bisection."""
    wanted = [Fraction(int(u), ONE) for u in units]
    most = [Fraction(min(int(limit), granules), granules) for limit in limits]
    most = [high if unit else Fraction(0) for high, unit in zip(most, units, strict=True)]
    least = [min(Fraction(minimum, granules), high) for high in most]

    def clipped(scale: Fraction) -> list[Fraction]:
        return [min(max(w * scale, a), b) for w, a, b in zip(wanted, least, most, strict=True)]

    low, high = Fraction(0), Fraction(1)
    while sum(clipped(high)) < 1:
        high *= 2
        if high > 2**80:
            break
    for _ in range(160):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clipped(middle)) < 1 else (low, middle)
    return clipped(high)


@needs_compiler
@settings(max_examples=150)
@given(divisions())
def test_compiled_and_numpy_apportion_alike(division):
    for ours, reference in zip(
        mapping.compiled.apportion(*division), quotas.numpy_apportion(*division), strict=True
    ):
        np.testing.assert_array_equal(ours, reference)


@settings(max_examples=150)
@given(divisions())
def test_every_quota_keeps_its_bounds_and_the_carry_accounts_for_all(division):
    units, granules, carry, minimum, limits = division
    followed, quota, after = quotas.divide(*division)
    assert followed.sum() == ONE
    assert quota.sum() == granules
    assert (quota <= limits).all()
    drawable = (units > 0) & (limits > 0)
    assert (quota[drawable] >= np.minimum(minimum, limits[drawable])).all()
    assert (quota[~drawable] == 0).all()
    np.testing.assert_array_equal(after, carry + followed * granules - quota * ONE)


@settings(max_examples=100)
@given(divisions())
def test_weights_out_of_bounds_are_moved_to_the_nearest_in_proportion(division):
    units, granules, _, minimum, limits = division
    followed = quotas.fit_units(units, granules, minimum, limits)
    expected = naive_fit(units, granules, minimum, limits)
    for ours, reference in zip(followed.tolist(), expected, strict=True):
        assert abs(ours - float(reference * ONE)) <= 1e-9 * ONE


@pytest.mark.parametrize("implementation", [quotas.apportion, quotas.numpy_apportion])
def test_a_division_that_cannot_be_made_is_refused(implementation):
    half = quotas.to_units([0.5, 0.5])
    none = np.zeros(2, dtype=np.int64)
    with pytest.raises(ValueError, match="minimum adds up"):
        implementation(half, 3, none, 2, np.array([5, 5]))
    with pytest.raises(ValueError, match="not enough granules"):
        implementation(half, 3, none, 0, np.array([1, 1]))
    with pytest.raises(ValueError, match="not enough granules"):
        implementation(none, 3, none, 0, np.array([5, 5]))


# Minimum --------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_with_a_minimum_every_domain_comes_in_every_stage_and_weights_are_still_followed(data):
    num_domains = data.draw(st.integers(1, 12))
    ledger = Ledger([1000] * num_domains, 2, seed=0)
    due = np.zeros(num_domains)
    constant = data.draw(mixtures(num_domains))
    granules = data.draw(st.integers(num_domains, 40))
    for _ in range(data.draw(st.integers(1, 12))):
        first = ledger.num_samples
        ledger.append(constant, 2 * granules, minimum=1)
        drawn = ledger.counts(first, 2 * granules) // 2
        assert (drawn[np.array(constant) > 1e-14] >= 1).all()
        due += ledger.weights_at(first) * granules
        assert np.abs(due - ledger.drawn / 2).max() < 1 + 1e-9


def test_a_minimum_that_changes_nothing_leaves_the_order_alone():
    plain, bounded = (Ledger([100, 100], 1, seed=3) for _ in range(2))
    for _ in range(5):
        plain.append([0.7, 0.3], 10)
        bounded.append([0.7, 0.3], 10, minimum=1)
    assert plain.digest == bounded.digest


def test_a_minimum_larger_than_the_stage_is_refused_and_leaves_the_ledger_alone():
    ledger = Ledger([10, 10, 10], 2, seed=0)
    with pytest.raises(ValueError, match="2 granules for each of 3 domains.*stage of 5"):
        ledger.append([0.2, 0.3, 0.5], 10, minimum=2)
    assert ledger.num_samples == 0


# Repetition -----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_no_domain_passes_its_cap_and_all_are_drawn_up_to_it(data):
    num_domains = data.draw(st.integers(1, 8))
    granule = data.draw(st.integers(1, 3))
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=num_domains, max_size=num_domains))
    cap = data.draw(st.sampled_from([0.5, 1, 2, 3.25]))
    ledger = Ledger(sizes, granule, seed=5, max_epochs=cap)
    caps = np.array([math.floor(cap * size) // granule for size in sizes]) * granule
    weights = np.array(data.draw(mixtures(num_domains)))
    while True:
        first, count = ledger.num_samples, granule * data.draw(st.integers(1, 20))
        used_up = ledger.remaining() == 0
        try:
            ledger.append(weights, count, minimum=0)
        except DataExhausted:
            break
        assert (ledger.drawn <= caps).all()
        assert (ledger.weights_at(first)[used_up] == 0).all()
    drawable = quotas.to_units(weights) > 0
    assert (caps - ledger.drawn)[drawable].sum() < count
    assert ledger.num_samples == first
    domains, positions = ledger.locate(np.arange(first))
    epochs, sequences = ledger.epoch_and_index(domains, positions)
    for k, size in enumerate(sizes):  # no sequence more often than the cap allows
        mine = np.bincount(sequences[domains == k], minlength=size)
        assert mine.max(initial=0) <= math.ceil(cap)
    assert (epochs < math.ceil(cap)).all()


def test_the_weight_of_a_domain_that_is_used_up_goes_to_the_others_in_proportion(caplog):
    ledger = Ledger([10, 1000, 1000], 1, seed=0, names=["small", "web", "code"], max_epochs=2)
    with caplog.at_level(logging.INFO, logger="megatron_acodm.blending.repetition"):
        for _ in range(4):
            ledger.append([0.5, 0.3, 0.2], 20)
    np.testing.assert_allclose(ledger.weights_at(79), [0, 0.6, 0.4], atol=1e-9)
    np.testing.assert_allclose(ledger.epochs(), [2, ledger.drawn[1] / 1e3, ledger.drawn[2] / 1e3])
    np.testing.assert_allclose(ledger.epochs(before=20), [1, 0.006, 0.004])
    assert "domain small is used up by sample 40, after 2 epochs" in caplog.text


def test_an_exhausted_ledger_says_what_is_left_and_stays_as_it_was():
    ledger = Ledger([10, 5], 2, seed=0, max_epochs=1)
    ledger.append([0.5, 0.5], 8)
    before = ledger.digest
    with pytest.raises(DataExhausted, match="gone through 1 times.*3 granules are left.*needs 4"):
        ledger.append([0.5, 0.5], 8)
    assert ledger.digest == before
    ledger.append([0.5, 0.5], 6)
    assert ledger.remaining().tolist() == [0, 0]


def test_a_repetition_that_is_an_error_names_the_domain():
    ledger = Ledger([4, 100], 1, seed=0, names=["law", "web"], max_epochs=1, stop_at_cap=True)
    ledger.append([0.5, 0.5], 8)
    with pytest.raises(DataExhausted, match="law .4 sequences. would be gone through more than 1"):
        ledger.append([0.5, 0.5], 8)
    ledger.append([0.0, 1.0], 8)  # nothing of it is asked for


@pytest.mark.parametrize("max_epochs", [0, -1, math.inf, math.nan])
def test_an_impossible_cap_is_refused(max_epochs):
    with pytest.raises(ValueError, match="max_epochs is"):
        Ledger([1], 1, seed=0, max_epochs=max_epochs)


def test_a_cap_may_change_when_a_run_is_resumed():
    first = Ledger([6, 6], 1, seed=0, max_epochs=1)
    first.append([0.5, 0.5], 12)
    longer = Ledger([6, 6], 1, seed=0, max_epochs=2)
    longer.load_state_dict(first.state_dict())
    longer.append([0.5, 0.5], 12)
    assert longer.remaining().tolist() == [0, 0]


# Other domains --------------------------------------------------------------------------------


def test_domains_that_stay_go_on_behind_their_last_sequence_and_new_ones_start():
    old = Ledger([50, 40, 30], 2, seed=9, names=["web", "code", "law"])
    for _ in range(6):
        old.append([0.5, 0.3, 0.2], 12)
    new = Ledger([20, 50, 30, 45], 2, seed=9, names=["math", "web", "law", "code"])
    adopt(new, old.state_dict(), 48, kept={"web", "law"})  # code has other data now
    assert (new.num_samples, new.num_stages) == (48, 4)
    drawn = dict(zip(old.names, old.drawn_before(48).tolist(), strict=True))
    assert new.drawn.tolist() == [0, drawn["web"], drawn["law"], 0]
    new.append([0.25] * 4, 16)
    domains, positions = new.locate(np.arange(48, 64))
    for k, name in enumerate(new.names):
        start = drawn[name] if name in ("web", "law") else 0
        assert sorted(positions[domains == k].tolist()) == list(range(start, start + 4))
    with pytest.raises(ValueError, match="sample 47 cannot be located"):
        new.locate([47])
    restored = Ledger(new.sizes, 2, seed=9, names=new.names)
    restored.load_state_dict(new.state_dict())
    assert restored.digest == new.digest
    assert restored.counts(48, 16).tolist() == [4, 4, 4, 4]


def test_only_a_sound_ledger_is_adopted_and_only_between_stages():
    old = Ledger([50, 40], 2, seed=9)
    old.append([0.5, 0.5], 12)
    new = Ledger([50], 2, seed=9)
    with pytest.raises(ValueError, match="no stage of the saved ledger starts at sample 10"):
        adopt(new, old.state_dict(), 10, kept=())
    damaged = old.state_dict()
    damaged["rows"][1, 1] += 1
    with pytest.raises(ValueError, match="damaged at stage 0"):
        adopt(new, damaged, 12, kept=())
    with pytest.raises(ValueError, match="not the state of a ledger"):
        adopt(new, {}, 12, kept=())
    assert new.num_samples == 0
