"""The arithmetic of blending, as pure functions: where a sample lies.

Each function exists twice, compiled (``csrc/ledger.cpp``) and in numpy, and the two agree bit for
bit; numpy takes over where the extension was not built. Integers only, so every rank computes the
same on any hardware.

**Rows.** S stages over K domains are an int64 array ``[S + 1, 2K + 2]``. Row s + 1 closes stage s:
``[end, units[K], cursor[K], crc]``, where ``end`` is the first sample after the stage, ``units``
its weights in multiples of 1 / ONE, ``cursor`` the samples drawn from each domain before ``end``,
and ``crc`` the ledger's business. Row s therefore tells where stage s starts.

**Permutations.** A Feistel network over the smallest power of two that holds n values, applied
again while its result is n or more ("cycle walking"), permutes [0, n) without any memory (Black
and Rogaway, "Ciphers with arbitrary finite domains", 2002). Eight rounds pass chi-square tests
for n > 16; the few bits of smaller n need 24.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import importlib
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
UInt64Array = NDArray[np.uint64]

SCHEME = 1
"""Version of the mapping; under another one the same ledger means other samples."""

ONE = 1 << 48
"""One granule, or weight 1, in the integer units of weights and carries."""

MAX_COUNT = 1 << 48
"""Most sequences that a domain may have, and most samples that a ledger may hold."""

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_STAGE_STREAM = 0x5354414745
_SMALL_DOMAIN = 16
_ROUNDS = 8
_SMALL_ROUNDS = 24

logger = logging.getLogger(__name__)


def domain_stream(name: str) -> int:
    """The number that keys a domain's order, from its name.

    From the name, not the place in the list: a domain keeps its order when others come or go.
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def numpy_locate(
    rows: Int64Array, base_stage: int, granule_size: int, seed: int, indices: Int64Array
) -> tuple[Int32Array, Int64Array]:
    """Domain and position of samples.

    A stage's granules are dealt to the domains in order, by their quotas, and shuffled by a
    permutation keyed by (seed, stage).

    Args:
        rows: [S + 1, 2K + 2], see above.
        base_stage: number of the stage that row 1 closes.
        granule_size: consecutive samples that share a domain.
        seed: in [0, 2^63).
        indices: global sample indices [N].

    Returns:
        Domains [N], and how many samples of its domain come before each [N].

    Raises:
        ValueError: when an index lies outside the rows.
    """
    num_domains = (rows.shape[1] - 2) // 2
    if len(indices) == 0:
        return np.empty(0, np.int32), np.empty(0, np.int64)
    low, high = int(indices.min()), int(indices.max())
    if low < rows[0, 0] or high >= rows[-1, 0]:
        raise ValueError("an index lies outside the stages given")
    start = bisect.bisect_right(rows[:, 0], low) - 1
    starts = rows[start : bisect.bisect_right(rows[:, 0], high), 0]
    stages, which = np.unique(
        np.searchsorted(starts, indices, side="right") - 1, return_inverse=True
    )
    before, after = rows[start + stages], rows[start + stages + 1]
    cursor = before[:, 1 + num_domains : -1]
    quotas = ((after[:, 1 + num_domains : -1] - cursor) // granule_size).ravel()
    totals = (after[:, 0] - before[:, 0]) // granule_size
    slot, offset = np.divmod(indices - before[which, 0], granule_size)
    keys = _derive_key(seed, _STAGE_STREAM, base_stage + start + stages)
    rank = _permute(slot, totals[which], keys[which])
    # One search over all stages: the granules of stage u have ranks from the totals before it on.
    rank += (np.cumsum(totals) - totals)[which]
    ends = np.cumsum(quotas)
    cell = np.searchsorted(ends, rank, side="right")
    rank_in_domain = rank - (ends - quotas)[cell]
    position = cursor.ravel()[cell] + rank_in_domain * granule_size + offset
    return (cell - which * num_domains).astype(np.int32), position


def numpy_epoch_and_index(
    domains: Int32Array,
    positions: Int64Array,
    sizes: Int64Array,
    streams: UInt64Array,
    seed: int,
) -> tuple[Int64Array, Int64Array]:
    """Epoch and sequence of samples, given their positions in their domains.

    Every epoch of a domain is another permutation of it, keyed by (seed, domain, epoch).

    Args:
        domains: [N].
        positions: [N] samples of the domain before each.
        sizes: [K] sequences per epoch.
        streams: [K] ``domain_stream`` of the domains' names.
        seed: in [0, 2^63).

    Returns:
        Epochs [N] counted from 0, and sequences [N] in [0, size of the domain).

    Raises:
        ValueError: when a domain or a position is out of range.
    """
    if len(domains) and (domains.min() < 0 or domains.max() >= len(sizes) or positions.min() < 0):
        raise ValueError("a domain or position is out of range")
    size = sizes[domains]
    epoch, rank = np.divmod(positions, size)
    return epoch, _permute(rank, size, _derive_key(seed, streams[domains], epoch))


def _finalize(z: UInt64Array) -> UInt64Array:
    """The finalizer of splitmix64: a bijection that flips half the bits for any changed bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _derive_key(seed: int, stream: int | UInt64Array, counter: Int64Array) -> UInt64Array:
    """One 64-bit key for each (seed, stream, counter)."""
    gamma = np.uint64(_GAMMA)
    root = _finalize(np.array([(seed + _GAMMA) & _MASK], dtype=np.uint64))
    key = _finalize(root ^ np.asarray(stream, dtype=np.uint64))
    return _finalize((key + gamma) ^ counter.astype(np.uint64))


def _permute(x: Int64Array, n: Int64Array, key: UInt64Array) -> Int64Array:
    """Where the permutation of [0, n) under ``key`` takes x, element by element."""
    result = x.astype(np.uint64)
    small = n <= _SMALL_DOMAIN
    for rounds, group in ((_SMALL_ROUNDS, small), (_ROUNDS, ~small)):
        todo = np.flatnonzero(group)
        while len(todo):
            walked = _network(result[todo], n[todo], key[todo], rounds)
            result[todo] = walked
            todo = todo[walked >= n[todo].astype(np.uint64)]
    return result.astype(np.int64)


def _network(x: UInt64Array, n: Int64Array, key: UInt64Array, rounds: int) -> UInt64Array:
    """One pass of the Feistel network over the bits that hold n values."""
    bits = np.frexp((n - 1).astype(np.float64))[1].astype(np.uint64)
    one, shift = np.uint64(1), bits >> np.uint64(1)
    low_mask, high_mask = (one << shift) - one, (one << (bits - shift)) - one
    low, high = x & low_mask, x >> shift
    for i in range(1, rounds, 2):
        high = high ^ (_round(low, key, i) & high_mask)
        low = low ^ (_round(high, key, i + 1) & low_mask)
    return (high << shift) | low


def _round(half: UInt64Array, key: UInt64Array, number: int) -> UInt64Array:
    round_key = _finalize(key + np.uint64((number * _GAMMA) & _MASK))
    h = (half ^ round_key) * np.uint64(0xBF58476D1CE4E5B9)
    return ((h ^ (h >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)) >> np.uint64(32)


def _compiled() -> tuple[Any, str]:
    """The extension, or None and the reason."""
    try:
        module = importlib.import_module("megatron_acodm._ledger")
    except ImportError as error:
        return None, str(error)
    if module.SCHEME != SCHEME:
        return None, f"the extension implements scheme {module.SCHEME}, this package {SCHEME}"
    return module, ""


compiled, _why_not_compiled = _compiled()
locate = compiled.locate if compiled else numpy_locate
epoch_and_index = compiled.epoch_and_index if compiled else numpy_epoch_and_index


@functools.cache
def warn_if_not_compiled() -> None:
    """Say once per process that locating samples takes the slow path."""
    if compiled is None:
        logger.warning(
            "The compiled blending ledger is not available (%s): samples are located by numpy, "
            "with the same result but several times slower. Reinstall the package with a C++ "
            "compiler to build it.",
            _why_not_compiled,
        )
