"""Ranges of numbered images: the unit in which images are drawn and scored, kept, and shared among devices and processes.

A range is (start, stop). A device works on one at a time, filled up to a fixed number of rows, so that its program, and what
it makes of an image, are the same for any number of devices and processes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
from jaxtyping import Int

T = TypeVar("T")

Range: TypeAlias = tuple[int, int]


def rows_of_range(batch_size: int, num_images: int, num_devices: int) -> int:
    """Images of a range: batch_size, or fewer where that would leave a device without any."""
    return min(batch_size, -(-num_images // num_devices))


def gaps(stored: Mapping[int, int], first: int, last: int, rows: int) -> list[Range]:
    """The ranges of at most `rows` images that fill first ... last - 1 between those that are stored, {start: stop}.

    Stored ranges lie within first ... last and don't overlap.
    """
    edges = [first, *(edge for start in sorted(stored) for edge in (start, stored[start])), last]
    free = zip(edges[::2], edges[1::2], strict=True)
    return [(start, min(start + rows, end)) for begin, end in free for start in range(begin, end, rows)]


def batches(ranges: Sequence[Range], rows: int, num_devices: int) -> Iterator[tuple[Sequence[Range], Int[np.ndarray, " B"]]]:
    """As many ranges at a time as there are devices, and the images' numbers: B = num_devices * rows, one range a device.

    Ranges are filled up with their last number, and the last batch with its last range.
    """
    for place in range(0, len(ranges), num_devices):
        batch = ranges[place : place + num_devices]
        filled = [*batch, *[batch[-1]] * (num_devices - len(batch))]
        yield batch, np.concatenate([np.minimum(np.arange(start, start + rows), stop - 1) for start, stop in filled])


def one_behind(items: Iterable[T]) -> Iterator[T]:
    """The items, each given out when the next is there: devices work on that one while the host looks at this one."""
    waiting: list[T] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting
