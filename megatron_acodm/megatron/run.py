"""The sizes of a run: how many steps, of how many sequences each."""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class RunShape:
    """What fixes, with the ledger, which samples a step draws."""

    train_iters: int
    """Steps of the run."""

    global_batch_size: int
    """Sequences a step, once the ramp-up is over."""

    micro_batch_size: int
    """Sequences a micro-batch."""

    seed: int = 1234
    """Seed of the data order."""

    rampup_batch_size: tuple[int, int, int] | None = None
    """Megatron's ramp-up: first batch size, increment, and the samples until the last of them."""

    def __post_init__(self) -> None:
        for name in ("train_iters", "global_batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.rampup_batch_size is not None:
            start, increment, samples = self.rampup_batch_size
            if not (1 <= start < self.global_batch_size and increment >= 1 and samples >= 1):
                raise ValueError(
                    f"rampup_batch_size is {start} {increment} {samples}; it takes a first batch "
                    f"size below the global one ({self.global_batch_size}), an increment and a "
                    "number of samples of at least 1"
                )
            if (self.global_batch_size - start) % increment != 0:
                raise ValueError(
                    f"rampup_batch_size does not get from {start} to {self.global_batch_size} in "
                    f"steps of {increment}; choose an increment that divides their difference"
                )
        self.check_divisible(self.micro_batch_size, "the micro-batch size")

    def check_divisible(self, unit: int, meaning: str) -> None:
        """Refuse batch sizes of the run that are no multiple of ``unit``.

        Raises:
            ValueError: with the numbers.
        """
        sizes = {"global batch size": self.global_batch_size}
        if self.rampup_batch_size is not None:
            sizes["first batch size of the ramp-up"] = self.rampup_batch_size[0]
            sizes["increment of the ramp-up"] = self.rampup_batch_size[1]
        for name, size in sizes.items():
            if size % unit != 0:
                raise ValueError(
                    f"{name} {size} is not a multiple of {meaning} = {unit}; the next that fits is "
                    f"{(size // unit + 1) * unit}"
                )

    def batch_size(self, consumed_samples: int) -> int:
        """Sequences of the step that starts at this sample, as Megatron's calculator has it."""
        if self.rampup_batch_size is None:
            return self.global_batch_size
        start, increment, samples = self.rampup_batch_size
        increments = (self.global_batch_size - start) // increment
        return start + increment * min(increments, int(consumed_samples / (samples / increments)))

    def samples_before(self, iteration: int) -> int:
        """Sequences of the first ``iteration`` steps."""
        ramp = self._ramp_up
        if iteration < len(ramp):
            return ramp[iteration]
        return ramp[-1] + (iteration - len(ramp) + 1) * self.global_batch_size

    def steps_within(self, samples: int) -> int:
        """The most steps that draw no more than this many sequences."""
        ramp = self._ramp_up
        if samples < ramp[-1]:
            return bisect.bisect_right(ramp, samples) - 1
        return len(ramp) - 1 + (samples - ramp[-1]) // self.global_batch_size

    @property
    def train_samples(self) -> int:
        """Sequences of the whole run."""
        return self.samples_before(self.train_iters)

    @functools.cached_property
    def _ramp_up(self) -> list[int]:
        """First samples of the steps up to the first one of full size."""
        starts = [0]
        while (size := self.batch_size(starts[-1])) < self.global_batch_size:
            starts.append(starts[-1] + size)
        return starts
