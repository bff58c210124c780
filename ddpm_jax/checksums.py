"""Checksums of arrays, by which bits that changed on a disk are told from those that were saved.

Each array has two sums modulo 2^32, over its elements w_i as unsigned integers in row-major order:

    sum_i w_i    and    sum_i (2 i + 1) w_i

One changed bit changes both, as 2 i + 1 is odd; elements that changed places change the second. Sums of parts add up to the
sum of the whole, so they don't depend on how an array is split, and each process sums what lies on its own devices.
"""

import functools
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree, UInt32


class DamagedError(Exception):
    """What was read is not what was written; the message says what of it."""


def checksums(items: Mapping[str, PyTree]) -> dict[str, dict[str, str]]:
    """The sums of every array, as 16 hexadecimal digits by item and place in its tree.

    Args:
        items: trees of NumPy or JAX arrays, of dtypes of up to 32 bits. With arrays that other processes hold parts of, all
            processes must ask.
    """
    places, leaves = zip(*jax.tree_util.tree_leaves_with_path(dict(items)), strict=True)
    sums = np.stack([_sums(leaf) for leaf in leaves])
    if not all(isinstance(leaf, np.ndarray) or leaf.is_fully_addressable for leaf in leaves):
        sums = _total(multihost_utils.process_allgather(sums))
    found: dict[str, dict[str, str]] = {name: {} for name in items}
    for (item, *place), (plain, weighted) in zip(places, sums, strict=True):
        found[item.key][jax.tree_util.keystr(tuple(place), simple=True, separator="/")] = f"{plain:08x}{weighted:08x}"
    return found


def check(items: Mapping[str, PyTree], saved: Mapping[str, Mapping[str, str]]) -> None:
    """Raise DamagedError on the first array whose sums are not the saved ones."""
    for item, sums in checksums(items).items():
        for place, value in sums.items():
            if saved.get(item, {}).get(place) != value:
                raise DamagedError(f"the checksum of {item}/{place} is not that of what was saved")


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """Values that JSON can hold, with a checksum of their own."""
    return values | {"crc32": _crc(values)}


def unseal(sealed: Mapping[str, Any]) -> dict[str, Any]:
    """The values that were sealed; those of before there was a seal are taken as they are.

    Raises:
        DamagedError: they have changed.
    """
    values = {name: value for name, value in sealed.items() if name != "crc32"}
    if "crc32" in sealed and sealed["crc32"] != _crc(values):
        raise DamagedError("the checksum of its config is not that of what was saved")
    return values


def _crc(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _sums(array: jax.Array | np.ndarray) -> UInt32[np.ndarray, "2"]:
    """The sums over those elements that this process answers for: of equal copies, the first one's holder."""
    if isinstance(array, np.ndarray):
        return _part_sums(array, tuple(slice(None) for _ in array.shape), array.shape)
    parts = [(part.data, part.index) for part in array.addressable_shards if part.replica_id == 0]
    sums = [_part_sums(np.asarray(data), index, array.shape) for data, index in parts]
    return _total(np.asarray(sums, np.uint32).reshape(-1, 2))


def _total(sums: UInt32[np.ndarray, "parts *sums"]) -> UInt32[np.ndarray, "*sums"]:
    return np.asarray(np.sum(sums, axis=0, dtype=np.uint32))


def _part_sums(part: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> UInt32[np.ndarray, "2"]:
    """The sums over a part of an array of this shape."""
    words = np.ascontiguousarray(part).reshape(-1).view(f"u{part.dtype.itemsize}").astype(np.uint32, copy=False)
    if words.size == math.prod(shape):
        weights = np.arange(1, 2 * words.size, 2, dtype=np.uint32)
    else:
        strides = np.cumprod([1, *shape[:0:-1]], dtype=np.uint64)[::-1].astype(np.uint32)
        axes = zip(index, shape, strides, strict=True)
        places = [np.arange(*part.indices(length), dtype=np.uint32) * stride for part, length, stride in axes]
        weights = 2 * functools.reduce(np.add.outer, places).reshape(-1) + np.uint32(1)
    return np.array([np.sum(words, dtype=np.uint32), np.dot(words, weights)], np.uint32)
