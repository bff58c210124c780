"""A classifier trained in a minute: it tells the class of images, and gives the features that samples are compared in.

It stands in for the Inception network of FID where images are small and grey: distances in its features rank samplers and
training runs of one data set, but can't be compared with anybody else's numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from ddpm_jax.data.order import make_order
from ddpm_jax.errors import InputError
from ddpm_jax.models.classifier import Classifier
from ddpm_jax.parallel import compile_for, make_mesh
from ddpm_jax.training.step import to_float

BATCH_SIZE = 32
LEARNING_RATE = 3e-3
WARMUP_SHARE = 0.05
WEIGHT_DECAY = 0.05
SHIFT_PIXELS = 1
SCORING_BATCH_SIZE = 250


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedClassifier:
    """A classifier with its weights; made by `train_classifier`."""

    network: Classifier
    """The network."""
    params: PyTree
    """Its weights."""

    def classes(self, images: Shaped[np.ndarray, "N H W C"]) -> Int[np.ndarray, " N"]:
        """The most probable class of every image, uint8 [0, 255] or float32 [-1, 1]."""
        return self.outputs(images)[0].argmax(axis=1).astype(np.int32)

    def features(self, images: Shaped[np.ndarray, "N H W C"]) -> Float[np.ndarray, "N F"]:
        """The features of every image, float32, for `frechet_distance`."""
        return self.outputs(images)[1]

    def outputs(self, images: Shaped[np.ndarray, "N H W C"]) -> tuple[Float[np.ndarray, "N K"], Float[np.ndarray, "N F"]]:
        """Logits and features of images, batch by batch; an image's numbers don't depend on the others."""
        pieces = []
        for start in range(0, len(images), SCORING_BATCH_SIZE):
            piece = images[start : start + SCORING_BATCH_SIZE]
            missing = SCORING_BATCH_SIZE - len(piece)  # filled up, so that all batches run one program
            filled = np.pad(piece, ((0, missing), (0, 0), (0, 0), (0, 0)))
            pieces.append(tuple(output[: len(piece)] for output in jax.device_get(self._apply(self.params, filled))))
        logits, features = (np.concatenate(output) for output in zip(*pieces, strict=True))
        return logits, features

    @functools.cached_property
    def _apply(self) -> Callable[..., Any]:
        return compile_for(make_mesh(), lambda params, images: self.network.apply({"params": params}, to_float(images)))


def train_classifier(
    images: Shaped[np.ndarray, "N H W C"],
    labels: Int[np.ndarray, " N"],
    seed: int = 0,
    num_epochs: int = 20,
    channels: int = 32,
) -> TrainedClassifier:
    """Train a classifier with AdamW on a half cosine, images moved by up to a pixel, on one device.

    Args:
        images: uint8 [0, 255] or float32 [-1, 1].
        labels: classes 0 ... K-1, all of which should occur.
        seed: of weights, order and shifts.
        num_epochs: passes over the images.
        channels: of the network's first level.

    Raises:
        InputError: not one label for each image, a negative one, or fewer images than a batch.
    """
    if labels.shape != images.shape[:1] or len(images) < BATCH_SIZE or labels.min() < 0:
        raise InputError(
            f"a classifier needs {BATCH_SIZE} or more images, each with a class from 0, "
            f"not {len(images)} images and labels of shape {labels.shape} from {labels.min(initial=0)}"
        )
    network = Classifier(int(labels.max()) + 1, channels)
    num_steps = num_epochs * len(images) // BATCH_SIZE
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, int(WARMUP_SHARE * num_steps), num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=WEIGHT_DECAY))
    device_images, device_labels = jnp.asarray(images), jnp.asarray(labels)

    def step(
        params: PyTree, opt_state: PyTree, images: Array, labels: Array, chosen: Array, number: Array
    ) -> tuple[PyTree, PyTree]:
        key = jax.random.fold_in(jax.random.key(seed), number)
        x = random_shift(key, to_float(images[chosen]), SHIFT_PIXELS)

        def loss_fn(params: PyTree) -> Float[Array, ""]:
            logits, _ = network.apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()

        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    program = compile_for(make_mesh(), step, donate_argnums=(0, 1))
    params = jax.jit(network.init)(jax.random.key(seed), jnp.zeros((1, *images.shape[1:])))["params"]
    opt_state = jax.jit(optimizer.init)(params)
    order = make_order(seed, len(images), BATCH_SIZE)
    for number in range(num_steps):
        chosen = order(number, 1)[0]
        params, opt_state = program(params, opt_state, device_images, device_labels, chosen, np.uint32(number))
    return TrainedClassifier(network, params)


def random_shift(key: Key[Array, ""], images: Float[Array, "B H W C"], pixels: int) -> Float[Array, "B H W C"]:
    """Each image moved by up to so many pixels down or up and right or left; black (-1) moves in."""
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), constant_values=-1.0)
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pixels + 1)
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))(padded, corners)
