"""Weights out of PyTorch's files (.bin, .pt, .pth), without PyTorch and without executing what they say.

Such a file is a pickle, which is a program: it may name any function and have it called. Here it is read twice. The first time
only its instructions are looked at: those that `torch.save` needs for a dictionary of tensors, and the few names that go with
them, or the file is refused. The second time a `pickle.Unpickler` that knows no other names makes the dictionary.

    zip format, torch >= 1.6:   NAME/data.pkl, the pickle; NAME/data/KEY, the numbers of each storage, not compressed
    older format:               five pickles (a magic number, a version, sizes of types, the dictionary, its storages' keys),
                                then for each storage its length (int64) and its numbers

A tensor is a view of a storage: offset, shape and strides in elements.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from ddpm_jax.errors import InputError, first_line

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # opens a file of the older format
OLD_VERSION = 1001  # the one version that it had

DTYPES: Mapping[str, Any] = {
    "torch FloatStorage": np.float32,
    "torch DoubleStorage": np.float64,
    "torch HalfStorage": np.float16,
    "torch BFloat16Storage": ml_dtypes.bfloat16,
    "torch LongStorage": np.int64,
    "torch IntStorage": np.int32,
    "torch ShortStorage": np.int16,
    "torch CharStorage": np.int8,
    "torch ByteStorage": np.uint8,
    "torch BoolStorage": np.bool_,
}
"""The kinds of storages by the names that pickles have for them; numbers are little-endian."""

INSTRUCTIONS = frozenset({
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "NONE",
    "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
})  # fmt: skip
"""What `torch.save` writes, in pickle's protocol 2."""


class _Storage(NamedTuple):
    """Numbers that tensors are views of, still in the file."""

    key: str
    dtype: str
    length: int


class _Tensor(NamedTuple):
    """A view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _MakeTensor:
    """What stands for torch._utils._rebuild_tensor_v2 (storage, offset, shape, strides, ...)."""

    __slots__ = ()  # so that no instruction of a pickle can change it

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *ignored: Any) -> _Tensor:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


class _SameTensor:
    """What stands for torch._utils._rebuild_parameter (tensor, ...)."""

    __slots__ = ()

    def __call__(self, tensor: Any, *ignored: Any) -> Any:
        return tensor


NAMES: Mapping[str, Any] = {
    "collections OrderedDict": OrderedDict,
    "torch._utils _rebuild_tensor": _MakeTensor(),
    "torch._utils _rebuild_tensor_v2": _MakeTensor(),
    "torch._utils _rebuild_parameter": _SameTensor(),
    **{name: name for name in DTYPES},
}
"""All that a pickle may name, and what stands for it here."""


def read_torch_file(path: str | Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The tensors of a state dict that `torch.save` wrote, by name; float16 and bfloat16 stay what they are.

    A dictionary with one under "state_dict" is read as the latter.

    Raises:
        InputError: no such file, truncated, damaged, not a dictionary of tensors, or one that names anything that such
            a dictionary doesn't need. Nothing of it has been executed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read_zip(file) if zipfile.is_zipfile(file) else _read_old(file)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or first_line(error)}") from error
    except MemoryError as error:
        raise InputError(f"{path} can't be read: it asks for more memory than there is") from error
    except Exception as error:  # whatever pickle, zipfile and NumPy raise on damaged files
        raise InputError(f"{path} can't be read as weights of PyTorch: {first_line(error)}") from error


def _read_zip(file: io.BufferedReader) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("a zip file without one data.pkl in it")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("its parts are compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries.values()) > file.seek(0, io.SEEK_END):
            raise ValueError("its parts overlap")
        order = roots[0] + "byteorder"
        if order in entries and archive.read(order) != b"little":
            raise ValueError("it was written by a big-endian machine")
        tree = _unpickle(io.BytesIO(archive.read(roots[0] + "data.pkl")))

        def load(storage: _Storage) -> bytes:
            name = f"{roots[0]}data/{storage.key}"
            if name not in entries:
                raise ValueError(f"the storage {storage.key[:80]!r} is missing")
            return archive.read(name)  # checks the CRC-32

        return _arrays(tree, load)


def _read_old(file: io.BufferedReader) -> dict[str, np.ndarray]:
    if file.seek(0, io.SEEK_END) == 0:
        raise ValueError("the file is empty")
    file.seek(0)
    if _unpickle(file) != MAGIC_NUMBER or _unpickle(file) != OLD_VERSION:
        raise ValueError("neither of the formats of torch.save")
    sizes = _unpickle(file)
    if not isinstance(sizes, dict) or sizes.get("little_endian") is not True:
        raise ValueError("it was written by a big-endian machine")
    tree, keys = _unpickle(file), _unpickle(file)
    itemsizes = {v.storage.key: np.dtype(DTYPES[v.storage.dtype]).itemsize for v in _tensors(tree).values()}
    places = {}
    for key in keys:
        length = int.from_bytes(file.read(8), "little")
        if key not in itemsizes:
            raise ValueError(f"the storage {key!r} belongs to no tensor")
        places[key] = (file.tell(), length * itemsizes[key])
        file.seek(length * itemsizes[key], io.SEEK_CUR)

    def load(storage: _Storage) -> bytes:
        if storage.key not in places:
            raise ValueError(f"the storage {storage.key[:80]!r} is missing")
        start, size = places[storage.key]
        file.seek(start)
        return file.read(size)

    return _arrays(tree, load)


def _unpickle(file: io.BufferedReader | io.BytesIO) -> Any:
    """The next pickle of a file, made of INSTRUCTIONS and NAMES alone. Raises ValueError where it holds others."""
    start = file.tell()
    for instruction, argument, _ in pickletools.genops(file):
        if instruction.name == "GLOBAL" and argument not in NAMES:
            raise ValueError(f"it names {str(argument).replace(' ', '.')!r}, which weights don't need, and so may be a program")
        if instruction.name not in INSTRUCTIONS:
            raise ValueError(f"it holds the pickle instruction {instruction.name}, which torch.save doesn't write")
        if instruction.name == "LONG_BINPUT" and int(str(argument)) > file.tell() - start:
            raise ValueError("it numbers its objects higher than there can be")
    end = file.tell()
    file.seek(start)
    return _Unpickler(io.BytesIO(file.read(end - start))).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module} {name}" not in NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return NAMES[f"{module} {name}"]

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, key, _, length, *view = identity
        if kind != "storage" or dtype not in DTYPES or not isinstance(key, str) or any(view):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        return _Storage(key, dtype, int(length))


def _tensors(tree: Any) -> dict[str, _Tensor]:
    """The tensors of a state dict by name. Raises ValueError where it is something else."""
    if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        tree = tree["state_dict"]
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"it holds a {type(tree).__name__}, not a dictionary of tensors")
    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise ValueError(f"its entry {str(name)[:80]!r} is a {type(value).__name__}, not a tensor")
    return dict(tree)


def _arrays(tree: Any, load: Callable[[_Storage], bytes]) -> dict[str, np.ndarray]:
    storages: dict[str, np.ndarray] = {}
    arrays = {}
    for name, tensor in _tensors(tree).items():
        key, dtype = tensor.storage.key, np.dtype(DTYPES[tensor.storage.dtype])
        if key not in storages:
            storages[key] = np.frombuffer(load(tensor.storage), np.uint8)
        numbers = storages[key][: storages[key].size // dtype.itemsize * dtype.itemsize].view(dtype)
        arrays[name] = _view(name, numbers, tensor)
    return arrays


def _view(name: str, numbers: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """The array that a tensor is of its storage's numbers; checked to lie within them, and not to be larger than they are."""
    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    if len(shape) != len(strides) or min((0, offset, *shape, *strides)) < 0:
        raise ValueError(f"the tensor {name!r} has a shape or strides that can't be")
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    size = math.prod(shape)
    if size > numbers.size or (size and last >= numbers.size):
        raise ValueError(
            f"the tensor {name!r} of shape {shape} has more numbers than its storage, {numbers.size}: it is truncated"
        )
    if size == 0:
        return np.zeros(shape, numbers.dtype)
    return np.lib.stride_tricks.as_strided(
        numbers[offset:], shape, [stride * numbers.itemsize for stride in strides], writeable=False
    )
