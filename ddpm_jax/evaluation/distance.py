"""Frechet distances of features, between sets of images or what is stored of them: FID's formula, in float64."""

import dataclasses

import numpy as np
from jaxtyping import Float

from ddpm_jax.errors import InputError

CHUNK_ROWS = 4096  # features are brought to float64 in pieces of this size


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of a set of features."""

    mean: Float[np.ndarray, " F"]
    """Float64."""
    covariance: Float[np.ndarray, "F F"]
    """Float64, divided by N - 1."""
    count: int | None = None
    """N, the number of images; None where a file doesn't tell it."""


def moments(features: Float[np.ndarray, "N F"]) -> Moments:
    """Mean and covariance of features, in float64.

    Raises:
        InputError: fewer than two images.
    """
    count, width = features.shape
    if count < 2:
        raise InputError(f"a covariance needs 2 or more images, not features of shape {features.shape}")
    mean = features.mean(axis=0, dtype=np.float64)
    products = np.zeros((width, width))
    for start in range(0, count, CHUNK_ROWS):
        centred = features[start : start + CHUNK_ROWS] - mean
        products += centred.T @ centred
    return Moments(mean, products / (count - 1), count)


def frechet_distance(first: Float[np.ndarray, "N F"], second: Float[np.ndarray, "M F"]) -> float:
    """The Frechet distance between Gaussians with the mean and covariance of two feature sets, see `moments_distance`.

    Like FID it is a squared distance, and too large for few images: compare sets of one size only.

    Raises:
        InputError: fewer than two images in a set, or features of another number in each.
    """
    if min(len(first), len(second)) < 2 or first.shape[1] != second.shape[1]:
        raise InputError(f"two sets of 2 or more images with the same features are needed: {first.shape}, {second.shape}")
    return moments_distance(moments(first), moments(second))


def moments_distance(first: Moments, second: Moments) -> float:
    """The Frechet distance between Gaussians with the mean m and covariance C,

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)),

    Eq. 6 of Heusel et al. (2017), arXiv:1706.08500. With C = F F^T the eigenvalues of C1 C2 are the squared singular values of
    F1^T F2, so that the trace of the root is their sum: no root of a matrix is taken, and a covariance of fewer images than
    features, which has no full rank, loses no digits.

    Raises:
        InputError: features of another number in each.
    """
    if first.mean.shape != second.mean.shape:
        raise InputError(f"moments of {len(first.mean)} and of {len(second.mean)} features can't be compared")
    overlap = np.linalg.svd(_factor(first.covariance).T @ _factor(second.covariance), compute_uv=False).sum()
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(np.square(first.mean - second.mean).sum() + traces - 2.0 * overlap)


def _factor(covariance: Float[np.ndarray, "F F"]) -> Float[np.ndarray, "F R"]:
    """F with F F^T = C, of as many columns as C has eigenvalues that are more than rounding."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])
