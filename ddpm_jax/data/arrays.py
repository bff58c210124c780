"""Images from arrays: .npy and .npz files, or a folder of such shards."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from ddpm_jax.data.image_set import ImageSet, StoredImages
from ddpm_jax.errors import InputError, first_line

NPY_MAGIC = b"\x93NUMPY"  # an .npy file under another name is read as what it is
CHUNK_ELEMENTS = 1 << 24  # values are checked in pieces of this size, so that a memory-mapped file is never whole in memory
LABELS = "labels.npy"  # in a folder of shards: the labels of all of them


def load_arrays(path: Path) -> ImageSet:
    """Images from an .npy file, "images" and, if any, "labels" from an .npz file, or a folder of such files.

    Images are [N, H, W, C], or [N, H, W] for one channel: uint8, or float32 in [-1, 1]. .npy files are memory-mapped. The
    files of a folder follow each other by name and agree in shape and dtype; their labels are in each .npz file or, for all
    of them, in labels.npy. uint8 shards stay where they are; float32 ones are joined in memory.

    Raises:
        InputError: see load_images.
    """
    files = _shards(path) if path.is_dir() else [path]
    shards = [_read(file) for file in files]
    parts = [shard["images"] if shard["images"].ndim != 3 else shard["images"][..., None] for shard in shards]
    for file, part in zip(files, parts, strict=True):
        _check_images(file, part)
        if part.shape[1:] != parts[0].shape[1:] or part.dtype != parts[0].dtype:
            here, first = (f"{array.dtype} {array.shape[1:]}" for array in (part, parts[0]))
            raise InputError(f"{file}: images are {here}, but {first} in {files[0].name}: shards must agree")
    if parts[0].dtype != np.uint8:
        _check_range(path, parts)
    labels = [
        _check_labels(file, shard["labels"], len(part))
        for file, shard, part in zip(files, shards, parts, strict=True)
        if "labels" in shard
    ]
    return ImageSet(_joined(parts), _all_labels(path, labels, [len(part) for part in parts]))


def holds_arrays(folder: Path) -> bool:
    """Whether a folder is one of .npy or .npz files."""
    return any(_is_shard(file) for file in folder.iterdir())


class StoredArrays(StoredImages):
    """uint8 images of arrays [N_i, H, W, C], one array after the other."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        super().__init__(sum(map(len, parts)), parts[0].shape[1:])
        self.parts = parts
        self._stops = np.cumsum([len(part) for part in parts])

    def read(
        self, indices: Int[np.ndarray, "B"], draws: Float[np.ndarray, "B 3"] | None = None
    ) -> UInt8[np.ndarray, "B H W C"]:
        """See StoredImages.read."""
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        part_of = np.searchsorted(self._stops, indices, side="right")
        for number in np.unique(part_of):
            chosen = np.flatnonzero(part_of == number)
            part = self.parts[number]
            images[chosen] = part[indices[chosen] - (self._stops[number] - len(part))]
        return images


def _is_shard(file: Path) -> bool:
    return file.suffix in (".npy", ".npz") and file.name != LABELS and file.name[0] != "." and file.is_file()


def _shards(folder: Path) -> list[Path]:
    files = sorted((file for file in folder.iterdir() if _is_shard(file)), key=lambda file: file.name)
    if not files:
        raise InputError(f"{folder} holds no .npy or .npz file with images")
    return files


def _joined(parts: list[np.ndarray]) -> np.ndarray | StoredArrays:
    if len(parts) == 1:
        return parts[0]
    return StoredArrays(parts) if parts[0].dtype == np.uint8 else np.concatenate(parts)


def _all_labels(path: Path, labels: list[np.ndarray], counts: list[int]) -> np.ndarray | None:
    """The labels of all shards; None if there are none."""
    together = path / LABELS
    if path.is_dir() and together.is_file():
        if labels:
            raise InputError(f"{path}: both {LABELS} and .npz files hold labels: remove one of them")
        return _check_labels(together, _read(together)["images"], sum(counts))
    if not labels:
        return None
    if len(labels) < len(counts):
        raise InputError(f"{path}: {len(labels)} of {len(counts)} files hold labels: give them to all or none")
    return np.concatenate(labels)


def _check_labels(file: Path, labels: np.ndarray, count: int) -> np.ndarray:
    whole = labels.dtype.kind in "iu" and labels.shape == (count,)
    if not whole or labels.min() < 0 or labels.max() >= 2**31:
        raise InputError(f"{file}: 'labels' must be {count} whole numbers from 0, not {labels.dtype} {labels.shape}")
    return labels.astype(np.int32)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays "images" and "labels" of an .npz file, or the array of an .npy file, memory-mapped, as "images"."""
    if path.suffix not in (".npy", ".npz"):
        raise InputError(f"{path}: unknown kind of file {path.suffix!r}: use .npy or .npz")
    try:
        with path.open("rb") as file:
            if file.read(len(NPY_MAGIC)) == NPY_MAGIC:
                return {"images": np.load(path, mmap_mode="r", allow_pickle=False)}
            file.seek(0)
            if not zipfile.is_zipfile(file):
                raise InputError(f"{path} can't be read as a NumPy file: save images with numpy.save or numpy.savez")
            file.seek(0)
            arrays = np.load(file, allow_pickle=False)
            if "images" not in arrays:
                raise InputError(f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}, but no array called 'images'")
            found = {name: arrays[name] for name in ("images", "labels") if name in arrays}
            if not all(isinstance(array, np.ndarray) for array in found.values()):
                raise InputError(f"{path}: 'images' and 'labels' must be arrays")
            return found
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} can't be read as a NumPy file: {first_line(error)}") from error


def _check_images(path: Path, images: np.ndarray) -> None:
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise InputError(f"{path}: images must be [N, H, W, C] or [N, H, W], not of shape {images.shape}")
    if len(images) == 0:
        raise InputError(f"{path} holds no images")
    if images.shape[1] in (1, 3, 4) and images.shape[3] not in (1, 3, 4):
        raise InputError(f"{path}: images of shape {images.shape} seem to have channels first: move them to the last axis")
    if images.dtype not in (np.uint8, np.float32):
        raise InputError(f"{path}: images are {images.dtype}: save them as uint8 in [0, 255] or float32 in [-1, 1]")


def _check_range(path: Path, parts: list[np.ndarray]) -> None:
    """Raise InputError where float images leave [-1, 1], or none of them is below 0."""
    step = max(1, CHUNK_ELEMENTS // int(np.prod(parts[0].shape[1:])))
    pieces = (part[i : i + step] for part in parts for i in range(0, len(part), step))
    ranges = [(piece.min(), piece.max()) for piece in pieces]
    low, high = float(np.min(ranges)), float(np.max(ranges))  # NaN if any pixel is
    if not np.isfinite([low, high]).all():
        raise InputError(f"{path}: some pixels are NaN or infinite")
    if low < -1 or high > 1:
        raise InputError(f"{path}: float images must lie in [-1, 1], not [{low:g}, {high:g}]: rescale them, or save uint8")
    if low >= 0:
        raise InputError(f"{path}: float images must fill [-1, 1], not [{low:g}, {high:g}]: if 0 is black, save 2 x - 1")
