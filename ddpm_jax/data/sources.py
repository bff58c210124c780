"""Where images come from: the source that a config names."""

import difflib
import importlib.resources
from pathlib import Path

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data.arrays import holds_arrays, load_arrays
from ddpm_jax.data.folders import load_folder
from ddpm_jax.data.framing import framed
from ddpm_jax.data.hugging_face import load_hugging_face
from ddpm_jax.data.image_set import ImageSet
from ddpm_jax.data.records import is_prepared, load_records
from ddpm_jax.data.tensorflow_datasets import known_to_tfds, load_tfds, nearest_in_tfds
from ddpm_jax.errors import InputError

PACKAGED = {"fashion_mnist": "fashion_mnist_10k.npz"}
FASHION_MNIST_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

KINDS = (
    f"give a packaged set ({', '.join(PACKAGED)}), an .npy or .npz file, a folder with images, such files or what prepare.py"
    " has made, tfds:NAME of TensorFlow Datasets, or hf:NAME or hf:FOLDER of Hugging Face datasets"
)


def load_images(config: DataConfig) -> ImageSet:
    """The images that a config names, checked, at its image_shape.

    Raises:
        InputError: no such set or file, or images that can't be used.
    """
    source, path = config.source, Path(config.source).expanduser()
    if source in PACKAGED:
        return framed(load_packaged(source), config)
    if is_prepared(path):  # asked before other folders: its labels are an .npy file
        return framed(load_records(path), config)
    if source.startswith("tfds:"):
        return load_tfds(source.removeprefix("tfds:"), config)
    if source.startswith("hf:"):
        return load_hugging_face(source.removeprefix("hf:"), config)
    is_folder = bool(source) and path.is_dir()
    if path.is_file() or (is_folder and holds_arrays(path)):
        return framed(load_arrays(path), config)
    if is_folder:  # no other kind of folder
        return load_folder(path, config)
    if known_to_tfds(source):
        return load_tfds(source, config)
    nearest = difflib.get_close_matches(source, PACKAGED, n=1) or nearest_in_tfds(source)[:1]
    hint = f": did you mean {nearest[0]!r}? Otherwise " if nearest else ": "
    raise InputError(f"data.source = {source!r} can't be found{hint}{KINDS}")


def load_packaged(name: str) -> ImageSet:
    """A set that comes with the package: "fashion_mnist", 10,000 images of 28x28x1 in ten classes."""
    resource = importlib.resources.files("ddpm_jax.data") / "packaged" / PACKAGED[name]
    with resource.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return ImageSet(arrays["images"][..., None], arrays["labels"].astype(np.int32), FASHION_MNIST_CLASSES)
