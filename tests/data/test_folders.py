"""Folders of image files: order, classes, what is skipped and named, what is remembered, and nothing outside."""

import json
import logging
import os

import numpy as np
import pytest
from helpers import one_line_error
from PIL import Image

from ddpm_jax import DataConfig, InputError
from ddpm_jax.data import folder_index, load_images
from ddpm_jax.data.folder_index import cache_path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "set"


def write(path, value, size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def load(folder, **values):
    return load_images(DataConfig(**({"source": str(folder), "image_shape": (8, 8, 3)} | values)))


def values(image_set):
    images = image_set.images[:]
    assert images.dtype == np.uint8 and (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


@pytest.fixture
def decoded(monkeypatch):
    """How many files were decoded for the index."""
    seen, check = [], folder_index.check
    monkeypatch.setattr(folder_index, "check", lambda data: seen.append(1) or check(data))
    return seen


def test_first_level_is_the_class_and_order_is_by_path(folder):
    for value, name in enumerate(["b/2.png", "a b/z/deep/9.png", "b/10.bmp", "a b/1.webp", "Z/x.png", "b/1.PNG"]):
        write(folder / name, 10 * value)
    (folder / "b" / "notes.txt").write_text("hello")
    write(folder / ".hidden" / "x.png", 255)
    write(folder / "b" / ".x.png", 255)
    image_set = load(folder)
    assert image_set.class_names == ("Z", "a b", "b")
    assert image_set.labels.dtype == np.int32 and image_set.labels.tolist() == [0, 1, 1, 2, 2, 2]
    assert values(image_set) == [40, 30, 10, 50, 20, 0]
    np.testing.assert_array_equal(image_set.images.read(np.array([3, 0, 3]))[:, 0, 0, 0], [50, 40, 50])


def test_flat_and_mixed_folders_have_no_classes(folder, caplog):
    write(folder / "2.png", 2)
    write(folder / "1.png", 1)
    assert load(folder).labels is None and values(load(folder)) == [1, 2] and not caplog.records
    write(folder / "a" / "3.png", 3)
    image_set = load(folder)
    assert image_set.labels is None and image_set.class_names == () and values(image_set) == [1, 2, 3]
    assert "no classes, because 2 images" in caplog.text


def test_grey_and_random_crops(folder):
    write(folder / "1.png", 7, (30, 20))
    assert load(folder, image_shape=(8, 8, 1)).images[:].shape == (1, 8, 8, 1)
    ramp = np.add.outer(np.zeros(40), np.arange(80)).astype(np.uint8)
    Image.fromarray(ramp).save(folder / "1.png")
    image_set = load(folder, image_shape=(8, 8, 1), framing="random")
    left, right = (image_set.images.read(np.array([0]), np.array([[0.5, 0.5, d]]))[0, :, 0, 0].mean() for d in (0, 0.99))
    assert left < 5 and right > 35


def test_unusable_files_are_named_once_and_skipped(folder, caplog):
    for number in range(8):
        write(folder / f"{number}.png", number)
    (folder / "bad\n.jpg").write_bytes(b"nothing")
    write(folder / "small.png", 0, (100, 1))
    message = one_line_error(load, folder, fragments=["2 of 10", "data.max_unusable = 0.01", "bad?.jpg: neither", "100x1"])
    listed = cache_path(folder, ".unusable.txt")
    assert str(listed) in message and len(listed.read_text().splitlines()) == 2
    assert values(load(folder, max_unusable=0.2)) == list(range(8))
    assert len(caplog.records) == 1 and "2 of 10" in caplog.text and "small.png" in caplog.text


def test_what_is_no_folder_of_images(folder):
    folder.mkdir()
    one_line_error(load, folder, fragments=[str(folder), "holds no images"])
    (folder / "1.png").write_bytes(b"")
    for shape in (None, (8, 8, 3)):
        one_line_error(lambda: load(folder, image_shape=shape, max_unusable=1.0), fragments=["1 of 1", "empty file"])  # noqa: B023


def test_images_of_one_size_need_no_shape(folder):
    write(folder / "1.png", 1, (5, 4))
    (folder / "2.png").write_bytes(b"")
    assert load(folder, image_shape=None, max_unusable=0.5).images[:].shape == (1, 4, 5, 3)
    Image.new("L", (5, 4)).save(folder / "1.png")
    assert load(folder, image_shape=None, max_unusable=0.5).image_shape == (4, 5, 1)
    write(folder / "2.png", 2, (4, 5))
    one_line_error(lambda: load(folder, image_shape=None), fragments=[str(folder), "several sizes", "data.image_shape"])


def test_only_changed_files_are_decoded_again(folder, decoded):
    for number in range(5):
        write(folder / f"{number}.png", number)
    assert values(load(folder)) == [0, 1, 2, 3, 4] and len(decoded) == 5
    assert values(load(folder, image_shape=(4, 4, 3))) == [0, 1, 2, 3, 4] and len(decoded) == 5
    write(folder / "2.png", 200, (40, 40))
    write(folder / "9.png", 9)
    (folder / "0.png").unlink()
    assert values(load(folder)) == [1, 200, 3, 4, 9] and len(decoded) == 7
    (folder / "1.png").write_bytes(b"broken")
    one_line_error(load, folder, fragments=["1.png"])
    assert len(decoded) == 8


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": 1}', b"\xff\x00", b"[" * 100_000])
def test_a_damaged_cache_is_harmless(folder, decoded, damage):
    write(folder / "1.png", 1)
    load(folder)
    stored = cache_path(folder, ".json")
    stored.write_bytes(damage)
    assert values(load(folder)) == [1] and len(decoded) == 2
    for entry in ([], {"1.png": [1]}, {"1.png": [1, 2, 3, 4, 5]}):
        stored.write_text(json.dumps({"version": 1, "folder": str(folder), "files": entry}))
        assert values(load(folder)) == [1]


def test_a_cache_that_cannot_be_written_is_harmless(folder, tmp_path, caplog):
    write(folder / "1.png", 1)
    (tmp_path / "cache").write_text("a file, so that no folder can be made")
    assert values(load(folder)) == [1]
    assert "can't be remembered" in caplog.text


def test_nothing_outside_is_read_and_no_loop_entered(folder, tmp_path):
    write(tmp_path / "outside" / "secret.png", 99)
    write(folder / "a" / "1.png", 1)
    (folder / "b").symlink_to(tmp_path / "outside")
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "a" / "up").symlink_to("..")
    (folder / "a" / "self.png").symlink_to("self.png")
    (folder / "a" / "2.png").symlink_to(tmp_path / "outside" / "secret.png")
    os.mkfifo(folder / "a" / "pipe.png")
    image_set = load(folder)
    assert values(image_set) == [1] and image_set.class_names == ("a",)
    (folder / "a" / "1.png").unlink()
    (folder / "a" / "1.png").symlink_to(tmp_path / "outside" / "secret.png")
    one_line_error(lambda: image_set.images[:], fragments=["a/1.png"])


def test_files_that_vanish_or_change_are_named(folder):
    write(folder / "a" / "1.png", 1)
    image_set = load(folder)
    (folder / "a" / "1.png").write_bytes(b"hello")
    one_line_error(lambda: image_set.images[:], fragments=["a/1.png", "changed"])
    (folder / "a" / "1.png").unlink()
    with pytest.raises(InputError, match=r"a/1\.png can no longer be read"):
        image_set.images.read(np.array([0]))


def test_an_interrupted_index_keeps_what_it_has_seen(folder, monkeypatch):
    for number in range(6):
        write(folder / f"{number}.png", number)
    check, seen = folder_index.check, []

    def interrupted(data):
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return check(data)

    monkeypatch.setattr(folder_index, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(folder, num_workers=1)
    assert len(json.loads(cache_path(folder, ".json").read_text())["files"]) == 3
    assert values(load(folder)) == list(range(6))


@pytest.fixture(autouse=True)
def heard(caplog, monkeypatch):
    """What the package logs, also where a command line has been run in this process before."""
    monkeypatch.setattr(logging.getLogger("ddpm_jax"), "propagate", True)
    caplog.set_level(logging.WARNING)
