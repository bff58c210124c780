"""The order of training images, and their way to the devices.

The images of step s are positions s B ... (s + 1) B - 1 of an endless sequence: one random permutation of the set after
another. Permutation e is a function of (seed, e), so position alone decides: a resumed run sees what it would have seen.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Shaped

from ddpm_jax.config import Config
from ddpm_jax.data.image_set import ImageSet
from ddpm_jax.parallel import batch_sharding, compile_for, put, replicated


class Batch(NamedTuple):
    """Images as uint8 [0, 255] or float32 [-1, 1], and their classes if the network wants them."""

    images: Shaped[Array | np.ndarray, "*B H W C"]
    labels: Int[Array | np.ndarray, "*B"] | None = None


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The permutation int64 [N] in which an epoch visits the images."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    return generator.permutation(num_images)


def make_order(seed: int, num_images: int, batch_size: int) -> Callable[[int, int], np.ndarray]:
    """The function (step, count) -> indices int32 [count, B] of the images of steps step ... step + count - 1."""
    permutation = functools.lru_cache(maxsize=2)(functools.partial(epoch_order, seed, num_images=num_images))

    def indices(step: int, count: int) -> np.ndarray:
        positions = np.arange(step * batch_size, (step + count) * batch_size)
        epochs, places = np.divmod(positions, num_images)
        parts = [permutation(epoch=int(e))[places[epochs == e]] for e in np.unique(epochs)]
        return np.concatenate(parts).astype(np.int32).reshape(count, batch_size)

    return indices


def batches(config: Config, image_set: ImageSet, mesh: Mesh, starts: Iterable[int]) -> Iterator[Batch]:
    """For each start, the stacked batches [K, B, ...] of K = train.steps_per_dispatch steps; B is split over the devices.

    A set of at most data.device_megabytes lies on every device and is indexed there; of a larger one, each batch is read
    and sent while the devices work on the one before.
    """
    count, batch_size = config.train.steps_per_dispatch, config.train.batch_size
    order = make_order(config.seed, len(image_set.images), batch_size)
    with_labels = config.model.num_classes is not None
    arrays = Batch(image_set.images, image_set.labels if with_labels else None)
    split = batch_sharding(mesh, axis=1)
    if image_set.images.nbytes <= config.data.device_megabytes * 2**20:
        resident = put(arrays, replicated(mesh))
        take = compile_for(mesh, _take, out_shardings=split)
        for start in starts:
            yield take(resident, put(order(start, count), replicated(mesh)))
    else:
        for start in starts:
            yield put(_take(arrays, order(start, count)), split)


def _take(arrays: Batch, indices: Array | np.ndarray) -> Batch:
    return jax.tree.map(lambda array: array[indices], arrays)
