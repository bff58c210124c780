"""Pictures: uint8 arrays as grids, PNG files and animated GIFs, and image files as arrays."""

import itertools
import logging
import math
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps

from ddpm_jax.errors import InputError
from ddpm_jax.files import whole_file

CELL_PIXELS = 64  # smaller images are enlarged to at least this in grids, each pixel to a square
GAP_PIXELS = 2
GIF_SECONDS = 4.0
GIF_LAST_SECONDS = 2.0
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names for pictures of so many channels

logger = logging.getLogger("ddpm_jax")


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
    _write_npz(path, len(images), [images])


def save_folder(path: Path, images: UInt8[np.ndarray, "N H W C"], first: int = 0) -> None:
    """Write each image as 000000.png, 000001.png, ... in a folder, counted from `first`, without enlarging it."""
    for index, image in enumerate(images, first):
        with whole_file(path / f"{index:06d}.png") as file:
            to_pil(image).save(file, format="png")


def _write_npz(path: Path, num_images: int, pieces: Iterable[UInt8[np.ndarray, "B H W C"]]) -> None:
    """An .npz file of pieces that needn't all be in memory; the same bytes however they are cut and whenever written."""
    entry = zipfile.ZipInfo("images.npy")  # dated 1980
    entry.compress_type = zipfile.ZIP_DEFLATED
    with whole_file(path) as file, zipfile.ZipFile(file, "w") as archive, archive.open(entry, "w", force_zip64=True) as array:
        for number, image in enumerate(itertools.chain.from_iterable(pieces)):
            if number == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *image.shape)}
                np.lib.format.write_array_header_1_0(array, header)
            array.write(image.tobytes())


def read_image(path: Path, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "H W C"]:
    """An image file of any size and mode as an image of the given shape; what had to be changed is logged.

    The largest part of the right aspect ratio is cut from the middle and resized; what is transparent becomes white unless
    there are four channels. Pictures that are already right come through to the bit.

    Raises:
        InputError: no such file, not an image, or one that can't be converted.
    """
    height, width, channels = shape
    if channels not in MODES:
        raise InputError(f"{path}: image files hold 1, 3 or 4 channels, but the model's images have {channels}")
    picture = _open(path)
    if channels != 4 and picture.has_transparency_data:
        picture = on_ground(picture, "white")
    made = ImageOps.fit(_convert(path, picture, MODES[channels]), (width, height), Image.Resampling.BICUBIC)
    if (picture.size, picture.mode) != (made.size, made.mode):
        logger.info("%s: %dx%d %s made %dx%d %s (centre crop)", path, *picture.size, picture.mode, width, height, made.mode)
    return np.asarray(made).reshape(shape)


def read_mask(path: Path, image: Path, shape: tuple[int, int, int]) -> Bool[np.ndarray, "H W 1"]:
    """The mask in an image file: True where it is white (128 or more); cropped and resized as images are; transparent is black.

    Raises:
        InputError: as read_image; or a mask of another aspect ratio than the image or the shape, or without white.
    """
    height, width, _ = shape
    picture = _open(path)
    sizes = (_open(image).size, (width, height))
    if not any(math.isclose(picture.width * h, picture.height * w, rel_tol=0.02) for w, h in sizes):
        proportions = " nor ".join(f"{w}x{h}" for w, h in sizes)
        raise InputError(f"{path}: a mask of {picture.width}x{picture.height} has the proportions neither of {proportions}")
    if picture.has_transparency_data:
        picture = on_ground(picture, "black")
    mask = np.asarray(ImageOps.fit(_convert(path, picture, "L"), (width, height), Image.Resampling.BOX)) >= 128
    if not mask.any():
        raise InputError(f"{path}: the mask has no white: paint white what is to be made anew, and black what is to be kept")
    return mask[..., None]


def _open(path: Path) -> Image.Image:
    """The picture in a file, upright, with 8 bits for each channel."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is not an image, or a damaged one"
        raise InputError(f"{path} can't be read as an image: {reason}") from error
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would not scale but cut off
        picture = Image.fromarray(np.clip(np.round(np.asarray(picture) / 257.0), 0, 255).astype(np.uint8))
    return picture


def _convert(path: Path, picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode in ("F", "LAB"):
        raise InputError(
            f"{path}: pixels of mode {picture.mode} have no colour of their own: save it as grey or RGB with 8 bits"
        )
    return picture.convert(mode)


def on_ground(picture: Image.Image, colour: str) -> Image.Image:
    """The picture as RGBA, laid on a colour where it is transparent."""
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, colour), picture)


SAVERS = {".png": save_grid, ".gif": save_gif, ".npz": save_npz, "": save_folder}


def check_output(path: Path, channels: int, begun: bool = False) -> str:
    """The kind of output that a path asks for: ".png", ".gif", ".npz", or "" for a folder.

    Args:
        path: file or folder to write.
        channels: of the images.
        begun: whether an earlier start may have written a part of it.

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
    if not kind and not begun and next(path.glob("*.png"), None) is not None:
        raise InputError(f"--out {path} holds PNG files already: choose another folder, or remove them")
    folder = path.parent if kind else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out {path}: can't write there: {error.strerror}") from error
    return kind


def save_pieces(path: Path, kind: str, num_images: int, pieces: Iterable[tuple[int, UInt8[np.ndarray, "B H W C"]]]) -> None:
    """Write what save_output would of images that come in pieces, each with the number of its first, in order.

    A folder may be given some of the pieces; of it and of ".npz" only one piece at a time is in memory.
    """
    if kind == "":
        for first, images in pieces:
            save_folder(path, images, first)
    elif kind == ".npz":
        _write_npz(path, num_images, (images for _, images in pieces))
    else:
        SAVERS[kind](path, np.concatenate([images for _, images in pieces]))


def save_output(path: Path, kind: str, images: UInt8[np.ndarray, "... N H W C"]) -> None:
    """Write images [N, H, W, C], or for ".gif" frames [F, N, H, W, C], as check_output said."""
    try:
        SAVERS[kind](path, images)
    except OSError as error:
        raise InputError(f"--out {path}: can't write there: {error.strerror}") from error
