"""Where images come from: the source that a config names."""

import importlib.resources
from pathlib import Path

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data.arrays import load_arrays
from ddpm_jax.data.folders import load_folder
from ddpm_jax.data.image_set import ImageSet
from ddpm_jax.errors import InputError

PACKAGED = {"fashion_mnist": "fashion_mnist_10k.npz"}
FASHION_MNIST_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def load_images(config: DataConfig) -> ImageSet:
    """The images that a config names, checked.

    Raises:
        InputError: no such set or file, or images that can't be used.
    """
    image_set = _open(config)
    if config.image_shape is not None and image_set.image_shape != config.image_shape:
        raise InputError(f"{config.source}: images are {image_set.image_shape}, but data.image_shape = {config.image_shape}")
    return image_set


def _open(config: DataConfig) -> ImageSet:
    source, path = config.source, Path(config.source)
    if source in PACKAGED:
        return load_packaged(source)
    if path.is_file():
        return load_arrays(path)
    if source and path.is_dir():  # no other kind of folder
        return load_folder(path, config)
    names = ", ".join(PACKAGED)
    raise InputError(f"data.source = {source!r} is neither a packaged set ({names}) nor an .npy or .npz file, nor a folder")


def load_packaged(name: str) -> ImageSet:
    """A set that comes with the package: "fashion_mnist", 10,000 images of 28x28x1 in ten classes."""
    resource = importlib.resources.files("ddpm_jax.data") / "packaged" / PACKAGED[name]
    with resource.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return ImageSet(arrays["images"][..., None], arrays["labels"].astype(np.int32), FASHION_MNIST_CLASSES)
