"""The classifier: that it learns, that its outputs are one image's own, and that shifts move pixels and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import one_line_error

from ddpm_jax.data.sources import load_packaged
from ddpm_jax.evaluation.classifier import random_shift, train_classifier
from ddpm_jax.models.classifier import Classifier


@pytest.fixture(scope="module")
def garments():
    """Packaged images in an order of their own."""
    image_set = load_packaged("fashion_mnist")
    order = np.random.default_rng(1).permutation(len(image_set.images))
    return image_set.images[order], image_set.labels[order]


@pytest.fixture(scope="module")
def classifier(garments):
    images, labels = garments
    return train_classifier(images[:600], labels[:600], num_epochs=20, channels=16)


def test_it_learns(classifier, garments):
    images, labels = garments
    held_out = slice(600, 1600)
    right = int((classifier.classes(images[held_out]) == labels[held_out]).sum())
    # Guessing gives 10 %; the distance to the nearest class mean of the same 600 images 71 %.
    means = np.stack([images[:600][labels[:600] == k].astype(float).mean(axis=0) for k in range(10)])
    nearest = [np.square(means - image).sum(axis=(1, 2, 3)).argmin() for image in images[held_out]]
    assert right > (nearest == labels[held_out]).sum()


def test_features_decide_the_class(classifier, garments):
    logits, features = classifier.outputs(garments[0][:40])
    layer = classifier.params["logits"]
    assert features.shape == (40, classifier.network.num_features) and features.dtype == np.float32
    expected = features.astype(np.float64) @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)  # logits of size 10, sums of 64 float32 products
    np.testing.assert_array_equal(classifier.features(garments[0][:40]), features)
    np.testing.assert_array_equal(classifier.classes(garments[0][:40]), logits.argmax(axis=1))


def test_outputs_are_those_of_one_image(classifier, garments):
    images = garments[0][:260]  # more than a batch, and no multiple of it
    alone = np.concatenate([classifier.features(images[i : i + 1]) for i in (0, 249, 250, 259)])
    # Which row of a batch an image has may change its last bits, on processors that work on several rows at once.
    np.testing.assert_allclose(classifier.features(images)[[0, 249, 250, 259]], alone, rtol=1e-4, atol=1e-5)
    others = np.concatenate([images[:1], images[:0:-1]])
    np.testing.assert_array_equal(classifier.features(others)[0], classifier.features(images)[0])


def test_bytes_and_floats_are_the_same_images(classifier, garments):
    images = garments[0][:8]
    floats = (images / 127.5 - 1).astype(np.float32)
    np.testing.assert_allclose(classifier.features(floats), classifier.features(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 7, 3), (32, 32, 3), (1, 1, 1)])
def test_any_image_shape(shape):
    network = Classifier(num_classes=4, channels=8)
    images = jnp.zeros((2, *shape))
    params = network.init(jax.random.key(0), images)["params"]
    logits, features = network.apply({"params": params}, images)
    assert logits.shape == (2, 4) and features.shape == (2, 64) and bool(jnp.isfinite(logits).all())


@pytest.mark.heavy
def test_same_seed_same_classifier(garments):
    images, labels = garments[0][:64], garments[1][:64]
    first, again, other = (train_classifier(images, labels, seed, num_epochs=1, channels=8) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.features(images), again.features(images))
    assert not np.array_equal(first.features(images), other.features(images))


def test_random_shift_moves_every_image_alike_in_all_directions():
    images = np.random.default_rng(0).uniform(-1, 1, (4000, 4, 5, 2)).astype(np.float32)
    shifted = np.asarray(random_shift(jax.random.key(0), jnp.asarray(images), 1))
    counts = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            expected = np.full_like(images, -1.0)
            rows, columns = range(max(0, down), min(4, 4 + down)), range(max(0, right), min(5, 5 + right))
            for i in rows:
                for j in columns:
                    expected[:, i, j] = images[:, i - down, j - right]
            counts.append(int((shifted == expected).all(axis=(1, 2, 3)).sum()))
    assert sum(counts) == len(images)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("labels", [np.zeros(39, np.int32), np.full(40, -1), np.zeros((40, 1), np.int32)])
def test_labels_that_do_not_fit(labels, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # what a user meets
    one_line_error(train_classifier, np.zeros((40, 8, 8, 1), np.uint8), labels, fragments=["40 images", "class"])


def test_too_few_images():
    images = np.zeros((31, 8, 8, 1), np.uint8)
    one_line_error(train_classifier, images, np.zeros(31, np.int32), fragments=["32 or more", "31"])
