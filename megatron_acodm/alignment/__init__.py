"""The alignment room: which way did each domain's gradient pull in this step?"""

from megatron_acodm.alignment.average import AverageGradients
from megatron_acodm.alignment.captured import CapturedEstimator
from megatron_acodm.alignment.estimator import Estimator, GradientEstimator
from megatron_acodm.alignment.exact import ExactEstimator
from megatron_acodm.alignment.registry import build_estimator
from megatron_acodm.alignment.sampled import SampledEstimator
from megatron_acodm.alignment.scores import (
    mean_gradient_affinity,
    mean_gradient_gram,
    mean_gradient_scores,
)
from megatron_acodm.alignment.selection import layers_at_depths, probe_layers
from megatron_acodm.alignment.sketch import SketchEstimator

__all__ = [
    "AverageGradients",
    "CapturedEstimator",
    "Estimator",
    "ExactEstimator",
    "GradientEstimator",
    "SampledEstimator",
    "SketchEstimator",
    "build_estimator",
    "layers_at_depths",
    "mean_gradient_affinity",
    "mean_gradient_gram",
    "mean_gradient_scores",
    "probe_layers",
]
