"""Label dropout: how often, what it does to a batch, and what it leaves alone."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from networks import OnePicture

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, TrainConfig
from ddpm_jax.data.pipeline import Batch
from ddpm_jax.models import UNet
from ddpm_jax.parallel import make_mesh
from ddpm_jax.training.step import drop_labels, make_loss_and_grad
from ddpm_jax.validation import config_schedule

P_VALUE = 1e-3
ONE_DEVICE = make_mesh(jax.devices()[:1])
CONFIG = Config(
    data=DataConfig(image_shape=(2, 2, 1)),
    diffusion=DiffusionConfig(num_steps=50, prediction="x0", label_dropout=0.3),
    model=ModelConfig(channels=8, multipliers=(1,), num_classes=3),
    train=TrainConfig(batch_size=600),
)


class ClassPictures(UNet):
    """A grey level for each class and one for the open class: d loss / d level_k of white images is -2 (share of label k)."""

    @nn.compact
    def __call__(self, xt, t, labels=None, train=False, rows=None):
        levels = self.param("levels", nn.initializers.zeros, (self.num_classes + 1,))
        return jnp.broadcast_to(levels[labels][:, None, None, None], xt.shape)


def seen_labels(config, labels, key=0):
    """How many images of each label, the open class last, the network was trained on."""
    unet = ClassPictures(out_channels=1, num_classes=3)
    batch = Batch(jnp.ones((len(labels), 2, 2, 1), jnp.float32), jnp.asarray(labels, jnp.int32))
    loss_and_grad = jax.jit(make_loss_and_grad(config, config_schedule(config), unet, ONE_DEVICE))
    _, grads, _ = loss_and_grad(jax.random.key(key), {"levels": jnp.zeros(4)}, batch)
    counts = -np.asarray(grads["levels"], np.float64) * len(labels) / 2
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)  # sums of 600 terms in float32
    return np.round(counts).astype(int)


def with_rate(rate, parts=1):
    diffusion = dataclasses.replace(CONFIG.diffusion, label_dropout=rate)
    return dataclasses.replace(CONFIG, diffusion=diffusion, optim=OptimConfig(accumulate_steps=parts))


def test_labels_are_dropped_at_the_rate_and_apart_from_that_kept():
    labels = jnp.asarray(np.arange(30_000) % 3, jnp.int32)
    dropped = drop_labels(jax.random.key(0), labels, 0.1, 3)
    assert dropped.dtype == jnp.int32
    lost = np.asarray(dropped) == 3
    np.testing.assert_array_equal(np.asarray(dropped)[~lost], np.asarray(labels)[~lost])
    assert scipy.stats.binomtest(int(lost.sum()), 30_000, 0.1).pvalue > P_VALUE
    by_class = [lost[k::3].sum() for k in range(3)]  # each class alike
    assert scipy.stats.chisquare(by_class).pvalue > P_VALUE
    neighbours = int((lost[:-1] & lost[1:]).sum())  # and each image for itself
    assert scipy.stats.binomtest(neighbours, 29_999, 0.01).pvalue > P_VALUE
    assert not np.array_equal(dropped, drop_labels(jax.random.key(1), labels, 0.1, 3))
    np.testing.assert_array_equal(drop_labels(jax.random.key(0), labels, 0.0, 3), labels)


@pytest.mark.parametrize("parts", [1, 4])
def test_the_network_is_trained_on_the_open_class(parts):
    labels = np.repeat([0, 1, 2], 200)
    first, second = (seen_labels(with_rate(0.3, parts), labels, key) for key in range(2))
    assert first.sum() == 600
    for kept in first[:3]:
        assert scipy.stats.binomtest(int(200 - kept), 200, 0.3).pvalue > P_VALUE
    assert not np.array_equal(first, second)  # another step, other labels


def test_without_dropout_every_label_arrives():
    assert seen_labels(with_rate(0.0), [0, 0, 1, 2, 2, 2]).tolist() == [2, 1, 3, 0]


@pytest.mark.parametrize("num_classes", [None, 3])
def test_all_other_randomness_is_the_same_with_and_without(num_classes):
    """A network that doesn't look at labels has the same loss and gradient, to the bit, whatever the rate."""
    labels = None if num_classes is None else jnp.asarray([0, 1, 2, 2], jnp.int32)
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 2, 1), dtype=np.uint8)
    unet = OnePicture(out_channels=1, dropout=0.5, num_classes=num_classes)

    def run(rate):
        config = with_rate(rate)
        diffusion = dataclasses.replace(config.diffusion, prediction="eps", timesteps="stratified")
        model = dataclasses.replace(config.model, num_classes=num_classes)
        config = dataclasses.replace(config, diffusion=diffusion, model=model, data=dataclasses.replace(config.data, flip=True))
        loss_and_grad = jax.jit(make_loss_and_grad(config, config_schedule(config), unet, ONE_DEVICE))
        return loss_and_grad(jax.random.key(5), {"picture": jnp.ones((2, 2, 1))}, Batch(jnp.asarray(images), labels))

    jax.tree.map(np.testing.assert_array_equal, run(0.0), run(0.9))
