"""Kernel distances of features: KID, the squared maximum mean discrepancy with a cubic kernel, in float64.

Binkowski et al. (2018), arXiv:1801.01401. Unlike the Frechet distance, its expectation doesn't depend on the number of images.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ddpm_jax.errors import InputError

BLOCK_ROWS = 256  # of a kernel matrix, which is never whole in memory


class KernelDistance(NamedTuple):
    """Estimates of a kernel distance."""

    value: float
    """From all pairs of images: the estimate with the smallest variance."""
    subsets_mean: float
    """Mean over random subsets, as it is usually reported."""
    subsets_deviation: float
    """Standard deviation over the subsets."""
    subset_size: int
    """Images of a subset."""


def kernel_distance(
    first: Float[np.ndarray, "N F"],
    second: Float[np.ndarray, "M F"],
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> KernelDistance:
    """KID of two feature sets, from all their images and over subsets as torch-fidelity draws them.

    Args:
        first: features.
        second: as many for each image.
        num_subsets: subsets, each of `subset_size` images of either set.
        subset_size: at most the number of images of the smaller set; larger ones are cut down to it.
        seed: of the subsets.

    Raises:
        InputError: fewer than two images in a set, or features of another number in each.
    """
    if min(len(first), len(second)) < 2 or first.shape[1] != second.shape[1]:
        raise InputError(f"two sets of 2 or more images with the same features are needed: {first.shape}, {second.shape}")
    first, second = first.astype(np.float64), second.astype(np.float64)
    size = min(subset_size, len(first), len(second))
    generator = np.random.RandomState(seed)  # torch-fidelity's, so that the subsets are the same
    estimates = []
    for _ in range(num_subsets):
        chosen = (generator.choice(len(features), size, replace=False) for features in (first, second))
        estimates.append(discrepancy(*(features[rows] for features, rows in zip((first, second), chosen, strict=True))))
    return KernelDistance(discrepancy(first, second), float(np.mean(estimates)), float(np.std(estimates)), size)


def discrepancy(first: Float[np.ndarray, "N F"], second: Float[np.ndarray, "M F"]) -> float:
    """The unbiased estimate of MMD^2 with the kernel k(x, y) = (x y / F + 1)^3, float64 features, Eq. 3 of the paper.

    The mean of k over pairs of different images of the first set, plus that of the second, less twice that of pairs across.
    """
    within = sum(_within(features) / (len(features) * (len(features) - 1)) for features in (first, second))
    blocks = (first[i : i + BLOCK_ROWS] for i in range(0, len(first), BLOCK_ROWS))
    across = sum(float(_kernel(block, second).sum()) for block in blocks)
    return within - 2.0 * across / (len(first) * len(second))


def _within(features: Float[np.ndarray, "N F"]) -> float:
    """The sum of k over ordered pairs of different images; blocks above the diagonal stand for those below."""
    total = 0.0
    for start in range(0, len(features), BLOCK_ROWS):
        block, rest = features[start : start + BLOCK_ROWS], features[start + BLOCK_ROWS :]
        square = _kernel(block, block)
        total += float(square.sum() - np.trace(square) + 2.0 * _kernel(block, rest).sum())
    return total


def _kernel(first: Float[np.ndarray, "N F"], second: Float[np.ndarray, "M F"]) -> Float[np.ndarray, "N M"]:
    products = first @ second.T
    products /= first.shape[1]
    products += 1.0
    return products * products * products
