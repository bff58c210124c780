"""Images drawn into files by all devices and processes, in parts that outlast a kill.

    OUT.parts/drawing.json               what decides the images
    OUT.parts/00000064-00000128.part     images 64 ... 127: a checksum and their bytes
    OUT.parts/.lock                      held while they are drawn

Each process draws its share of the ranges that are not there yet. When none is missing the parts are joined to OUT, and
removed. An image depends on its number alone (inference.py), so that OUT has the same bytes whatever was killed on the way.
They are the same for any number of devices too if every device has a whole batch to draw; with fewer images the ranges are
shorter, and another program may round an image by one grey level.
"""

import dataclasses
import glob
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from ddpm_jax.config import Config, to_json
from ddpm_jax.errors import InputError
from ddpm_jax.files import remove_debris, whole_file
from ddpm_jax.images import save_pieces
from ddpm_jax.inference import Model, draw_ranges
from ddpm_jax.lock import LOCK, hold
from ddpm_jax.metrics import sample_progress
from ddpm_jax.processes import check_shared, is_first, wait_for_all
from ddpm_jax.ranges import Range, gaps, rows_of_range

FORMAT = 1  # part of every description: to be raised by whoever changes what the images are
DESCRIPTION = "drawing.json"
PART_NAME = re.compile(r"(\d{8,})-(\d{8,})\.part")
OWN_NAMES = re.compile(rf"\.?({PART_NAME.pattern}|{re.escape(DESCRIPTION)})(\.[0-9a-f]+\.tmp)?|\.shared\.[0-9a-f]+")
CHECKSUM_BYTES = 4

logger = logging.getLogger("ddpm_jax")


def parts_folder(out: Path) -> Path:
    """Where the parts of an output lie while it is being drawn."""
    return out.with_name(f"{out.name}.parts")


def needs_parts(model: Model, out: Path, num_images: int, batch_size: int | None) -> bool:
    """Whether a drawing is more than one batch of one process, or was begun in parts."""
    at_once = (batch_size or model.config.sample.batch_size) * model.mesh.size
    return jax.process_count() > 1 or num_images > at_once or parts_folder(out).is_dir()


def draw_in_parts(
    model: Model,
    out: Path,
    kind: str,
    num_images: int,
    seed: int,
    labels: int | Int[np.ndarray, " N"] | None,
    settings: Mapping[str, Any],
) -> None:
    """Draw what model.sample would, and write it as images.save_output would; the same call goes on where one was killed.

    All processes must call it, with the same arguments and one file system. They need one another only where it begins and
    ends, not to draw.

    Args:
        model: on the devices of this process.
        out: file or folder to write.
        kind: ".npz", ".png" or "" for a folder, as images.check_output says.
        num_images: as in model.sample, like the next two.
        seed: that of the noise.
        labels: one class for all images, or one for each.
        settings: those of config.sample that are given.

    Raises:
        InputError: a setting out of range, parts of another drawing, or a place that can't be written to.
    """
    config, classes = model.settle(settings, num_images, seed, labels)
    parts = Parts(parts_folder(out), _description(model, config, num_images, seed, classes), model.image_shape)
    rows = rows_of_range(config.sample.batch_size, num_images, model.mesh.size * jax.process_count())
    try:
        with _begun(parts):
            stored = _whole_parts(parts)
            _draw_missing(model, config, parts, gaps(stored, 0, num_images, rows), rows, seed, classes)
            wait_for_all("all parts are drawn")
            _join(parts, out, kind, num_images)
            os.sync()  # the parts go once the result is on the disk
            wait_for_all("the parts are joined")
            if is_first():
                _remove_traces(parts, out, kind)
        if is_first():
            with suppress(OSError):  # other files lie in it
                parts.folder.rmdir()
    except OSError as error:
        raise InputError(f"--out {out}: can't write there: {error.strerror}; the same command goes on") from error


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of one drawing."""

    folder: Path
    """Where they lie."""
    description: dict[str, Any]
    """What decides the images, as JSON has it."""
    shape: tuple[int, int, int]
    """Height, width and channels of an image."""

    def stored(self) -> dict[int, int]:
        """The ranges {start: stop} that are there, whole or damaged, in order."""
        names = (PART_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return dict(sorted((int(name[1]), int(name[2])) for name in names if name))

    def path(self, each: Range) -> Path:
        """The file of a range."""
        return self.folder / f"{each[0]:08d}-{each[1]:08d}.part"

    def write(self, each: Range, images: UInt8[np.ndarray, "B H W C"]) -> None:
        """Write the images of a range, whole or not at all."""
        content = images.tobytes()
        with whole_file(self.path(each)) as file:
            file.write(self._checksum(each, content) + content)

    def read(self, each: Range) -> UInt8[np.ndarray, "B H W C"] | None:
        """The images of a range; None where its file is absent or not as it was written."""
        shape = (each[1] - each[0], *self.shape)
        content = self.path(each).read_bytes() if self.path(each).exists() else b""
        checksum, pixels = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
        if len(pixels) != np.prod(shape) or checksum != self._checksum(each, pixels):
            return None
        return np.frombuffer(pixels, np.uint8).reshape(shape)

    def clear(self) -> None:
        """Remove what was written; other files stay."""
        (self.folder / DESCRIPTION).unlink(missing_ok=True)  # first: without it, parts are no drawing's
        for path in self.folder.iterdir():
            if OWN_NAMES.fullmatch(path.name):
                path.unlink()

    def _checksum(self, each: Range, pixels: bytes) -> bytes:
        """Of the pixels, their place and the drawing: what was moved here from elsewhere doesn't pass."""
        start = zlib.crc32(f"{self.path(each).name} {json.dumps(self.description)}".encode())
        return zlib.crc32(pixels, start).to_bytes(CHECKSUM_BYTES, "little")


@contextmanager
def _begun(parts: Parts) -> Iterator[None]:
    """The folder of the parts, made where it is absent, with its description; held by one drawing at a time."""
    path = parts.folder / DESCRIPTION
    check_shared(parts.folder)
    parts.folder.mkdir(parents=True, exist_ok=True)
    with _held(parts.folder) if is_first() else nullcontext():
        if is_first() and not path.exists():
            parts.clear()  # what a kill has left of a drawing that was done
            with whole_file(path) as file:
                file.write((json.dumps(parts.description, indent=2) + "\n").encode())
        wait_for_all("the drawing is described")
        _check_same(path, parts)
        yield


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder's lock, taken. Raises InputError where another drawing has it."""
    path = folder / LOCK
    with path.open("ab") as file:
        # One that ends removes the file: that which was opened before may no longer be the one that others find.
        if not hold(file.fileno(), folder) or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise InputError(f"another process is drawing into {folder}: wait for it, or stop it")
        yield


def _check_same(path: Path, parts: Parts) -> None:
    """Raise InputError where the folder holds parts of another drawing."""
    try:
        old = json.loads(path.read_text())
        changed = [f"{name}: {old.get(name)} -> {new}" for name, new in parts.description.items() if old.get(name) != new]
    except (OSError, ValueError, AttributeError):
        changed = [f"{DESCRIPTION} can't be read"]
    if changed:
        what = f"{parts.folder} holds parts of another drawing ({'; '.join(changed)})"
        raise InputError(f"{what}: remove it, or choose another --out")


def _description(
    model: Model, config: Config, num_images: int, seed: int, classes: Int[np.ndarray, " N"] | None
) -> dict[str, Any]:
    """All that decides the images, as it comes back from JSON."""
    labels = None if classes is None else f"{zlib.crc32(classes.astype('<i4').tobytes()):08x}"
    fields = {name: value for name, value in to_json(config).items() if name.startswith(("diffusion.", "model.", "sample."))}
    del fields["sample.batch_size"]
    described = {
        "format": FORMAT, "num_images": num_images, "image_shape": model.image_shape, "seed": seed, "labels": labels,
        "step": model.step, "weights": model.weights, "fingerprint": model.fingerprint, **fields,
    }  # fmt: skip
    return json.loads(json.dumps(described))


def _whole_parts(parts: Parts) -> dict[int, int]:
    """The ranges {start: stop} of the parts that are whole; damaged ones are removed."""
    stored = list(parts.stored().items())
    wait_for_all("the parts are listed")
    for each in stored[jax.process_index() :: jax.process_count()]:
        if parts.read(each) is None:
            logger.warning("%s is damaged: its images are drawn again", parts.path(each))
            parts.path(each).unlink(missing_ok=True)
    wait_for_all("the parts are checked")
    return parts.stored()


def _draw_missing(
    model: Model,
    config: Config,
    parts: Parts,
    missing: list[Range],
    rows: int,
    seed: int,
    classes: Int[np.ndarray, " N"] | None,
) -> None:
    """Draw this process's share of the ranges. Its progress stands for that of all."""
    count, total = jax.process_count(), parts.description["num_images"]
    num_missing, done, began = sum(stop - start for start, stop in missing), 0, time.perf_counter()
    wait_for_all("all know what is missing")  # before the first part is written
    if num_missing < total and is_first():
        logger.info("%s holds %d of the %d images already", parts.folder, total - num_missing, total)
    share = missing[jax.process_index() :: count]
    with sample_progress(num_missing) as on_batch:
        for batch in draw_ranges(config, model.mesh, model.params, seed, share, rows, classes):
            for each, images in batch.items():
                parts.write(each, images)
                done += len(images)
            if is_first():
                on_batch(min(num_missing, done * count))
    if num_missing and is_first():
        seconds = time.perf_counter() - began
        logger.info("%d images in %.0f s, %.1f a second by %d devices",
                    num_missing, seconds, num_missing / seconds, model.mesh.size * count)  # fmt: skip


def _join(parts: Parts, out: Path, kind: str, num_images: int) -> None:
    """Write the output of all parts. Files of a folder are written by all processes, a single one by the first."""
    stored = parts.stored()
    missing = gaps(stored, 0, num_images, num_images)
    if missing:
        start, stop = missing[0]
        what = f"{parts.folder}: images {start} ... {stop - 1} are missing"
        raise InputError(f"{what}: all processes need the same folder; the same command goes on")
    mine = list(stored.items())
    if kind == "":
        mine = mine[jax.process_index() :: jax.process_count()]
    elif not is_first():
        return
    save_pieces(out, kind, num_images, ((start, _read(parts, (start, stop))) for start, stop in mine))


def _read(parts: Parts, each: Range) -> UInt8[np.ndarray, "B H W C"]:
    images = parts.read(each)
    if images is None:
        raise InputError(f"{parts.path(each)} is damaged: the same command draws its images again")
    return images


def _remove_traces(parts: Parts, out: Path, kind: str) -> None:
    """Remove what lies there besides the output, the lock last, and while it is held."""
    if kind == "":
        remove_debris(out, "*.png")
    else:
        remove_debris(out.parent, glob.escape(out.name))
    parts.clear()
    (parts.folder / LOCK).unlink(missing_ok=True)
