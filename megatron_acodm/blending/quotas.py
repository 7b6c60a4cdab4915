"""How a stage's granules are divided among the domains, as pure functions over integers.

``apportion`` exists twice, compiled (``csrc/ledger.cpp``) and in numpy, and the two agree bit for
bit, so that every rank comes to the same counts on any hardware.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from megatron_acodm.blending.mapping import ONE, Int64Array, compiled

_SUM_TOLERANCE = 1e-3


class DataExhausted(RuntimeError):
    """The domains that a mixture draws from have not enough sequences left for another stage."""


def checked_mixture(weights: ArrayLike, names: Sequence[str]) -> list[float]:
    """Weights [K] as floats.

    Raises:
        ValueError: when they are not one finite, non-negative number for each name, or do not sum
            to 1 up to rounding.
    """
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (len(names),):
        raise ValueError(
            f"weights have the shape {list(values.shape)}; {len(names)} domains need [{len(names)}]"
        )
    for name, value in zip(names, values.tolist(), strict=True):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"the weight of domain {name!r} is {value}; weights must be finite and at least 0"
            )
    total = math.fsum(values.tolist())
    if abs(total - 1) > _SUM_TOLERANCE:
        raise ValueError(f"the weights sum to {total:.6g}, not to 1; normalise them")
    return values.tolist()


def to_units(weights: Sequence[float]) -> Int64Array:
    """Weights [K] of any positive sum as integers [K] that sum to exactly ONE; zeros stay zeros.

    Weights below 1 / ONE (3.6e-15) of the sum become zero.
    """
    # fsum is exact, hence alike on every machine; numpy's sum depends on the vector width.
    total = math.fsum(weights)
    units = np.array([int(weight / total * ONE) for weight in weights], dtype=np.int64)
    units[int(units.argmax())] += ONE - int(units.sum())
    return units


def fit_units(units: Int64Array, num_granules: int, minimum: int, limits: Int64Array) -> Int64Array:
    """The mixture closest in proportions to ``units`` that a stage can follow within its bounds.

    Domains below their minimum are lifted to it and those above their limit lowered to it; the
    others keep their proportions among each other. A domain of weight 0, or without any granule
    left, has none.

    Args:
        units: weights [K], summing to ONE.
        num_granules: granules of the stage, which the bounds must leave possible.
        minimum: least granules of each domain that has a weight.
        limits: [K] most granules of each domain.

    Returns:
        Weights [K], summing to ONE: ``units`` itself where nothing binds.
    """
    least_units = minimum * ONE // num_granules
    if int(limits.min()) >= num_granules and ((units >= least_units) | (units == 0)).all():
        return units  # by far the most stages
    low = np.where((units > 0) & (limits > 0), least_units, 0)
    high = np.array([min(n, num_granules) * ONE // num_granules for n in limits.tolist()])
    low = np.minimum(low, high)
    if (units >= low).all() and (units <= high).all():
        return units
    # In Python's integers, which are exact at any size.
    wanted, least, most = units.tolist(), low.tolist(), high.tolist()
    result = [0] * len(wanted)
    free = [k for k, unit in enumerate(wanted) if unit > 0 and most[k] > 0]
    left = ONE
    while free:
        total = sum(wanted[k] for k in free)
        for k in free:
            result[k] = wanted[k] * left // total
        lifted = [k for k in free if result[k] < least[k]]
        lowered = [k for k in free if result[k] > most[k]]
        gap = sum(least[k] - result[k] for k in lifted)
        surplus = sum(result[k] - most[k] for k in lowered)
        # The larger violation decides the scale of the others, so those on its side are settled.
        settled, bound = (lifted, least) if gap >= surplus else (lowered, most)
        if not settled:
            break
        for k in settled:
            result[k] = bound[k]
            left -= bound[k]
        free = [k for k in free if k not in settled]
    result[max(range(len(result)), key=result.__getitem__)] += ONE - sum(result)
    return np.array(result, dtype=np.int64)


def numpy_apportion(
    units: Int64Array, num_granules: int, carry: Int64Array, minimum: int, limits: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """Divide a stage's granules among the domains.

    Granule after granule, each domain is credited its weight, and the granule goes to the one
    whose entitlement would be a whole granule behind soonest at these weights: earliest deadline
    first, as in Pfair scheduling (Baruah et al., "Proportionate progress", 1996). Under constant
    weights that keeps every domain less than one granule from its due, always; the plain largest
    remainder does not. A domain that is a granule or more behind goes first, furthest first, and
    one that is ahead of its due only when nobody else can. Ties go to the lower domain. The last
    granules go to domains that have not had their minimum.

    Args:
        units: weights [K] of the stage, summing to ONE.
        num_granules: granules to hand out.
        carry: [K] what each domain is owed (negative: is ahead) at the start, in 1 / ONE granules.
        minimum: least granules of each domain that has a weight.
        limits: [K] most granules of each domain, which also bound its minimum.

    Returns:
        Granules of each domain [K], and the carry [K] after the stage, which has the same sum as
        the carry before it.

    Raises:
        ValueError: when minimum and limits leave no way to hand out the granules.
    """
    active = np.flatnonzero(units)
    rates, due, most = units[active], carry[active], limits[active]
    least = np.minimum(minimum, most)
    if least.sum() > num_granules:
        raise ValueError("the minimum adds up to more than the granules")
    if sum(min(num_granules, limit) for limit in most.tolist()) < num_granules or not len(active):
        raise ValueError("the domains with a weight have not enough granules left")
    quota = np.zeros(len(active), dtype=np.int64)
    deadline = (ONE - 1 - due) // rates - 1
    never = np.iinfo(np.int64).max
    for granule in range(num_granules):
        due += rates
        reserved_only = np.maximum(least - quota, 0).sum() == num_granules - granule
        open_ = quota < (least if reserved_only else most)
        best = int(np.where(open_, due, -never).argmax())
        entitled = open_ & (due > 0)
        if due[best] < ONE and entitled.any():
            best = int(np.where(entitled, deadline, never).argmin())
        due[best] -= ONE
        deadline[best] = granule + (ONE - 1 - due[best]) // rates[best]
        quota[best] += 1
    quotas, carries = np.zeros_like(units), carry.copy()
    quotas[active], carries[active] = quota, due
    return quotas, carries


apportion = compiled.apportion if compiled else numpy_apportion


def divide(
    units: Int64Array, num_granules: int, carry: Int64Array, minimum: int, limits: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Fit the weights of a stage into its bounds and hand its granules out.

    Args:
        units: weights [K] that are wished for, summing to ONE.
        num_granules: granules of the stage.
        carry: as ``numpy_apportion`` takes it, like the next two.
        minimum: least granules of each domain that has a weight and any granules left.
        limits: [K] most granules of each domain.

    Returns:
        The weights that the stage follows [K], its granules by domain [K], and the next carry [K].

    Raises:
        ValueError: when the minimum adds up to more than the stage.
        DataExhausted: when the domains with a weight have less granules left than the stage.
    """
    drawable = (units > 0) & (limits > 0)
    fits = 0 <= minimum <= num_granules
    if not fits or int(np.minimum(minimum, limits[drawable]).sum()) > num_granules:
        raise ValueError(
            f"a minimum of {minimum} granules for each of {int(drawable.sum())} domains does not "
            f"fit into a stage of {num_granules}; lower it, or raise the global batch size"
        )
    left = sum(limits[drawable].tolist())
    if left < num_granules:
        raise DataExhausted(f"{left} granules are left, the next step needs {num_granules}")
    units = fit_units(units, num_granules, minimum, limits)
    return units, *apportion(units, num_granules, carry, minimum, limits)
