"""Drawings of more than one batch: their parts outlast a kill, and the images are those of a drawing that nothing disturbed."""

import functools
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import jaxtyping
import numpy as np
import pytest
from helpers import ROOT, load_script, one_line_error, run_script, start_script
from PIL import Image
from stub_drawing import NUM_IMAGES, content, stub_draw_ranges, stub_image, stub_model
from test_inference import grey_levels_apart, model_on, run, state  # noqa: F401

from ddpm_jax import drawing
from ddpm_jax.drawing import draw_in_parts, needs_parts, parts_folder
from ddpm_jax.images import make_grid, save_npz

sample = load_script("sample.py")


@pytest.fixture(autouse=True)
def without_type_checks(monkeypatch):
    """What a user meets, who runs without the type checks of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def drawn(monkeypatch):
    """The ranges that are drawn; their images cost nothing."""
    ranges = []
    monkeypatch.setattr(drawing, "draw_ranges", stub_draw_ranges(ranges))
    return ranges


class Killed(Exception):
    """In the place of SIGKILL."""


def draw(out, kind, num_images=NUM_IMAGES, seed=0, labels=None, **model):
    draw_in_parts(stub_model(**model), out, kind, num_images, seed, labels, {})


def draw_and_stop(monkeypatch, out, num_parts, **options):
    """A drawing that ends after so many parts."""
    write = drawing.Parts.write

    def write_some(parts, each, images):
        if len(parts.stored()) == num_parts:
            raise Killed
        write(parts, each, images)

    with monkeypatch.context() as patch:
        patch.setattr(drawing.Parts, "write", write_some)
        with pytest.raises(Killed):
            draw(out, out.suffix, **options)
    assert len(list(parts_folder(out).glob("*.part"))) == num_parts


def read_npz(path):
    with np.load(path, allow_pickle=False) as arrays:
        assert list(arrays) == ["images"]
        return arrays["images"]


EXPECTED = np.stack([stub_image(i) for i in range(NUM_IMAGES)])


# --- what is written


def test_what_is_written_is_what_was_drawn(drawn, tmp_path):
    for name in ("a.npz", "a.png", "a"):
        draw(tmp_path / name, (tmp_path / name).suffix)
    np.testing.assert_array_equal(read_npz(tmp_path / "a.npz"), EXPECTED)
    with Image.open(tmp_path / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), make_grid(EXPECTED))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [f"{i:06d}.png" for i in range(NUM_IMAGES)]
    for index, image in enumerate(EXPECTED):
        with Image.open(tmp_path / "a" / f"{index:06d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), image)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.npz", "a.png"]
    assert drawn == 3 * [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 22)]


def test_an_npz_file_has_the_same_bytes_whenever_and_however_it_is_written(drawn, tmp_path, monkeypatch):
    draw(tmp_path / "a.npz", ".npz")
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(2e9))
    monkeypatch.setattr(time, "time", lambda: 2e9)
    draw(tmp_path / "b.npz", ".npz", batch_size=7, devices=1)
    save_npz(tmp_path / "c.npz", EXPECTED)
    assert len({(tmp_path / name).read_bytes() for name in ("a.npz", "b.npz", "c.npz")}) == 1


@pytest.mark.parametrize(
    ("num_images", "batch_size", "devices", "expected"),
    [(8, 4, 2, False), (9, 4, 2, True), (64, 64, 1, False), (65, 64, 1, True), (65, 64, 8, False)],
)
def test_what_one_batch_holds_needs_no_parts(tmp_path, num_images, batch_size, devices, expected):
    assert needs_parts(stub_model(batch_size, devices), tmp_path / "a.png", num_images, None) == expected
    assert needs_parts(stub_model(1, devices), tmp_path / "a.png", num_images, batch_size) == expected
    parts_folder(tmp_path / "a.png").mkdir()  # of an earlier start, perhaps with fewer devices
    assert needs_parts(stub_model(batch_size, devices), tmp_path / "a.png", num_images, None)


@pytest.mark.parametrize("name", ["a.npz", "a"])
def test_memory_does_not_grow_with_the_number_of_images(monkeypatch, tmp_path, name):
    """Of 12 MB of images, less than a fifth is in memory at any time, while drawing and while joining."""
    shape, number = (32, 32, 3), 4096
    monkeypatch.setattr(drawing, "draw_ranges", stub_draw_ranges([], shape))
    tracemalloc.start()
    try:
        draw(tmp_path / name, (tmp_path / name).suffix, number, batch_size=64, devices=4, shape=shape)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < number * np.prod(shape) / 5


# --- going on


@pytest.mark.parametrize("name", ["a.npz", "a.png", "a"])
def test_killed_at_any_access_to_files_a_drawing_ends_as_if_nothing_had_been(tmp_path, name):
    """A process for itself, since only one without threads can be forked: see stub_drawing.py."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "stub_drawing.py"), str(tmp_path), name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40  # kills


def test_only_what_is_missing_is_drawn_again(drawn, tmp_path, monkeypatch, caplog):
    out = tmp_path / "a.npz"
    draw_and_stop(monkeypatch, out, 3)
    drawn.clear()
    with caplog.at_level(logging.INFO, "ddpm_jax"):
        draw(out, ".npz", batch_size=5, devices=1)  # another number of devices and images at once
    assert drawn == [(12, 17), (17, 22)]
    assert "holds 12 of the 22 images already" in caplog.text
    np.testing.assert_array_equal(read_npz(out), EXPECTED)
    assert not parts_folder(out).exists()


def damage(path, how):
    pixels = bytearray(path.read_bytes())
    if how == "cut short":
        pixels = pixels[:-1]
    elif how == "empty":
        pixels = b""
    elif how == "a bit":
        pixels[100] ^= 4
    elif how == "a bit of the checksum":
        pixels[0] ^= 1
    elif how == "another's":
        pixels = path.with_name("00000004-00000008.part").read_bytes()
    path.write_bytes(pixels)


@pytest.mark.parametrize("how", ["cut short", "empty", "a bit", "a bit of the checksum", "another's"])
def test_a_damaged_part_is_drawn_again(drawn, tmp_path, monkeypatch, caplog, how):
    out = tmp_path / "a.npz"
    draw_and_stop(monkeypatch, out, 4)
    damage(parts_folder(out) / "00000008-00000012.part", how)
    drawn.clear()
    draw(out, ".npz")
    assert drawn == [(8, 12), (16, 20), (20, 22)]
    assert "00000008-00000012.part is damaged" in caplog.text
    np.testing.assert_array_equal(read_npz(out), EXPECTED)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"seed": 1}, ["seed: 0 -> 1"]),
        ({"num_images": 23}, ["num_images: 22 -> 23"]),
        ({"step": 8}, ["step: 7 -> 8"]),
        ({"weights": "raw"}, ["weights: ema -> raw"]),
        ({"fingerprint": "abd"}, ["fingerprint: abc -> abd"]),
        ({"labels": np.ones(NUM_IMAGES, np.int64)}, ["labels: None -> "]),
        ({"shape": (8, 4, 6)}, ["image_shape: [8, 8, 3] -> [8, 4, 6]"]),
    ],
)
def test_parts_of_another_drawing_are_refused_and_kept(drawn, tmp_path, monkeypatch, change, fragments):
    out = tmp_path / "a.npz"
    draw_and_stop(monkeypatch, out, 3)
    before = content(tmp_path)
    call = functools.partial(draw, out, ".npz", **change)
    one_line_error(call, fragments=[str(parts_folder(out)), "another drawing", *fragments, "--out"])
    assert content(tmp_path) == before
    draw(out, ".npz")
    np.testing.assert_array_equal(read_npz(out), EXPECTED)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_description_that_cannot_be_read_is_refused(drawn, tmp_path, monkeypatch, text):
    out = tmp_path / "a.npz"
    draw_and_stop(monkeypatch, out, 3)
    (parts_folder(out) / "drawing.json").write_text(text)
    one_line_error(draw, out, ".npz", fragments=["a.npz.parts", "remove it"])
    assert len(list(parts_folder(out).glob("*.part"))) == 3


def test_settings_decide_and_the_batch_size_does_not(model, tmp_path):
    config = model.settle({"num_steps": 5}, 4, 0, None)[0]
    labels = np.zeros(4, int)
    base = drawing._description(model, config, 4, 0, labels)
    other = model.settle({"num_steps": 5, "batch_size": 2}, 4, 0, None)[0]
    assert drawing._description(model, other, 4, 0, labels) == base
    for given in ({"num_steps": 4}, {"sampler": "ddim"}, {"guidance": 2.0}, {"threshold": "none"}, {"spacing": "trailing"}):
        config = model.settle({"num_steps": 5} | given, 4, 0, None)[0]
        changed = drawing._description(model, config, 4, 0, labels)
        assert {name for name in base if base[name] != changed[name]} == {f"sample.{name}" for name in given}


def test_two_at_once_are_told_from_one_that_goes_on(drawn, tmp_path, monkeypatch):
    out, write, messages = tmp_path / "a.npz", drawing.Parts.write, []

    def write_and_begin_another(parts, each, images):
        write(parts, each, images)
        if not messages:
            messages.append(one_line_error(draw, out, ".npz", fragments=["another process", str(parts.folder)]))

    monkeypatch.setattr(drawing.Parts, "write", write_and_begin_another)
    draw(out, ".npz")
    assert len(messages) == 1
    np.testing.assert_array_equal(read_npz(out), EXPECTED)


def test_the_lock_is_that_of_a_file_and_goes_with_the_parts(drawn, tmp_path, monkeypatch):
    """NFS would tell no other host of a folder's."""
    out, write, seen = tmp_path / "a.npz", drawing.Parts.write, []

    def write_and_look(parts, each, images):
        write(parts, each, images)
        seen.append((parts.folder / ".lock").is_file())

    monkeypatch.setattr(drawing.Parts, "write", write_and_look)
    draw(out, ".npz")
    assert seen and all(seen) and list(tmp_path.iterdir()) == [out]


def test_a_lock_whose_file_was_removed_meanwhile_is_none(drawn, tmp_path, monkeypatch):
    """By a drawing that has ended, while a third one has begun."""

    def hold(descriptor, folder):
        (folder / ".lock").rename(folder / "removed")
        (folder / ".lock").touch()
        return True

    monkeypatch.setattr(drawing, "hold", hold)
    one_line_error(draw, tmp_path / "a.npz", ".npz", fragments=["another process", "a.npz.parts"])
    assert drawn == []


def test_other_files_in_the_folder_of_the_parts_stay(drawn, tmp_path):
    out = tmp_path / "a.npz"
    parts_folder(out).mkdir()
    (parts_folder(out) / "notes.txt").write_text("mine")
    draw(out, ".npz")
    assert content(parts_folder(out)) == {"notes.txt": b"mine"}
    np.testing.assert_array_equal(read_npz(out), EXPECTED)


def test_a_folder_with_pictures_is_refused_unless_they_are_of_this_drawing(drawn, tmp_path, monkeypatch, model):
    monkeypatch.setattr(sample, "load", lambda path, weights: model)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "000000.png").write_bytes(b"mine")
    argv = ["--ckpt", "run", "--num-images", "6", "--batch-size", "4", "--out", str(tmp_path / "a")]
    one_line_error(sample.main, argv, fragments=["holds PNG files already"])
    assert (tmp_path / "a" / "000000.png").read_bytes() == b"mine" and not parts_folder(tmp_path / "a").exists()


# --- with a network


@pytest.fixture(scope="module")
def model(state):  # noqa: F811
    return model_on(state, 1)


def test_parts_hold_the_images_of_the_model(model, tmp_path, monkeypatch):
    """On the command line: the same images in one batch and in several, with labels, and settings that are given."""
    monkeypatch.setattr(sample, "load", lambda path, weights: model)
    argv = "--ckpt run --num-images 10 --num-steps 4 --seed 3 --labels 1,2 --batch-size 4 --sampler ddim --out"
    sample.main([*argv.split(), str(tmp_path / "a.npz")])
    expected = model.sample(10, 3, "ddim", 4, labels=np.resize([1, 2], 10))
    assert grey_levels_apart(read_npz(tmp_path / "a.npz"), expected) <= 1
    sample.main([*argv.replace("--labels 1,2", "").split(), str(tmp_path / "b.npz")])
    assert grey_levels_apart(read_npz(tmp_path / "b.npz"), model.sample(10, 3, "ddim", 4)) <= 1


def test_the_number_of_devices_changes_no_bit_where_each_has_a_batch(state, tmp_path):  # noqa: F811
    for devices in (1, 4, 8):
        draw_in_parts(model_on(state, devices), tmp_path / f"{devices}.npz", ".npz", 35, 0, None, {"batch_size": 4})
    assert len({path.read_bytes() for path in tmp_path.glob("*.npz")}) == 1


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["a.npz", "a"])
def test_sample_killed_at_random_ends_in_the_same_bytes(run, tmp_path, name):  # noqa: F811
    """kill -9 twice, a random while after the first part was there."""
    options = ["--ckpt", run, "--num-images", 400, "--batch-size", 4, "--num-steps", 50]
    chance, folder = random.Random(name), parts_folder(tmp_path / name)
    run_script("sample.py", *options, "--out", tmp_path / "undisturbed" / name, cwd=tmp_path)
    for _ in range(2):
        before = len(list(folder.glob("*.part"))) if folder.exists() else 0
        process = start_script("sample.py", *options, "--out", tmp_path / name, cwd=tmp_path)
        while len(list(folder.glob("*.part"))) == before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        time.sleep(0.05 * chance.random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    errors = run_script("sample.py", *options, "--out", tmp_path / name, cwd=tmp_path)
    assert re.search(r"holds \d+ of the 400 images already", errors)
    if name == "a":
        assert content(tmp_path / "a") == content(tmp_path / "undisturbed" / "a")
    else:
        assert (tmp_path / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert not folder.exists()
