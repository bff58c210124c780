"""The order of training images: what stands at position p of the endless sequence that training goes along.

Step s takes positions s B ... (s + 1) B - 1. Everything is a function of (seed, position) alone, so a resumed run sees what it
would have seen, and the number of processes and of steps made together changes nothing.

natural     one permutation of the N images after another; permutation e is a function of (seed, e)
balanced    rounds of the C classes, each a permutation of them, so that position p belongs to round r = p // C; the r-th image
            of a class is the r-th of one permutation of its own images after another
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

Order = Callable[[int, int], Int[np.ndarray, "K B"]]
"""(step, count) -> numbers of the images of steps step ... step + count - 1."""

# Streams of random numbers that keep out of each other's way: the upper half of a key, the lower half being the seed.
EPOCHS, CROPS, ROUNDS, CLASSES = 0, 1, 2, 3  # class c has the stream CLASSES + c
ROUNDS_AT_ONCE = 64  # rounds of classes that are drawn together: a generator for each would cost more than its numbers


def make_order(seed: int, num_images: int, batch_size: int) -> Order:
    """The natural order: each image once an epoch. Numbers are int32."""
    permutation = functools.lru_cache(maxsize=2)(functools.partial(epoch_order, seed, num_images=num_images))

    def indices(step: int, count: int) -> Int[np.ndarray, "K B"]:
        epochs, places = np.divmod(positions(step, count, batch_size), num_images)
        parts = [permutation(epoch=int(e))[places[epochs == e]] for e in np.unique(epochs)]
        return np.concatenate(parts).astype(np.int32).reshape(count, batch_size)

    return indices


def make_balanced_order(seed: int, labels: Int[np.ndarray, " N"], batch_size: int) -> Order:
    """The balanced order: each class that occurs once a round, and within a class each image once a pass. Numbers are int32."""
    classes, counts = np.unique(labels, return_counts=True)
    members = np.split(np.argsort(labels, kind="stable").astype(np.int32), np.cumsum(counts)[:-1])

    @functools.lru_cache(maxsize=2)
    def rounds(block: int) -> Int[np.ndarray, "R C"]:
        each = np.tile(np.arange(len(classes)), (ROUNDS_AT_ONCE, 1))
        return _generator(seed, ROUNDS, block).permuted(each, axis=1)

    @functools.lru_cache(maxsize=2 * len(classes))
    def one_pass(place: int, number: int) -> Int[np.ndarray, " N_c"]:
        return _generator(seed, CLASSES + int(classes[place]), number).permutation(members[place])

    def indices(step: int, count: int) -> Int[np.ndarray, "K B"]:
        numbers, places = np.divmod(positions(step, count, batch_size), len(classes))
        blocks, rows = np.divmod(numbers, ROUNDS_AT_ONCE)
        of = np.array([rounds(int(b))[row, place] for b, row, place in zip(blocks, rows, places, strict=True)])
        passes, within = np.divmod(numbers, counts[of])
        found = [one_pass(int(c), int(p))[w] for c, p, w in zip(of, passes, within, strict=True)]
        return np.array(found, np.int32).reshape(count, batch_size)

    return indices


def positions(step: int, count: int, batch_size: int) -> Int[np.ndarray, " P"]:
    """The positions of steps step ... step + count - 1."""
    return np.arange(step * batch_size, (step + count) * batch_size)


def epoch_order(seed: int, epoch: int, num_images: int) -> Int[np.ndarray, " N"]:
    """The permutation int64 [N] in which an epoch visits the images."""
    return _generator(seed, EPOCHS, epoch).permutation(num_images)


def crop_draws(seed: int, start: int, stop: int) -> Float[np.ndarray, "P 3"]:
    """Three numbers in [0, 1) for each of positions start ... stop - 1, which decide a random crop of its image.

    Position p has the p-th block of four numbers of a counter-based generator, so no position depends on another.
    """
    key = np.array([seed + (CROPS << 32), 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=start)).random((stop - start, 4))[:, :3]


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed + (stream << 32), number], np.uint64)))
