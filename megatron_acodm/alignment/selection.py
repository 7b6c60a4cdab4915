"""Which layers a run looks at, given by relative depth so that it carries over to other depths."""

from __future__ import annotations

import math
from collections.abc import Iterable


def layers_at_depths(depths: Iterable[float], num_layers: int) -> list[int]:
    """The layers at relative depths, counted from 1: ``ceil(depth * num_layers)``.

    Depths 0.75, 0.875 and 1.0 of 16 layers are 12, 14 and 16, the paper's. Depths that fall on
    one layer select it once.

    Args:
        depths: relative depths in (0, 1]; 1 is the last layer.
        num_layers: layers of the whole model.

    Returns:
        Layer numbers, ascending.

    Raises:
        ValueError: there are no layers, or a depth lies outside (0, 1].
    """
    _check_num_layers(num_layers)
    layers = set()
    for depth in depths:
        if not 0.0 < depth <= 1.0:
            raise ValueError(f"depth {depth} is not in (0, 1]; 1 is the last layer")
        # 0.07 * 100 is a little more than 7: such a rounding must not select the next layer.
        layers.add(max(1, math.ceil(depth * num_layers - 1e-9 * num_layers)))
    return sorted(layers)


def probe_layers(num_probes: int, num_layers: int) -> list[int]:
    """A fixed number of layers, counted from 1, evenly spread from the first to the last.

    The number does not depend on the model, so that a state built from them transfers between
    models; where there are fewer layers than probes, layers repeat. One probe looks at the first.

    Raises:
        ValueError: there are no layers, or no probes.
    """
    _check_num_layers(num_layers)
    if num_probes < 1:
        raise ValueError(f"num_probes is {num_probes}; it must be at least 1")
    gaps = max(num_probes - 1, 1)
    return [1 + (2 * i * (num_layers - 1) + gaps) // (2 * gaps) for i in range(num_probes)]


def _check_num_layers(num_layers: int) -> None:
    if num_layers < 1:
        raise ValueError(f"the model has {num_layers} layers; at least 1 is needed")
