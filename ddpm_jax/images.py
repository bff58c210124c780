"""Pictures: uint8 arrays as grids, PNG files and animated GIFs."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ddpm_jax.errors import InputError

CELL_PIXELS = 64  # smaller images are enlarged to at least this in grids, each pixel to a square
GAP_PIXELS = 2
GIF_SECONDS = 4.0
GIF_LAST_SECONDS = 2.0


def make_grid(images: UInt8[np.ndarray, "N H W C"], columns: int | None = None) -> UInt8[np.ndarray, "H2 W2 C2"]:
    """One picture of all images, row by row, as square as it goes; a number of channels other than 1, 3, 4 shows the first."""
    if images.shape[-1] not in (1, 3, 4):
        images = images[..., :1]
    scale = max(1, math.ceil(CELL_PIXELS / images.shape[1]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = -(-count // columns)
    cell_height, cell_width = height + GAP_PIXELS, width + GAP_PIXELS
    grid = np.full((rows * cell_height - GAP_PIXELS, columns * cell_width - GAP_PIXELS, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * cell_height, index % columns * cell_width
        grid[top : top + height, left : left + width] = image
    return grid


def to_pil(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    """A Pillow image: one channel as grey, three as RGB, four as RGBA."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_grid(path: Path, images: UInt8[np.ndarray, "N H W C"]) -> None:
    """Write the images as one PNG grid."""
    with whole_file(path) as file:
        to_pil(make_grid(images)).save(file, format="png")


def save_gif(path: Path, frames: UInt8[np.ndarray, "F N H W C"]) -> None:
    """Write an animated GIF of grids; the last frame stays longer."""
    pictures = [to_pil(make_grid(frame)) for frame in frames]
    pause = int(1000 * GIF_SECONDS / len(pictures))
    durations = [pause] * (len(pictures) - 1) + [int(1000 * GIF_LAST_SECONDS)]
    animation = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    with whole_file(path) as file:
        pictures[0].save(file, format="gif", optimize=False, **animation)  # optimising, Pillow mixes palettes up


def save_npz(path: Path, images: UInt8[np.ndarray, "N H W C"]) -> None:
    """Write the images as the array "images" of a compressed .npz file."""
    with whole_file(path) as file:
        np.savez_compressed(file, images=images)


def save_folder(path: Path, images: UInt8[np.ndarray, "N H W C"]) -> None:
    """Write each image as 000000.png, 000001.png, ... in a folder, without enlarging it."""
    path.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        to_pil(image).save(path / f"{index:06d}.png")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when it is whole; what was there before stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


SAVERS = {".png": save_grid, ".gif": save_gif, ".npz": save_npz, "": save_folder}


def check_output(path: Path, channels: int) -> str:
    """The kind of output that a path asks for: ".png", ".gif", ".npz", or "" for a folder.

    Raises:
        InputError: an unknown ending, or a place that can't be written to.
    """
    kind = path.suffix.lower()
    if kind not in SAVERS:
        raise InputError(f"--out {path}: unknown ending {path.suffix!r}: use .png, .gif, .npz, or a folder without an ending")
    if kind and path.is_dir():
        raise InputError(f"--out {path} is a folder: give the name of a file in it")
    if not kind and path.is_file():
        raise InputError(f"--out {path} is a file: end the name in .png, .gif or .npz, or choose a folder")
    if not kind and channels not in (1, 3, 4):
        raise InputError(f"--out {path}: images of {channels} channels can't be PNG files: use an .npz file")
    if not kind and next(path.glob("*.png"), None) is not None:
        raise InputError(f"--out {path} holds PNG files already: choose another folder, or remove them")
    folder = path.parent if kind else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out {path}: can't write there: {error.strerror}") from error
    return kind


def save_output(path: Path, kind: str, images: UInt8[np.ndarray, "... N H W C"]) -> None:
    """Write images [N, H, W, C], or for ".gif" frames [F, N, H, W, C], as check_output said."""
    try:
        SAVERS[kind](path, images)
    except OSError as error:
        raise InputError(f"--out {path}: can't write there: {error.strerror}") from error
