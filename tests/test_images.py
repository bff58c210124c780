"""Pictures: grids pixel by pixel, and files that read back as what was written."""

import errno
import math
import os

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import one_line_error
from hypothesis import given
from PIL import Image

from ddpm_jax.images import (
    CELL_PIXELS,
    GAP_PIXELS,
    check_output,
    make_grid,
    save_folder,
    save_gif,
    save_grid,
    save_output,
    to_pil,
)
from ddpm_jax.inference import to_uint8

RANDOM = np.random.default_rng(0)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def random_images(*shape):
    return RANDOM.integers(0, 256, shape, np.uint8)


def read(path):
    """A picture's pixels, always with a channel axis."""
    with Image.open(path) as picture:
        return np.asarray(picture).reshape(picture.height, picture.width, -1)


def looped_grid(images, columns):
    """The grid, asked pixel by pixel: which cell is here, which pixel of its image?"""
    count, height, width, channels = images.shape
    scale = 1
    while height * scale < CELL_PIXELS:
        scale += 1
    rows = math.ceil(count / columns)
    cell_height, cell_width = height * scale + GAP_PIXELS, width * scale + GAP_PIXELS
    grid = np.zeros((rows * cell_height - GAP_PIXELS, columns * cell_width - GAP_PIXELS, channels), np.uint8)
    for y in range(grid.shape[0]):
        for x in range(grid.shape[1]):
            (row, down), (column, along) = divmod(y, cell_height), divmod(x, cell_width)
            number, inside = row * columns + column, down < height * scale and along < width * scale
            grid[y, x] = images[number, down // scale, along // scale] if inside and number < count else 255
    return grid


@pytest.mark.parametrize(
    ("shape", "columns"),
    [((1, 28, 28, 1), 1), ((2, 16, 16, 3), 2), ((3, 30, 20, 1), 2), ((4, 64, 64, 3), 2), ((5, 9, 7, 4), 3), ((7, 70, 3, 1), 3),
     ((10, 8, 8, 1), 4)],
)  # fmt: skip
def test_grid_layout(shape, columns):
    images = random_images(*shape)
    np.testing.assert_array_equal(make_grid(images), looped_grid(images, columns), strict=True)


@pytest.mark.parametrize(("asked", "columns"), [(1, 1), (2, 2), (5, 5), (9, 5)])
def test_grid_columns(asked, columns):
    images = random_images(5, 32, 32, 1)
    np.testing.assert_array_equal(make_grid(images, asked), looped_grid(images, columns), strict=True)


@pytest.mark.parametrize("channels", [2, 5, 8])
def test_grid_of_other_channel_counts_shows_the_first(channels):
    images = random_images(3, 32, 32, channels)
    np.testing.assert_array_equal(make_grid(images), looped_grid(images[..., :1], 2), strict=True)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pillow_modes(channels):
    image = random_images(5, 6, channels)
    picture = to_pil(image)
    assert picture.mode == MODES[channels] and picture.size == (6, 5)
    for y, x in ((0, 0), (4, 5), (2, 3)):
        assert np.ravel(picture.getpixel((x, y))).tolist() == image[y, x].tolist()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grid_file(tmp_path, channels):
    images = random_images(6, 20, 20, channels)
    path = tmp_path / "new" / "folder" / "grid.png"
    save_grid(path, images)
    np.testing.assert_array_equal(read(path), looped_grid(images if channels != 2 else images[..., :1], 3), strict=True)
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    save_grid(path, random_images(1, 64, 64, 1))
    before = path.read_bytes()

    def fail(self, file, **options):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", fail)
    for name, save in (("grid.png", save_grid), ("new.png", save_grid), ("new.gif", save_gif)):
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / name, random_images(*(1, 64, 64, 1)[: 4 if save is save_grid else 0] or (2, 1, 64, 64, 1)))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    ("count", "levels"),
    [(2, 256), (5, 256), (40, 256), (3, 100), (3, 200)],
)
def test_gif(tmp_path, count, levels):
    """Noise, which has all grey levels, and then frames of fewer."""
    frames = np.concatenate([random_images(1, 3, 64, 64, 1), RANDOM.integers(50, 50 + levels, (count - 1, 3, 64, 64, 1)) % 256])
    frames = frames.astype(np.uint8)
    save_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.format == "GIF" and picture.n_frames == count and picture.info["loop"] == 0
        durations = []
        for index in range(count):
            picture.seek(index)
            durations.append(picture.info["duration"])
            # Grey has no more than 256 values, so nothing need be lost to the palette.
            np.testing.assert_array_equal(np.asarray(picture.convert("L"))[..., None], looped_grid(frames[index], 2))
    assert len(set(durations[:-1])) == 1 and durations[-1] >= durations[0] > 0
    assert count < 5 or durations[-1] > durations[0]


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_gif_of_other_channel_counts(tmp_path, channels):
    colours = np.array([[255, 0, 0, 255], [0, 0, 255, 255], [0, 255, 0, 255], [255, 255, 255, 255]], np.uint8)[:, :channels]
    frames = colours[RANDOM.integers(0, 4, (3, 2, 64, 64))]
    save_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 3
        for index, frame in enumerate(frames):
            picture.seek(index)
            shown = frame[..., :3] if channels > 2 else frame[..., :1].repeat(3, axis=-1)
            np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), looped_grid(shown, 2))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_folder(tmp_path, channels):
    images = random_images(12, 5, 7, channels)
    folder = tmp_path / "a" / "b"
    save_folder(folder, images)
    assert sorted(entry.name for entry in folder.iterdir()) == [f"{index:06d}.png" for index in range(12)]
    for index, image in enumerate(images):
        np.testing.assert_array_equal(read(folder / f"{index:06d}.png"), image, strict=True)


@pytest.mark.parametrize(
    ("name", "channels", "kind"),
    [("a.png", 1, ".png"), ("a.PNG", 2, ".png"), ("b/c.gif", 3, ".gif"), ("b.c/a.npz", 5, ".npz"), ("a", 4, "")],
)
def test_kinds_of_output(tmp_path, name, channels, kind):
    assert check_output(tmp_path / name, channels) == kind
    assert (tmp_path / name).parent.is_dir()
    assert [entry for entry in tmp_path.rglob("*") if entry.is_file()] == []


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.png").mkdir()
    for name in ("a.jpg", "a.tar.gz", "a.png.tmp"):
        one_line_error(check_output, tmp_path / name, 1, fragments=[name, "unknown ending", ".png", ".gif", ".npz"])
    for name in ("file", "folder.png", "file/a.png", "file/a", "file/a/b.npz"):
        one_line_error(check_output, tmp_path / name, 1, fragments=[str(tmp_path / name)])
    for channels in (2, 5):
        one_line_error(check_output, tmp_path / "a", channels, fragments=[str(tmp_path / "a"), str(channels), ".npz"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder.png"]
    assert (tmp_path / "file").read_text() == "kept"


def test_folder_that_holds_pictures_already(tmp_path):
    save_folder(tmp_path, random_images(2, 5, 7, 3))
    one_line_error(check_output, tmp_path, 3, fragments=[str(tmp_path), "PNG"])


def test_output_that_fails_while_it_is_written(tmp_path):
    """The disk is full, say; a folder in the way stands for it."""
    for kind in (".gif", ".npz"):
        path = tmp_path / f"a{kind}"
        path.mkdir()
        shape = (2, 1, 64, 64, 1) if kind == ".gif" else (1, 64, 64, 1)
        one_line_error(save_output, path, kind, random_images(*shape), fragments=[str(path), os.strerror(errno.EISDIR)])


@pytest.mark.parametrize("name", ["a.npz", "a.b.npz", "a.NPZ"])
def test_npz_output(tmp_path, name):
    images = random_images(4, 3, 2, 5)
    save_output(tmp_path / name, check_output(tmp_path / name, 3), images)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    with np.load(tmp_path / name, allow_pickle=False) as arrays:
        assert list(arrays) == ["images"]
        np.testing.assert_array_equal(arrays["images"], images, strict=True)


def test_other_outputs_are_what_their_endings_say(tmp_path):
    images = random_images(4, 64, 64, 3)
    for name, expected in (("grid.png", "PNG"), ("film.GIF", "GIF"), ("GRID2.PNG", "PNG")):
        kind = check_output(tmp_path / name, 3)
        save_output(tmp_path / name, kind, np.stack([images, 255 - images]) if kind == ".gif" else images)
        with Image.open(tmp_path / name) as picture:
            assert picture.format == expected
    save_output(tmp_path / "folder", check_output(tmp_path / "folder", 3), images)
    np.testing.assert_array_equal(read(tmp_path / "folder" / "000003.png"), images[3], strict=True)


def test_to_uint8_inverts_the_scaling():
    pixels = np.arange(256, dtype=np.uint8)
    scaled = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    np.testing.assert_array_equal(np.asarray(to_uint8(jnp.asarray(scaled))), pixels, strict=True)


@given(st.floats(-3, 3, width=32))
def test_to_uint8_rounds_and_clips(x):
    exact = (x + 1) * 127.5
    pixel = int(to_uint8(jnp.float32(x)))
    if exact <= 0 or exact >= 255:
        assert pixel == (0 if exact <= 0 else 255)
    else:
        assert abs(pixel - exact) <= 0.5 + 2e-5  # float32 near 255: 1.5e-5
