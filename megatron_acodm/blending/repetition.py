"""Tells, in the log, when a domain starts over or is used up."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_acodm.blending.mapping import Int64Array

logger = logging.getLogger(__name__)


def log_repetition(
    sample: int,
    names: Sequence[str],
    sizes: Int64Array,
    before: Int64Array,
    after: Int64Array,
    used_up: NDArray[np.bool_],
) -> None:
    """Log what a new stage means for the domains.

    From the tenth epoch on, only those with one significant digit: tiny domains would flood the
    log.

    Args:
        sample: number of samples that the run will have drawn by its end.
        names: [K] domains.
        sizes: [K] sequences per epoch.
        before: [K] samples drawn before the stage.
        after: [K] samples drawn after it.
        used_up: [K] whether nothing of the domain may be drawn any more.
    """
    # The epoch, from 1, that the last sample drawn from each domain belongs to.
    old, new = (1 + np.maximum(drawn - 1, 0) // sizes for drawn in (before, after))
    for k in np.flatnonzero(new > old).tolist():
        was, now = str(old[k]), str(new[k])
        if (len(was), was[0]) != (len(now), now[0]):
            logger.info(
                "domain %s repeats: epoch %s of its %d sequences starts by sample %d",
                names[k],
                now,
                sizes[k],
                sample,
            )
    for k in np.flatnonzero((after > before) & used_up).tolist():
        logger.info(
            "domain %s is used up by sample %d, after %.4g epochs; its weight goes to the others",
            names[k],
            sample,
            after[k] / sizes[k],
        )
