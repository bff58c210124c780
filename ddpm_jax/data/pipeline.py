"""The way of training images to the devices: whole and once for a small set, a dispatch at a time for a large one."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Shaped
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ddpm_jax.config import Config
from ddpm_jax.data.image_set import ImageSet, StoredImages
from ddpm_jax.data.order import Order, crop_draws, make_balanced_order, make_order
from ddpm_jax.errors import InputError
from ddpm_jax.metrics import console
from ddpm_jax.parallel import batch_sharding, compile_for, put, put_rows, replicated, rows_held

DISPATCHES_AHEAD = 2  # those that lie on the devices, ready, besides those that the worker threads are at
PIECE = 64  # images that a worker thread decodes at a time when a whole set is
MOMENT = 1.0  # seconds after which decoding a whole set shows how far it is


class Batch(NamedTuple):
    """Images as uint8 [0, 255] or float32 [-1, 1], and their classes if the network wants them."""

    images: Shaped[Array | np.ndarray, "*B H W C"]
    labels: Int[Array | np.ndarray, "*B"] | None = None


def batches(config: Config, image_set: ImageSet, mesh: Mesh, starts: Iterable[int]) -> Generator[Batch, None, None]:
    """For each start, the stacked batches [K, B, ...] of K = train.steps_per_dispatch steps; B is split over the devices.

    A set that stays_on_device lies on every device and is indexed there. Of another, data.num_workers threads read and
    send what comes next while the devices work; each process reads the rows that its own devices hold. There, the batches
    from the next start on are not read and hold zeros, since they come again. The threads end with the generator.

    Args:
        config: its data, train.batch_size, train.steps_per_dispatch, train.num_steps, model.num_classes and seed count.
        image_set: the images; labels are sent if the network has classes.
        mesh: the devices.
        starts: steps, rising.

    Raises:
        InputError: an image that can't be read, or data.sampling = "balanced" without labels.
    """
    order = image_order(config, image_set)
    labels = image_set.labels if config.model.num_classes is not None else None
    if stays_on_device(config, image_set):
        # Without a name here, which would keep what is decoded in the host's memory for as long as the generator lives.
        yield from _indexed(config, Batch(_pixels(image_set.images, config.data.num_workers), labels), order, mesh, starts)
    else:
        yield from _streamed(config, image_set.images, labels, order, mesh, starts)


def image_order(config: Config, image_set: ImageSet) -> Order:
    """The order that data.sampling asks for. Raises InputError where it needs labels and there are none."""
    check_sampling(config, image_set)
    if image_set.labels is None or config.data.sampling == "natural":
        return make_order(config.seed, len(image_set.images), config.train.batch_size)
    return make_balanced_order(config.seed, image_set.labels, config.train.batch_size)


def check_sampling(config: Config, image_set: ImageSet) -> None:
    """Raise InputError where data.sampling needs labels and there are none."""
    if config.data.sampling == "balanced" and image_set.labels is None:
        raise InputError(f"data.sampling = balanced needs classes, but {config.data.source} holds no labels: use natural")


def stays_on_device(config: Config, image_set: ImageSet) -> bool:
    """Whether a set is small enough to lie on every device, and the same in each epoch."""
    changes = isinstance(image_set.images, StoredImages) and config.data.framing == "random"
    return image_set.images.nbytes <= config.data.device_megabytes * 2**20 and not changes


def _pixels(images: np.ndarray | StoredImages, num_workers: int) -> Shaped[np.ndarray, "N H W C"]:
    return read_all(images, num_workers) if isinstance(images, StoredImages) else images


def read_all(images: StoredImages, num_workers: int) -> Shaped[np.ndarray, "N H W C"]:
    """All images of a set, decoded by several threads; a progress bar is shown on a terminal if it takes a while."""
    whole = np.empty(images.shape, images.dtype)
    starts = range(0, len(images), PIECE)

    def read(start: int) -> None:
        whole[start : start + PIECE] = images[start : start + PIECE]

    count, left = TextColumn("decoding: image {task.completed:.0f}/{task.total:.0f}"), TimeRemainingColumn()
    bar = Progress(count, BarColumn(), left, console=console, disable=not console.is_terminal, transient=True)
    task, began = bar.add_task("", total=len(images)), time.perf_counter()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
    try:
        for start, _ in zip(starts, pool.map(read, starts), strict=True):
            bar.update(task, completed=start + PIECE)
            if time.perf_counter() - began > MOMENT and not bar.live.is_started:
                bar.start()
    finally:
        bar.stop()
        pool.shutdown(cancel_futures=True)  # an image that can't be read, or Ctrl-C, ends the rest
    return whole


def _indexed(config: Config, arrays: Batch, order: Order, mesh: Mesh, starts: Iterable[int]) -> Iterator[Batch]:
    resident = put(arrays, replicated(mesh))
    del arrays  # what was decoded needn't stay in the host's memory
    take = compile_for(mesh, _take, out_shardings=batch_sharding(mesh, axis=1))
    for start in starts:
        yield take(resident, put(order(start, config.train.steps_per_dispatch), replicated(mesh)))


def _take(arrays: Batch, indices: Array) -> Batch:
    return jax.tree.map(lambda array: array[indices], arrays)


def _streamed(
    config: Config,
    images: np.ndarray | StoredImages,
    labels: Int[np.ndarray, " N"] | None,
    order: Order,
    mesh: Mesh,
    starts: Iterable[int],
) -> Iterator[Batch]:
    import grain  # takes a second, and sets on the device don't need it

    steps = np.fromiter(starts, np.int64)
    counts = np.minimum(np.diff(steps, append=config.train.num_steps), config.train.steps_per_dispatch).clip(1)
    read = _make_read(config, images, labels, order, mesh)

    def dispatch(number: int) -> Batch | Exception:
        try:
            return read(int(steps[number]), int(counts[number]))
        except Exception as error:  # handed over as it is: grain would add lines of its own to the message
            return error

    workers = config.data.num_workers
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + DISPATCHES_AHEAD)
    stream: Any = iter(grain.MapDataset.range(len(steps)).map(dispatch).to_iter_dataset(options))
    try:
        for batch in stream:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        stream.close()


def _make_read(
    config: Config, images: np.ndarray | StoredImages, labels: Int[np.ndarray, " N"] | None, order: Order, mesh: Mesh
) -> Callable[[int, int], Batch]:
    """The function (step, count) -> batches [K, B, ...] on the devices, of which this process reads the rows that it holds."""
    most, batch_size = config.train.steps_per_dispatch, config.train.batch_size
    rows, split = rows_held(mesh, batch_size), batch_sharding(mesh, axis=1)

    def read(step: int, count: int) -> Batch:
        places = order(step, count)[:, rows]
        chosen = places.ravel()
        if isinstance(images, StoredImages):
            draws = None
            if config.data.framing == "random":
                crops = crop_draws(config.seed, step * batch_size, (step + count) * batch_size)
                draws = crops.reshape(count, batch_size, 3)[:, rows].reshape(-1, 3)
            found = images.read(chosen, draws)
        else:
            found = np.asarray(images[chosen])  # a plain array, whatever the file was mapped as
        local = _stacked(Batch(found, None if labels is None else labels[chosen]), places.shape, most)
        return jax.tree.map(lambda array: put_rows(array, split, (most, batch_size, *array.shape[2:])), local)

    return read


def _stacked(found: Batch, shape: tuple[int, ...], most: int) -> Batch:
    """What was read for count x R places, [count * R, ...], as [K, R, ...] with zeros beyond count."""

    def stack(array: np.ndarray) -> np.ndarray:
        array = array.reshape(*shape, *array.shape[1:])
        if shape[0] == most:
            return array
        return np.concatenate([array, np.zeros((most - shape[0], *array.shape[1:]), array.dtype)])

    return jax.tree.map(stack, found)
