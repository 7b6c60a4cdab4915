"""The estimator that a config chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_acodm.alignment.captured import CapturedEstimator
from megatron_acodm.alignment.estimator import Estimator
from megatron_acodm.alignment.exact import ExactEstimator
from megatron_acodm.alignment.sampled import SampledEstimator
from megatron_acodm.alignment.sketch import SketchEstimator
from megatron_acodm.config import AlignmentConfig


def build_estimator(
    config: AlignmentConfig,
    shapes: Sequence[Sequence[int]],
    num_domains: int,
    num_extra: int,
    device: torch.device | str,
) -> Estimator:
    """The estimator that a config names.

    Args:
        config: names the estimator and says how large it is.
        shapes: of each selected parameter (shard) whose gradient this rank contributes. Empty on a
            rank that holds none, say a pipeline stage without a selected layer.
        num_domains: K.
        num_extra: further float32 numbers per step that travel in the same reduction.
        device: where gradients live.

    Raises:
        ValueError: a size is out of range.
    """
    numels = [math.prod(shape) for shape in shapes]
    m, seed = config.sketch_size, config.seed
    if config.estimator == "sketch":
        return SketchEstimator(numels, num_domains, num_extra, device, m, seed)
    if config.estimator == "captured":
        width = config.captured_width
        return CapturedEstimator(shapes, num_domains, num_extra, device, m, width, seed)
    if config.coordinates is not None:
        share = config.coordinates
        return SampledEstimator(numels, num_domains, num_extra, device, share, seed)
    return ExactEstimator(numels, num_domains, num_extra, device)
