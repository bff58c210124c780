"""Weights and images for tests of networks."""

import math

import jax
import numpy as np

SHAPE = (2, 8, 12, 2)


def random_params(shapes, seed=0):
    """Weights that make every layer count, also those that start near zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        if path[-1].key == "kernel":
            return (noise / math.sqrt(math.prod(leaf.shape[:-1]))).astype(np.float32)
        return ((path[-1].key == "scale") + 0.3 * noise).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def images(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
