"""The Frechet distance against closed forms and against scipy's root of a general matrix."""

import numpy as np
import pytest
import scipy.linalg
from helpers import one_line_error

from ddpm_jax.evaluation.distance import frechet_distance


def features_with(mean, covariance, num_images=200, seed=0):
    """Features whose sample mean and covariance are exactly the given ones."""
    normal = np.random.default_rng(seed).normal(size=(num_images, len(mean)))
    normal -= normal.mean(axis=0)
    white = normal @ np.linalg.inv(np.linalg.cholesky(np.cov(normal.T).reshape(len(mean), -1))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def random_covariance(generator, dimensions):
    factor = generator.normal(size=(dimensions, dimensions + 3))
    return factor @ factor.T


def test_one_dimension():
    # Between N(m1, s1^2) and N(m2, s2^2) it is (m1 - m2)^2 + (s1 - s2)^2.
    first, second = features_with([1.5], np.array([[4.0]])), features_with([-1.0], np.array([[0.25]]), 300, seed=1)
    np.testing.assert_allclose(frechet_distance(first, second), 2.5**2 + 1.5**2, rtol=1e-10)


def test_covariances_of_common_axes():
    # With common eigenvectors it is |m1 - m2|^2 + sum of (s1 - s2)^2 along them.
    generator = np.random.default_rng(2)
    axes = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    first_sigma, second_sigma = generator.uniform(0.1, 3.0, (2, 6))
    means = generator.normal(size=(2, 6))
    first = features_with(means[0], axes * first_sigma**2 @ axes.T)
    second = features_with(means[1], axes * second_sigma**2 @ axes.T, seed=3)
    expected = np.square(means[0] - means[1]).sum() + np.square(first_sigma - second_sigma).sum()
    np.testing.assert_allclose(frechet_distance(first, second), expected, rtol=1e-9)


@pytest.mark.parametrize("dimensions", [2, 16])
def test_general_covariances(dimensions):
    generator = np.random.default_rng(dimensions)
    means, covariances = generator.normal(size=(2, dimensions)), [random_covariance(generator, dimensions) for _ in range(2)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    first, second = (features_with(m, c, seed=i) for i, (m, c) in enumerate(zip(means, covariances, strict=True)))
    np.testing.assert_allclose(frechet_distance(first, second), expected, rtol=1e-8)
    np.testing.assert_allclose(frechet_distance(second, first), expected, rtol=1e-8)


def test_a_set_is_at_no_distance_from_itself():
    features = np.random.default_rng(4).normal(size=(50, 8)).astype(np.float32)
    # The roots of rounding errors of 1e-16 times the variances: 1e-8.
    assert abs(frechet_distance(features, features[::-1])) < 1e-7


def test_a_shift_counts_squared_even_with_fewer_images_than_features():
    features = np.random.default_rng(5).normal(size=(10, 32))
    np.testing.assert_allclose(frechet_distance(features, features + 2.0), 32 * 4.0, rtol=1e-6)  # roots of rounded zeros


def test_sets_that_can_not_be_compared(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # what a user meets
    one_line_error(frechet_distance, np.zeros((1, 4)), np.zeros((9, 4)), fragments=["2 or more", "(1, 4)"])
    one_line_error(frechet_distance, np.zeros((9, 4)), np.zeros((9, 5)), fragments=["same features", "(9, 5)"])
