"""Precision and recall of images: the share of drawn ones that look real, and of real ones that could be drawn.

Kynkaanniemi et al. (2019), arXiv:1904.06991: a set's manifold is the union of balls around its features, each as large as the
distance to the k-th nearest other one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from ddpm_jax.errors import InputError

BLOCK_DISTANCES = 2**24  # distances in memory at once


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(
    drawn: Float[np.ndarray, "N F"], real: Float[np.ndarray, "M F"], num_neighbours: int = 3
) -> PrecisionRecall:
    """Precision and recall, Eq. 2 and 3 of the paper, in float64 and in blocks of rows.

    Args:
        drawn: features of drawn images.
        real: features of real ones; usually as many.
        num_neighbours: k.

    Raises:
        InputError: no more than k images in a set, or features of another number in each.
    """
    if min(len(drawn), len(real)) <= num_neighbours or drawn.shape[1] != real.shape[1]:
        needed = f"{num_neighbours + 1} or more images with the same features"
        raise InputError(f"precision and recall need two sets of {needed}: {drawn.shape}, {real.shape}")
    middle = real.mean(axis=0, dtype=np.float64)  # distances lose fewer digits around it
    drawn, real = drawn - middle, real - middle
    precision = _inside(drawn, real, _radii(real, num_neighbours)).mean()
    recall = _inside(real, drawn, _radii(drawn, num_neighbours)).mean()
    return PrecisionRecall(float(precision), float(recall))


def _radii(features: Float[np.ndarray, "N F"], num_neighbours: int) -> Float[np.ndarray, " N"]:
    """Squared distance of each to its k-th nearest other one; the nearest of all is itself."""
    blocks = _squared_distances(features, features)
    return np.concatenate([np.partition(block, num_neighbours, axis=1)[:, num_neighbours] for block in blocks])


def _inside(
    points: Float[np.ndarray, "N F"], centres: Float[np.ndarray, "M F"], radii: Float[np.ndarray, " M"]
) -> Bool[np.ndarray, " N"]:
    return np.concatenate([(block <= radii).any(axis=1) for block in _squared_distances(points, centres)])


def _squared_distances(
    points: Float[np.ndarray, "N F"], others: Float[np.ndarray, "M F"]
) -> Iterator[Float[np.ndarray, "R M"]]:
    """Blocks of rows of the matrix [N, M]."""
    lengths = np.square(others).sum(axis=1)
    rows = max(1, BLOCK_DISTANCES // len(others))
    for start in range(0, len(points), rows):
        block = points[start : start + rows]
        yield np.maximum(np.square(block).sum(axis=1)[:, None] + lengths - 2.0 * (block @ others.T), 0.0)
