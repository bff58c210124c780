"""Between our weights, a tree of arrays, and PyTorch's, a flat dictionary of tensors: names, layouts, files.

Ours are [3, 3, in, out] for convolutions and [in, out] for linear maps; theirs [out, in, 3, 3] and [out, in], with axes of
length one behind where they call a linear map a convolution.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float, PyTree, Shaped

from ddpm_jax.config import Config
from ddpm_jax.errors import InputError, first_line
from ddpm_jax.files import whole_file
from ddpm_jax.interop.torch_files import read_torch_file

Tensors = dict[str, Shaped[np.ndarray, "..."]]

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
"""The last parts of our names, and theirs."""
BLOCK = re.compile(r"(down|up)(\d+)_(?:block(\d+)(_attention)?|downsample|upsample)")
"""The first parts of our names on the way down and up: way, level, and of a block its index and whether it is its attention."""


def named_leaves(params: PyTree) -> dict[str, Any]:
    """The arrays, or shapes, of a tree by their places in it, such as "down0_block0/conv1/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(place, simple=True, separator="/"): leaf for place, leaf in leaves}


def from_torch(place: str, tensor: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """A tensor in our layout, float32."""
    tensor = tensor.astype(np.float32)
    if not place.endswith("/kernel"):
        return tensor
    if tensor.ndim > 2 and set(tensor.shape[2:]) == {1}:
        tensor = tensor.reshape(tensor.shape[:2])
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def to_torch(place: str, array: Float[np.ndarray, "..."], as_convolution: bool = False) -> Float[np.ndarray, "..."]:
    """The inverse of from_torch, contiguous; a linear map may be written as a convolution of size 1."""
    array = np.asarray(array, np.float32)
    if place.endswith("/kernel"):
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        array = array[:, :, None, None] if as_convolution else array
    return np.ascontiguousarray(array)


def lay_out(make_abstract: Callable[[Config], PyTree], config: Config, source: Path) -> PyTree:
    """make_abstract(config). Raises InputError, which names the source, where its numbers don't go together."""
    try:
        return make_abstract(config)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def fill(abstract: PyTree, tensors: Mapping[str, np.ndarray], name_of: Callable[[str], str], source: Path) -> PyTree:
    """The tree of `abstract`'s shapes with the tensors in it, every one of which must find its place.

    Args:
        abstract: shapes of the weights.
        tensors: theirs, by name.
        name_of: the function from our place to their name.
        source: where they are from, for messages.

    Raises:
        InputError: a tensor that is missing, one that has no place, or one of another shape or type.
    """
    places = {place: name_of(place) for place in named_leaves(abstract)}
    for what, names in (
        ("is missing", set(places.values()) - tensors.keys()),
        ("has no place in the network of its config", tensors.keys() - set(places.values())),
    ):
        if names:
            others = f", and so are {len(names) - 1} others" if len(names) > 1 and what == "is missing" else ""
            raise InputError(f"{source}: the tensor {min(names)!r} {what}{others}")

    def convert(leaf: jax.ShapeDtypeStruct, place: str) -> np.ndarray:
        tensor = tensors[places[place]]
        if tensor.dtype.kind in "biu" or tensor.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
            raise InputError(f"{source}: the tensor {places[place]!r} holds {tensor.dtype.name}, not floating-point numbers")
        array = from_torch(place, tensor)
        if array.shape != leaf.shape:
            raise InputError(
                f"{source}: the tensor {places[place]!r} has the shape {tensor.shape}, which doesn't fit its config: {place} "
                f"is {leaf.shape} here"
            )
        return array

    leaves = [convert(leaf, place) for place, leaf in named_leaves(abstract).items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def read_tensors(path: Path) -> Tensors:
    """The tensors of a .safetensors file, or of one of PyTorch's. Raises InputError where they can't be read."""
    if path.suffix != ".safetensors":
        return read_torch_file(path)
    try:
        with safetensors.safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or first_line(error)}") from error
    except Exception as error:  # whatever safetensors raises on damaged files
        raise InputError(f"{path} can't be read as safetensors: {first_line(error)}") from error


def write_tensors(path: Path, tensors: Tensors) -> None:
    """A .safetensors file that PyTorch's programs read; the same tensors make the same bytes."""
    with whole_file(path) as file:
        file.write(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
