"""KID, Inception Score, precision and recall against their definitions written out as loops; moments of few images."""

import jaxtyping
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from helpers import one_line_error

from ddpm_jax.evaluation import kernel_distance as kid_module
from ddpm_jax.evaluation import precision_recall as pr_module
from ddpm_jax.evaluation.distance import Moments, frechet_distance, moments, moments_distance
from ddpm_jax.evaluation.inception_score import inception_score
from ddpm_jax.evaluation.kernel_distance import discrepancy, kernel_distance
from ddpm_jax.evaluation.precision_recall import precision_recall
from ddpm_jax.evaluation.scores import METRICS, Reference, score


@pytest.fixture
def two_sets():
    generator = np.random.default_rng(0)
    return generator.normal(size=(23, 5)), generator.normal(0.3, 1.2, size=(17, 5))


def test_moments_are_numpys():
    features = np.random.default_rng(1).normal(3.0, 2.0, size=(5000, 6)).astype(np.float32)  # more than a chunk
    found = moments(features)
    np.testing.assert_allclose(found.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-12)
    assert found.count == 5000


@pytest.mark.parametrize(("first_count", "second_count"), [(8, 8), (8, 200), (200, 8), (40, 41)])
def test_the_frechet_distance_of_rank_deficient_covariances_is_scipys(first_count, second_count):
    """Fewer images than features: the root of the singular product is taken in a basis where it is regular."""
    width, generator = 40, np.random.default_rng(first_count)
    first, second = generator.normal(size=(first_count, width)), generator.normal(0.2, 1.5, size=(second_count, width))
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    # tr (C1 C2)^(1/2) = tr (R^T C2 R)^(1/2) for C1 = R R^T, R = X^T / sqrt(N - 1) in a basis of its columns.
    root = scipy.linalg.orth((first - first.mean(axis=0)).T)
    small = scipy.linalg.sqrtm(root.T @ covariances[0] @ root)
    product = small @ root.T @ covariances[1] @ root @ small
    values = np.linalg.eigvalsh(product)
    expected = np.square(first.mean(axis=0) - second.mean(axis=0)).sum() + np.trace(covariances[0] + covariances[1])
    rank = min(first_count - 1, second_count - 1, width)
    expected -= 2 * np.sqrt(np.sort(values)[-rank:]).sum()
    np.testing.assert_allclose(frechet_distance(first, second), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(second, first), expected, rtol=1e-9)


def test_images_that_are_all_the_same_have_a_distance():
    features = np.ones((5, 3))
    np.testing.assert_allclose(frechet_distance(features, features + 1.0), 3.0)


def test_moments_of_other_features_can_not_be_compared():
    one, other = Moments(np.zeros(3), np.eye(3)), Moments(np.zeros(4), np.eye(4))
    one_line_error(moments_distance, one, other, fragments=["3", "4"])


def test_the_discrepancy_is_a_mean_over_pairs(two_sets, monkeypatch):
    monkeypatch.setattr(kid_module, "BLOCK_ROWS", 7)
    first, second = two_sets

    def kernel(x, y):
        return (x @ y / len(x) + 1.0) ** 3

    expected = np.mean([kernel(x, y) for i, x in enumerate(first) for j, y in enumerate(first) if i != j])
    expected += np.mean([kernel(x, y) for i, x in enumerate(second) for j, y in enumerate(second) if i != j])
    expected -= 2 * np.mean([kernel(x, y) for x in first for y in second])
    np.testing.assert_allclose(discrepancy(first, second), expected, rtol=1e-12)


def test_subsets_scatter_around_all_pairs(two_sets):
    found = kernel_distance(*two_sets, num_subsets=2000, subset_size=12)
    error = found.subsets_deviation / 2000**0.5
    assert abs(found.subsets_mean - found.value) < 4 * error
    assert found.subset_size == 12
    assert kernel_distance(*two_sets, num_subsets=1).subset_size == 17


def test_the_inception_score_is_between_one_and_the_number_of_classes():
    sure = np.kron(np.ones((20, 1)), 100.0 * np.eye(5))  # each class equally often, with certainty
    np.testing.assert_allclose(inception_score(sure, num_parts=1), (5.0, 0.0), rtol=1e-12)
    np.testing.assert_allclose(inception_score(np.ones((100, 5))), (1.0, 0.0), atol=1e-12)


def test_the_inception_score_by_entropies():
    """exp(H(mean of p) - mean of H(p)), in one part."""
    logits = np.random.default_rng(2).normal(0, 2, size=(50, 7))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.exp(scipy.stats.entropy(p.mean(axis=0)) - scipy.stats.entropy(p, axis=1).mean())
    np.testing.assert_allclose(inception_score(logits, num_parts=1).value, expected, rtol=1e-12)


def test_precision_and_recall_by_all_distances(two_sets, monkeypatch):
    monkeypatch.setattr(pr_module, "BLOCK_DISTANCES", 50)
    drawn, real = two_sets[0] + 1.0, two_sets[1]

    def share_inside(points, centres):
        radii = [np.sort(np.linalg.norm(centres - centre, axis=1))[3] for centre in centres]
        return np.mean([any(np.linalg.norm(centres - point, axis=1) <= radii) for point in points])

    found = precision_recall(drawn, real)
    np.testing.assert_allclose(found, (share_inside(drawn, real), share_inside(real, drawn)), rtol=1e-12)
    assert 0 < found.precision < 1 and 0 < found.recall < 1


def test_one_mode_of_two_has_precision_without_recall():
    generator = np.random.default_rng(3)
    mode = generator.normal(size=(100, 4))
    real = np.concatenate([mode, generator.normal(50.0, 1.0, size=(100, 4))])
    precision, recall = precision_recall(mode + 1e-3, real)
    assert precision == 1.0
    assert recall == 0.5


@pytest.mark.parametrize("metric", [kernel_distance, precision_recall])
def test_sets_that_can_not_be_compared(metric, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user meets
    one_line_error(metric, np.zeros((1, 4)), np.zeros((9, 4)), fragments=["(1, 4)"])
    one_line_error(metric, np.zeros((9, 4)), np.zeros((9, 5)), fragments=["same features", "(9, 5)"])


def test_too_few_images_for_a_score():
    one_line_error(inception_score, np.zeros((9, 4)), fragments=["10 parts", "9"])
    one_line_error(moments, np.zeros((1, 4)), fragments=["2 or more"])


@pytest.mark.parametrize("name", METRICS)
def test_the_fewest_images_of_a_metric_are_enough_and_one_less_is_not(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user meets
    metric, features = METRICS[name], np.random.default_rng(0).normal(size=(20, 5))

    def score_of(num_drawn, num_real):
        reference = Reference({}, {metric.network: {metric.output: features[:num_real]}}, {})
        return score(name, {metric.output: features[-num_drawn:]}, reference)

    assert all(np.isfinite(value) for value in score_of(metric.fewest, metric.fewest).values())
    one_line_error(score_of, metric.fewest - 1, 20, fragments=["images"])
    if metric.needs != "nothing":
        one_line_error(score_of, 20, metric.fewest - 1, fragments=["images"])
