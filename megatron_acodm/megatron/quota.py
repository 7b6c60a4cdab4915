"""Resolves the granule and the minimum quota of a run, and warns of domains too small for it."""

from __future__ import annotations

import logging

from megatron_acodm.blending import Ledger
from megatron_acodm.config import AlignmentConfig, BlendingConfig
from megatron_acodm.megatron.run import RunShape

logger = logging.getLogger(__name__)


def warn_of_small_domains(ledger: Ledger, config: BlendingConfig) -> None:
    """Tell of domains that a cap leaves less than one granule of."""
    if config.max_epochs is None:
        return
    sizes = zip(ledger.names, ledger.sizes.tolist(), strict=True)
    small = [name for name, size in sizes if config.max_epochs * size < ledger.granule_size]
    if small:
        logger.warning(
            "%s: fewer sequences than a granule of %d under blending.repetition %r, so never "
            "drawn; use granule 'sequence', a smaller micro-batch, or a higher cap",
            ", ".join(small),
            ledger.granule_size,
            config.repetition,
        )


def granule_size(
    blending: BlendingConfig, alignment: AlignmentConfig, run: RunShape, needs_alignment: bool
) -> int:
    """Consecutive samples that share a domain.

    Raises:
        ValueError: when the policy cannot tell the gradients of such granules apart.
    """
    if blending.granule == "micro-batch":
        return run.micro_batch_size
    if needs_alignment and run.micro_batch_size > 1 and alignment.estimator != "captured":
        raise ValueError(
            "blending.granule is 'sequence' and the policy compares gradients, which estimator "
            f"{alignment.estimator!r} does not tell apart in micro-batches of "
            f"{run.micro_batch_size} sequences of several domains; use alignment.estimator "
            "'captured', the granule 'micro-batch', or a micro-batch size of 1"
        )
    return 1


def minimum_quota(
    config: BlendingConfig, num_domains: int, num_granules: int, needs_alignment: bool
) -> int:
    """Least granules of every domain in a full-size step.

    Args:
        config: what the user asked for.
        num_domains: K.
        num_granules: of a full-size step.
        needs_alignment: whether the policy compares gradients, which a step shows only of the
            domains that it draws.

    Raises:
        ValueError: when what was asked for does not fit into a step.
    """
    asked = config.minimum_quota
    if asked is not None:
        if asked * num_domains > num_granules:
            raise ValueError(
                f"blending.minimum_quota {asked} for {num_domains} domains needs "
                f"{asked * num_domains} granules, a step has {num_granules}; lower it, raise the "
                "global batch size, or lower the micro-batch size"
            )
        return asked
    return int(needs_alignment and 10 * num_domains <= num_granules)
