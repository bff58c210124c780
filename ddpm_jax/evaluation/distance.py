"""How far two sets of features lie apart."""

import numpy as np
from jaxtyping import Float

from ddpm_jax.errors import InputError


def frechet_distance(first: Float[np.ndarray, "N F"], second: Float[np.ndarray, "M F"]) -> float:
    """The Frechet distance between Gaussians with the mean m and covariance C of two feature sets,

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)),

    Eq. 6 of Heusel et al. (2017), arXiv:1706.08500, in float64. Like FID it is a squared distance, and too large for few
    images: compare sets of one size only. C1 C2 has the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric, so that
    the trace of the root needs no root of a general matrix.

    Raises:
        InputError: fewer than two images in a set, or features of another number in each.
    """
    if min(len(first), len(second)) < 2 or first.shape[1] != second.shape[1]:
        raise InputError(f"two sets of 2 or more images with the same features are needed: {first.shape}, {second.shape}")
    (mean1, cov1), (mean2, cov2) = (_moments(features.astype(np.float64)) for features in (first, second))
    values, vectors = np.linalg.eigh(cov1)
    root1 = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root1 @ cov2 @ root1), 0.0)).sum()
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2.0 * overlap)


def _moments(features: Float[np.ndarray, "N F"]) -> tuple[Float[np.ndarray, " F"], Float[np.ndarray, "F F"]]:
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)
