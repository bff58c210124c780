"""Images from arrays in .npy and .npz files."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from ddpm_jax.data.image_set import ImageSet
from ddpm_jax.errors import InputError

NPY_MAGIC = b"\x93NUMPY"  # an .npy file under another name is read as what it is
CHUNK_ELEMENTS = 1 << 24  # values are checked in pieces of this size, so that a memory-mapped file is never whole in memory


def load_arrays(path: Path) -> ImageSet:
    """Images from an .npy file, or "images" and, if any, "labels" from an .npz file.

    Images are [N, H, W, C], or [N, H, W] for one channel: uint8, or float32 in [-1, 1]. An .npy file is memory-mapped.

    Raises:
        InputError: see load_images.
    """
    arrays = _read(path)
    images = arrays["images"]
    if images.ndim == 3:
        images = images[..., None]
    _check_images(path, images)
    if "labels" not in arrays:
        return ImageSet(images)
    labels = arrays["labels"]
    whole = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
    if not whole or labels.min() < 0 or labels.max() >= 2**31:
        raise InputError(f"{path}: 'labels' must be {len(images)} whole numbers from 0, not {labels.dtype} {labels.shape}")
    return ImageSet(images, labels.astype(np.int32))


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
        raise InputError(f"{path} can't be read as a NumPy file: {_first_line(error)}") from error


def _check_images(path: Path, images: np.ndarray) -> None:
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise InputError(f"{path}: images must be [N, H, W, C] or [N, H, W], not of shape {images.shape}")
    if len(images) == 0:
        raise InputError(f"{path} holds no images")
    if images.shape[1] in (1, 3, 4) and images.shape[3] not in (1, 3, 4):
        raise InputError(f"{path}: images of shape {images.shape} seem to have channels first: move them to the last axis")
    if images.dtype == np.uint8:
        return
    if images.dtype != np.float32:
        raise InputError(f"{path}: images are {images.dtype}: save them as uint8 in [0, 255] or float32 in [-1, 1]")
    step = max(1, CHUNK_ELEMENTS // int(np.prod(images.shape[1:])))
    ranges = [(piece.min(), piece.max()) for piece in (images[i : i + step] for i in range(0, len(images), step))]
    low, high = float(np.min(ranges)), float(np.max(ranges))  # NaN if any pixel is
    if not np.isfinite([low, high]).all():
        raise InputError(f"{path}: some pixels are NaN or infinite")
    if low < -1 or high > 1:
        raise InputError(f"{path}: float images must lie in [-1, 1], not [{low:g}, {high:g}]: rescale them, or save uint8")
    if low >= 0:
        raise InputError(f"{path}: float images must fill [-1, 1], not [{low:g}, {high:g}]: if 0 is black, save 2 x - 1")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
