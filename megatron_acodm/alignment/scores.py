"""From products of gradient contributions to the alignment of mean gradients."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def mean_gradient_scores(
    products: ArrayLike, sq_norms: ArrayLike, share: ArrayLike, scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The importance correction: turn contributions to a batch into mean gradients, once.

    A step's accumulated gradient of domain i is its contribution ``r_i = scale a_i g_i``: its
    mean gradient g_i in proportion to its realised share a_i of the batch. Hence
    ``W_i = <r_i, sum_{j != i} r_j> = scale^2 a_i <g_i, sum_{j != i} a_j g_j>``, and dividing by
    ``scale^2 a_i`` leaves the alignment of g_i with the batch as drawn. It must be done no more
    than once: after another division by a_i, ``sum_i a_i w_i`` would not depend on the mixture.

    Args:
        products: [K] ``W_i``, summed over every rank's parameters.
        sq_norms: [K] ``||r_i||^2``, likewise.
        share: [K] realised share of each domain in the step's batch, each in [0, 1].
        scale: what every gradient was multiplied by (loss scale, and the like).

    Returns:
        alignment: [K] ``w_i = <g_i, sum_{j != i} a_j g_j>``, nan where the share is 0.
        sq_norm: [K] ``||g_i||^2``, nan where the share is 0.

    Raises:
        ValueError: shapes differ, a share lies outside [0, 1], or the scale is not positive.
    """
    W = np.asarray(products, dtype=np.float64)
    squares = np.asarray(sq_norms, dtype=np.float64)
    a = np.asarray(share, dtype=np.float64)
    if not (W.ndim == 1 and W.shape == squares.shape == a.shape):
        raise ValueError(
            f"products, sq_norms and share have shapes {W.shape}, {squares.shape} and {a.shape}; "
            "each must be [domains]"
        )
    if not np.all((a >= 0) & (a <= 1 + 1e-6)):
        raise ValueError(f"share is {a.tolist()}; each domain's share of the batch lies in [0, 1]")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale is {scale}; gradients are multiplied by a positive finite number")
    drawn = np.where(a > 0, a, np.nan)
    # Divided step by step: the square of a loss scale times a small share need not be a float.
    return W / scale / scale / drawn, squares / scale / scale / drawn / drawn


def mean_gradient_gram(products: ArrayLike, share: ArrayLike, scale: float) -> NDArray[np.float64]:
    """The same correction for all products of the contributions.

    Args:
        products: [K, K] ``<r_i, r_j>``, summed over every rank's parameters.
        share: [K] realised share of each domain in the step's batch.
        scale: what every gradient was multiplied by.

    Returns:
        [K, K] ``<g_i, g_j>``, nan where a share is 0.
    """
    a = np.asarray(share, dtype=np.float64)
    drawn = scale * np.where(a > 0, a, np.nan)
    return np.asarray(products, dtype=np.float64) / drawn[:, None] / drawn


def mean_gradient_affinity(
    products: ArrayLike, share: ArrayLike, scale: float
) -> NDArray[np.float64]:
    """The same correction for products with averages, which are of mean gradients already.

    Args:
        products: [K, K] ``<r_i, m_j>``, summed over every rank's parameters.
        share: [K] realised share of each domain in the step's batch.
        scale: what every gradient was multiplied by.

    Returns:
        [K, K] ``<g_i, m_j>``, nan in the rows of domains whose share is 0.
    """
    a = np.asarray(share, dtype=np.float64)
    drawn = scale * np.where(a > 0, a, np.nan)
    return np.asarray(products, dtype=np.float64) / drawn[:, None]
