"""Pictures to measure with: smooth shapes, edges and grain in about the proportions of a photo, the same ones from any seed."""

import concurrent.futures
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 8  # subfolders
FIELD = 1536  # pixels of the edge of the picture that all are cut from
CROP = 256  # what a small PNG shows of it, before it is shrunk


def write_pngs(folder: Path, count: int, size: int = 64) -> None:
    """PNG files of size x size pixels, RGB, in CLASSES subfolders."""
    field = make_field()

    def write(number: int) -> None:
        picture = _cut(field, number, CROP, CROP).resize((size, size), Image.Resampling.BOX)
        picture.save(_path(folder, number, "png"))

    _write_all(folder, count, write)


def write_jpegs(folder: Path, count: int, width: int = 500, height: int = 375) -> None:
    """JPEG files of quality 90, in CLASSES subfolders."""
    field = make_field()

    def write(number: int) -> None:
        _cut(field, number, width, height).save(_path(folder, number, "jpg"), quality=90)

    _write_all(folder, count, write)


def make_field() -> Image.Image:
    """A picture with edges, whose power falls with the frequency to the power 2.6, a little faster than that of photos."""
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(FIELD)[:, None], np.fft.rfftfreq(FIELD)[None, :])
    amplitude = np.maximum(frequency, 1 / FIELD) ** -1.3

    def layer() -> np.ndarray:
        shape = frequency.shape
        noise = generator.standard_normal(shape) + 1j * generator.standard_normal(shape)
        values = np.fft.irfft2(amplitude * noise, (FIELD, FIELD))
        return (values - values.mean()) / values.std()

    # Colours of a photo go mostly together; where the shape's sign changes, one material ends and another begins.
    light, shape = layer(), np.sign(layer())
    channels = [light + 0.15 * layer() + 0.5 * shape * strength for strength in generator.uniform(-1, 1, 3)]
    return Image.fromarray(np.clip(128 + 45 * np.stack(channels, axis=-1), 0, 255).astype(np.uint8))


def _cut(field: Image.Image, number: int, width: int, height: int) -> Image.Image:
    left, top = np.random.default_rng(number + 1).integers(0, (FIELD - width, FIELD - height))
    return field.crop((left, top, left + width, top + height))


def _path(folder: Path, number: int, ending: str) -> Path:
    return folder / f"class{number % CLASSES}" / f"{number:06d}.{ending}"


def _write_all(folder: Path, count: int, write: Callable[[int], None]) -> None:
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))
