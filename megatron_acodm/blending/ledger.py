"""The append-only ledger: which domain, and which sequence of it, every sample of a run is."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray

from megatron_acodm.blending import integrity, mapping, quotas
from megatron_acodm.blending.live import LedgerReader, StageRing
from megatron_acodm.blending.mapping import MAX_COUNT, ONE, Int32Array, Int64Array
from megatron_acodm.blending.repetition import log_repetition


class Ledger:
    """An append-only list of stages; a stage says how many of its samples each domain gives.

    A sample's domain and sequence are a pure function of (ledger, global sample index), so the
    order of the data depends on nothing else: not on workers, prefetching, data-parallel size,
    or where the run was resumed. Replicas that append the same weights are identical on any
    hardware; ``digest`` tells at once whether two are.

    **Counts.** Weights and carries are integers, so the carries of all domains sum to exactly
    zero after any number of stages. Under constant weights every domain stays less than one
    granule from its due sum of weights, after every granule (``quotas.numpy_apportion``), and
    however a stretch of constant weights is cut into stages. Under weights that change at will,
    no rule that cannot see the future guarantees that: by always giving the domains that were
    just served a weight of zero, one can force a lag of 1/2 + 1/3 + ... + 1/K granules. For
    weights that drift, a granule is what one sees. A domain of weight 0 is never drawn and keeps
    what it is owed.

    **Bounds.** A stage may owe each domain a minimum, and a domain may be gone through only so
    often (``max_epochs``). Weights that cannot be followed within these bounds are moved to the
    nearest that can (``quotas.fit_units``), and it is those that the ledger holds.

    **Memory.** 16 K + 16 bytes a stage: 368 for K = 22, 0.37 GB for 10^6 stages; the array
    grows by doubling. ``drop_before`` releases stages that are no longer asked for.
    """

    def __init__(
        self,
        sizes: Sequence[int] | Int64Array,
        granule_size: int,
        seed: int,
        names: Sequence[str] | None = None,
        max_epochs: float | None = None,
        stop_at_cap: bool = False,
    ) -> None:
        """Start an empty ledger.

        Args:
            sizes: [K] sequences per epoch of each domain.
            granule_size: consecutive samples that share a domain, usually the micro-batch size.
            seed: of all shuffling, in [0, 2^63).
            names: [K] domains; they key each domain's order. ``domain 0`` and so on by default.
            max_epochs: how often a domain may be gone through, at least a granule; None: without
                end. A domain that has no whole granule left is not drawn any more.
            stop_at_cap: refuse a stage that would pass a domain's cap, instead of drawing more
                from the others.

        Raises:
            ValueError: for an empty domain, a name given twice, or a value out of range.
        """
        self.sizes = np.array(sizes, dtype=np.int64)
        self.granule_size = int(granule_size)
        self.seed = int(seed)
        self.names = [f"domain {k}" for k in range(len(sizes))] if names is None else list(names)
        self.max_epochs = max_epochs
        self.stop_at_cap = stop_at_cap
        self._check_settings()
        self._streams = np.array([mapping.domain_stream(name) for name in self.names], np.uint64)
        self._rows = np.zeros((64, 2 * self.num_domains + 2), dtype=np.int64)
        self._rows[0, -1] = integrity.first_link(self.fingerprint())
        self._base_stage = 0  # stages dropped
        self._length = 0  # stages held
        self._carry = np.zeros(self.num_domains, dtype=np.int64)
        self._ring: StageRing | None = None
        mapping.warn_if_not_compiled()

    def _check_settings(self) -> None:
        if self.sizes.ndim != 1 or len(self.sizes) == 0:
            raise ValueError(f"sizes must list at least one domain, got {self.sizes.tolist()}")
        if len(self.names) != len(self.sizes) or len(set(self.names)) != len(self.names):
            raise ValueError(
                f"{len(self.sizes)} sizes need as many different names, got {self.names}"
            )
        for name, size in zip(self.names, self.sizes.tolist(), strict=True):
            if not 1 <= size <= MAX_COUNT:
                raise ValueError(
                    f"domain {name!r} has {size} sequences; a domain needs between 1 and "
                    f"{MAX_COUNT}: remove it, or give it more text or a shorter sequence length"
                )
        if self.granule_size < 1:
            raise ValueError(f"granule_size is {self.granule_size}; it must be at least 1")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2^63)")
        if self.max_epochs is not None and not 0 < self.max_epochs < math.inf:
            raise ValueError(f"max_epochs is {self.max_epochs}; it must be positive, or None")

    # What is decided --------------------------------------------------------------------------

    @property
    def num_domains(self) -> int:
        """K."""
        return len(self.sizes)

    @property
    def num_stages(self) -> int:
        """Stages appended so far, dropped ones included."""
        return self._base_stage + self._length

    @property
    def num_samples(self) -> int:
        """Samples decided so far; the next stage starts at this one."""
        return int(self._rows[self._length, 0])

    @property
    def first_sample(self) -> int:
        """The first sample that can still be located; 0 unless stages were dropped."""
        return int(self._rows[0, 0])

    @property
    def drawn(self) -> Int64Array:
        """[K] samples of each domain among the decided ones."""
        return self._cursor(self._length).copy()

    @property
    def digest(self) -> int:
        """A checksum of the settings and all stages; equal in replicas that agree."""
        return int(self._rows[self._length, -1])

    def epochs(self, before: int | None = None) -> NDArray[np.float64]:
        """[K] how often each domain has been gone through, by the samples before one (all)."""
        return self.drawn_before(self.num_samples if before is None else before) / self.sizes

    def drawable(self) -> NDArray[np.bool_]:
        """[K] whether a stage may ask for anything of a domain; a cap that is an error lets it."""
        return (self.remaining() > 0) | self.stop_at_cap

    def remaining(self) -> Int64Array:
        """[K] granules that are left of each domain before its cap."""
        if self.max_epochs is None:
            return np.full(self.num_domains, MAX_COUNT // self.granule_size, dtype=np.int64)
        # 0.29 of 100 sequences are 29, whatever floats make of it.
        caps = [min(int(self.max_epochs * n + 1e-6), MAX_COUNT) for n in self.sizes.tolist()]
        left = np.array(caps, dtype=np.int64) - self._cursor(self._length)
        return np.maximum(left, 0) // self.granule_size

    def append(self, weights: ArrayLike, count: int, minimum: int = 0) -> None:
        """Decide the next ``count`` samples.

        Args:
            weights: [K] share of each domain, non-negative, summing to 1 up to rounding.
            count: samples in the stage, a multiple of ``granule_size``.
            minimum: least granules of each domain that has a weight, as far as it has any left.

        Raises:
            ValueError: for weights that are no mixture, a count that is no whole granules, or a
                minimum that they cannot give.
            DataExhausted: when the domains with a weight have less than ``count`` samples left,
                or, with ``stop_at_cap``, when a domain would pass its cap. Nothing is appended.
        """
        units = quotas.to_units(quotas.checked_mixture(weights, self.names))
        if count < 1 or count % self.granule_size != 0:
            raise ValueError(
                f"a stage of {count} samples is not a positive multiple of the granule size "
                f"{self.granule_size}; choose a global batch size that the micro-batch size divides"
            )
        if self.num_samples + count > MAX_COUNT:
            raise ValueError(f"a ledger holds at most {MAX_COUNT} samples")
        units, quota, carry = self._divide(units, count // self.granule_size, minimum)
        self._grow(self._length + 2)
        row = self._rows[self._length + 1]
        row[0] = self.num_samples + count
        row[1 : 1 + self.num_domains] = units
        drawn = self._cursor(self._length) + quota * self.granule_size
        row[1 + self.num_domains : -1] = drawn
        row[-1] = integrity.link(row, self.digest)
        self._carry = carry
        self._length += 1
        if not dist.is_initialized() or dist.get_rank() == 0:
            before = self._cursor(self._length - 1)
            used_up = ~self.drawable()
            log_repetition(self.num_samples, self.names, self.sizes, before, drawn, used_up)
        if self._ring is not None:
            self._ring.publish(self.num_stages - 1, self._rows[self._length - 1 : self._length + 1])

    def _divide(
        self, units: Int64Array, num_granules: int, minimum: int
    ) -> tuple[Int64Array, Int64Array, Int64Array]:
        """The weights that can be followed [K], granules [K] and carry [K] of a new stage."""
        limits = self.remaining()
        if self.stop_at_cap:
            no_limits = np.full_like(limits, MAX_COUNT)
            division = quotas.divide(units, num_granules, self._carry, minimum, no_limits)
            self._refuse_passing(division[1], limits)
            return division
        try:
            return quotas.divide(units, num_granules, self._carry, minimum, limits)
        except quotas.DataExhausted as error:
            raise quotas.DataExhausted(
                f"every domain that has a weight has been gone through {self.max_epochs:g} times, "
                f"its cap, or will be with less than another step: {error}, of "
                f"{self.granule_size} sequences each"
            ) from error

    def _refuse_passing(self, quota: Int64Array, limits: Int64Array) -> None:
        passed = np.flatnonzero(quota > limits).tolist()
        if passed:
            names = ", ".join(f"{self.names[k]} ({self.sizes[k]} sequences)" for k in passed)
            raise quotas.DataExhausted(
                f"{names} would be gone through more than {self.max_epochs:g} times from sample "
                f"{self.num_samples} on"
            )

    def _grow(self, num_rows: int) -> None:
        if num_rows > len(self._rows):
            rows = np.empty((max(num_rows, 2 * len(self._rows)), self._rows.shape[1]), np.int64)
            rows[: self._length + 1] = self._rows[: self._length + 1]
            self._rows = rows

    def _cursor(self, row: int) -> Int64Array:
        return self._rows[row, 1 + self.num_domains : -1]

    def drop_before(self, index: int) -> None:
        """Forget the stages that end at or before sample ``index``, to save memory."""
        last = bisect.bisect_right(self._rows[: self._length + 1, 0], index) - 1
        if last > 0:
            self._rows = self._rows[last : self._length + 1].copy()
            self._base_stage += last
            self._length -= last

    # Which sample is what ---------------------------------------------------------------------

    def locate(self, indices: ArrayLike) -> tuple[Int32Array, Int64Array]:
        """Domain and position of samples.

        Args:
            indices: global sample indices [N], decided and not dropped.

        Returns:
            Domains [N], and how many samples of its domain come before each [N].

        Raises:
            ValueError: for an index that is not decided yet or was dropped.
        """
        samples = np.ascontiguousarray(indices, dtype=np.int64).reshape(-1)
        if len(samples) == 0:
            return np.empty(0, np.int32), np.empty(0, np.int64)
        for index in (int(samples.min()), int(samples.max())):
            self._check_decided(index)
        return mapping.locate(
            self._rows[: self._length + 1], self._base_stage, self.granule_size, self.seed, samples
        )

    def epoch_and_index(self, domains: ArrayLike, positions: ArrayLike) -> tuple[Any, Any]:
        """Epoch and sequence of samples, from what ``locate`` returns.

        Args:
            domains: [N].
            positions: [N].

        Returns:
            Epochs [N], counted from 0, and indices of sequences in their domains [N], both int64.
        """
        return mapping.epoch_and_index(
            np.ascontiguousarray(domains, dtype=np.int32),
            np.ascontiguousarray(positions, dtype=np.int64),
            self.sizes,
            self._streams,
            self.seed,
        )

    def counts(self, first: int, count: int) -> Int64Array:
        """[K] samples of each domain among samples first to first + count - 1."""
        return self.drawn_before(first + count) - self.drawn_before(first)

    def drawn_before(self, index: int) -> Int64Array:
        """[K] samples of each domain among those before sample ``index``."""
        if index == self.num_samples:
            return self.drawn
        row = self._row_of(index)
        if index == self._rows[row, 0]:
            return self._cursor(row).copy()
        part = np.arange(self._rows[row, 0], index, dtype=np.int64)
        return self._cursor(row) + np.bincount(self.locate(part)[0], minlength=self.num_domains)

    def stage_at(self, index: int) -> tuple[int, int]:
        """First sample and number of samples of the stage that sample ``index`` belongs to."""
        row = self._row_of(index)
        first = int(self._rows[row, 0])
        return first, int(self._rows[row + 1, 0]) - first

    def weights_at(self, index: int) -> NDArray[np.float64]:
        """[K] the weights of the stage that sample ``index`` belongs to; they sum to 1."""
        return self._rows[self._row_of(index) + 1, 1 : 1 + self.num_domains] / ONE

    def _row_of(self, index: int) -> int:
        """The row at which the stage of a sample starts."""
        self._check_decided(index)
        # bisect reads 20 numbers of the column where numpy's searchsorted would copy all of it.
        return bisect.bisect_right(self._rows[: self._length + 1, 0], index) - 1

    def _check_decided(self, index: int) -> None:
        if not self.first_sample <= index < self.num_samples:
            raise ValueError(
                f"sample {index} cannot be located: the ledger holds samples {self.first_sample} "
                f"to {self.num_samples - 1}; append its stage first"
                if index >= self.num_samples
                else f"sample {index} cannot be located: stages before sample "
                f"{self.first_sample} are not held"
            )

    def restart_at(self, stage: int, sample: int, drawn: ArrayLike, digest: int) -> None:
        """Forget everything and start where another ledger had got to; all readers follow.

        Args:
            stage: number of the first stage to come.
            sample: its first sample.
            drawn: [K] samples of each domain that count as drawn before.
            digest: of the other ledger there, on which all digests to come will depend.
        """
        row = np.zeros(self._rows.shape[1], dtype=np.int64)
        row[0] = sample
        row[1 + self.num_domains : -1] = drawn
        row[-1] = integrity.link(row, integrity.first_link(self.fingerprint()) ^ digest)
        self._rows[0] = row
        self._length, self._base_stage = 0, stage
        self._carry = np.zeros(self.num_domains, dtype=np.int64)
        if self._ring is not None:
            self._ring.publish_all(stage, self._rows[:1])

    # Other processes --------------------------------------------------------------------------

    def reader(self, timeout_s: float = 600.0, window: int = 256) -> LedgerReader:
        """A view for data-loading workers, which sees stages appended later.

        Args:
            timeout_s: how long a worker waits for a stage (``blending.stage_timeout_s``).
            window: most recent stages that readers can see; 32 K + 56 bytes each of shared
                memory. All readers of a ledger share the first one's window.
        """
        if self._ring is None:
            self._ring = StageRing(self._rows.shape[1], window)
            self._ring.publish_all(self._base_stage, self._rows[: self._length + 1])
        return LedgerReader(
            self._ring, self.granule_size, self.seed, self.sizes, self._streams, timeout_s
        )

    def close(self) -> None:
        """Tell waiting workers to give up: nothing more will be appended.

        To be called before the data loaders end: torch gives each worker that is still waiting
        five seconds before it ends it by force.
        """
        if self._ring is not None:
            self._ring.close()

    # Saving -----------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a saved ledger to mean the same samples."""
        return {
            "names": list(self.names),
            "sizes": self.sizes.tolist(),
            "granule_size": self.granule_size,
            "seed": self.seed,
            "scheme": mapping.SCHEME,
        }

    def state_dict(self) -> dict[str, Any]:
        """The whole ledger: tensors, integers, strings and lists of those, with checksums."""
        rows = self._rows[: self._length + 1].copy()
        return {
            "format": integrity.FORMAT,
            "fingerprint": self.fingerprint(),
            "base_stage": self._base_stage,
            "rows": torch.from_numpy(rows),
            "carry": torch.from_numpy(self._carry.copy()),
            "checksum": integrity.checksum(self._base_stage, rows, self._carry),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another ledger of the same settings was; all readers follow.

        Raises:
            ValueError: for other domains, sizes, granules or seed (the message lists the
                differences), or a damaged state (it names the first damaged stage).
        """
        rows, carry = integrity.verify(state, self.fingerprint(), self._rows.shape[1])
        base_stage = int(state["base_stage"])
        self._rows, self._length, self._base_stage = rows, len(rows) - 1, base_stage
        self._carry = carry
        if self._ring is not None:
            self._ring.publish_all(base_stage, rows)
