"""Images from a folder of PNG, JPEG, WebP and BMP files.

If every image lies in a folder below, the folders at the first level are the classes, in the order of their names' bytes, and
however deep an image lies below one it is of that class. If an image lies in the folder itself, there are no classes.
Archives are not opened: unpack them first.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from ddpm_jax.config import DataConfig
from ddpm_jax.data.decoding import UnusableImage, decode
from ddpm_jax.data.encoded import find_frame
from ddpm_jax.data.folder_index import Entry, cache_path, folder_index, read_file, shown
from ddpm_jax.data.framing import Frame
from ddpm_jax.data.image_set import ImageSet, StoredImages
from ddpm_jax.errors import InputError
from ddpm_jax.files import whole_file

logger = logging.getLogger("ddpm_jax")
NUM_NAMED = 3  # unusable files that a message names; a list on disk names them all
LARGEST_SCALE = 4  # an image that must be enlarged more than this in either direction is a blur: it is too small


class FolderImages(StoredImages):
    """Images that are read from their files, decoded and framed whenever they are asked for."""

    def __init__(self, folder: Path, names: Sequence[str], frame: Frame) -> None:
        super().__init__(len(names), frame.image_shape)
        self._folder, self._names, self._frame = folder, names, frame

    def read(
        self, indices: Int[np.ndarray, "B"], draws: Float[np.ndarray, "B 3"] | None = None
    ) -> UInt8[np.ndarray, "B H W C"]:
        """The images of these files; see StoredImages.read."""
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        for place, index in enumerate(indices):
            images[place] = self._image(self._names[index], None if draws is None else draws[place])
        return images

    def _image(self, name: str, draw: Float[np.ndarray, "3"] | None) -> UInt8[np.ndarray, "H W C"]:
        path = f"{self._folder}/{name}"
        target = None if self._frame.framing == "pad" else self._frame.cover  # of a padded image one side may be smaller
        try:
            return self._frame.fit(decode(read_file(path), self._frame.mode, target), draw)
        except OSError as error:
            raise InputError(f"{shown(path)} can no longer be read: {error.strerror}") from error
        except UnusableImage as error:
            raise InputError(f"{shown(path)} has changed since the run began: {error}") from error


def load_folder(path: Path, config: DataConfig) -> ImageSet:
    """The images of a folder, decoded when they are asked for, with the first level of folders as classes.

    Raises:
        InputError: images of several sizes without data.image_shape, no images, or more than data.max_unusable are unusable.
    """
    folder = path.resolve()
    index = folder_index(folder, config.num_workers)
    if not index:
        raise InputError(f"{path} holds no images: no file in it ends in .png, .jpg, .jpeg, .webp or .bmp (links don't count)")
    frame = _frame(path, config, folder, index)
    unusable = {name: reason for name, entry in index.items() if (reason := _why_unusable(entry, frame))}
    if unusable:
        _report(path, unusable, len(index), config.max_unusable)
    names = [name for name in index if name not in unusable]
    labels, class_names = _classes(path, names)
    return ImageSet(FolderImages(folder, names, frame), labels, class_names)


def _frame(path: Path, config: DataConfig, folder: Path, index: Mapping[str, Entry]) -> Frame:
    """The frame that a config asks for; where it names no shape, that of the images, which then have one size."""
    if config.image_shape is not None:
        return Frame.of(config)
    usable = [name for name, entry in index.items() if not entry.reason]
    if len({(index[name].width, index[name].height) for name in usable}) > 1:
        raise InputError(f"{path} holds images of several sizes: data.image_shape must be given, such as 64 64 3")
    if not usable:
        return Frame(1, 1, 3)  # for none of them: all will be named
    return find_frame(config, len(usable), lambda places: [read_file(f"{folder}/{usable[place]}") for place in places])


def _why_unusable(entry: Entry, frame: Frame) -> str:
    """Why a file can't be used for this frame; empty if it can."""
    if entry.reason:
        return entry.reason
    if entry.width * LARGEST_SCALE < frame.width or entry.height * LARGEST_SCALE < frame.height:
        return f"{entry.width}x{entry.height} pixels are too few for {frame.width}x{frame.height}"
    return ""


def _report(path: Path, unusable: dict[str, str], num_files: int, max_unusable: float) -> None:
    """Name the unusable files in one line, and all of them in a text file; raise InputError if they are too many."""
    lines = [f"{shown(name)}: {reason}" for name, reason in unusable.items()]
    named = "; ".join(lines[:NUM_NAMED])
    if len(lines) > NUM_NAMED:
        named += f"; and {len(lines) - NUM_NAMED} more"
    everything = cache_path(path, ".unusable.txt")
    try:
        with whole_file(everything) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
        named += f" (all in {everything})"
    except OSError:  # nowhere to write the list
        pass
    what = f"{path}: {len(lines)} of {num_files} image files are unusable"
    if len(lines) == num_files or len(lines) > max_unusable * num_files:
        advice = f"more than data.max_unusable = {max_unusable:g} allows: mend or remove them, or raise it"
        raise InputError(f"{what}, {advice}: {named}")
    logger.warning("%s and are skipped: %s", what, named)


def _classes(path: Path, names: Sequence[str]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels int32 [N] by first-level folder, and the folders' names; neither where an image lies in no such folder."""
    num_outside = sum("/" not in name for name in names)
    if num_outside:
        if num_outside < len(names):
            logger.warning("%s: no classes, because %d images lie in no folder of their own below it", path, num_outside)
        return None, ()
    folders = [name.partition("/")[0] for name in names]
    classes = sorted(set(folders), key=os.fsencode)
    label = {name: number for number, name in enumerate(classes)}
    return np.array([label[name] for name in folders], np.int32), tuple(map(shown, classes))
