"""2,000 damaged files through the folder source: no crash, no hang, each counted and named once, memory bounded."""

import io
import logging
import resource
import time

import numpy as np
import pytest
from PIL import Image
from test_decoding import bombs, encoded

from ddpm_jax import DataConfig
from ddpm_jax.data import load_images
from ddpm_jax.data.folder_index import cache_path

NUM_FILES = 2000
SECONDS = 120
MEGABYTES = 500  # one image of the largest allowed size, decoded and flattened, would take more than this


def whole_files(random):
    """One good file of each kind."""
    pixels = random.integers(0, 256, (32, 32, 4), np.uint8)
    rgba, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    rgb = rgba.convert("RGB")
    frames = [Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(3)]
    animated = [encoded(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("PNG", "WEBP")]
    return [encoded(rgba), encoded(rgb.quantize(40)), encoded(grey), encoded(rgb, "JPEG"), encoded(rgb, "BMP"),
            encoded(rgb, "JPEG", progressive=True), encoded(rgb.convert("CMYK"), "JPEG"), encoded(rgba, "WEBP"),
            encoded(rgba.convert("LA")), encoded(Image.new("RGB", (1, 500))), encoded(rgba, "GIF"), *animated]  # fmt: skip


def damaged(number, whole, random):
    """File `number`: cut short, bits flipped, a piece zeroed, doubled or moved, header bytes changed, or something else."""
    data = bytearray(whole[number % len(whole)])
    place = int(random.integers(len(data)))
    kind = (number // len(whole)) % 8
    if kind == 0:
        return bytes(data[:place])
    if kind in (1, 2):
        for place in random.integers(len(data) if kind == 1 else min(64, len(data)), size=1 + number % 5):
            data[place] ^= 1 << int(random.integers(8))
    elif kind == 3:
        data[place : place + 40] = bytes(min(40, len(data) - place))
    elif kind == 4:
        data[place:place] = data[: int(random.integers(200))]
    elif kind == 5:
        return random.bytes(int(random.integers(300))) if number % 3 else b""
    elif kind == 6:
        return list(bombs().values())[number % 4]
    return bytes(data)


@pytest.mark.filterwarnings("error")
def test_damaged_files(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("ddpm_jax"), "propagate", True)
    caplog.set_level(logging.WARNING)
    random = np.random.default_rng(2000)
    whole, folder = whole_files(random), tmp_path / "set"
    folder.mkdir()
    endings = ("png", "jpg", "webp", "bmp", "jpeg", "gif")
    for number in range(NUM_FILES):
        name = f"{number:04d}.{endings[int(random.integers(6))]}"  # most of them wrong
        (folder / name).write_bytes(damaged(number, whole, random))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    image_set = load_images(DataConfig(source=str(folder), image_shape=(32, 32, 3), max_unusable=1.0))
    images = image_set.images[:]  # what was found usable can be read
    assert time.monotonic() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES
    lines = cache_path(folder, ".unusable.txt").read_text().splitlines()
    unusable = [line.partition(": ")[0] for line in lines]
    assert len(images) + len(unusable) == NUM_FILES and len(set(unusable)) == len(unusable)
    usable = {name.name for name in folder.iterdir()} - set(unusable)
    assert len(usable) == len(images) and 300 < len(usable) < 1500
    assert all(line.partition(": ")[2] for line in lines)
    assert [f"{len(unusable)} of {NUM_FILES}" in record.message for record in caplog.records] == [True]
    for name in usable:  # Pillow's own way of reading agrees that there is an image
        Image.open(io.BytesIO((folder / name).read_bytes())).size  # noqa: B018
