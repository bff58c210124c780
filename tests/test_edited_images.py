"""Editing with a model and on the command line: bytes in and out, kept pixels, what goes together, and image files."""

import logging

import jaxtyping
import numpy as np
import pytest
from helpers import load_script, one_line_error
from PIL import Image
from test_inference import grey_levels_apart, model_on, state  # noqa: F401

import ddpm_jax as ddpm
from ddpm_jax import editing
from ddpm_jax.data.sources import load_packaged
from ddpm_jax.images import read_image, read_mask

sample = load_script("sample.py")
DDIM = {"sampler": "ddim", "num_steps": 12}
SHAPE = (8, 8, 1)


@pytest.fixture(autouse=True)
def without_type_checks(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def model(state):  # noqa: F811
    return model_on(state, 1)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(1).integers(0, 256, SHAPE, np.uint8)


@pytest.fixture(scope="module")
def mask():
    return np.random.default_rng(2).random(SHAPE) < 0.5


# With a model


def test_the_ends_of_an_interpolation_are_the_images_of_the_seed(model):
    way = editing.interpolate(model, (2, 7), 5, seed=3, labels=1, **DDIM)
    images = model.sample(8, seed=3, labels=1, **DDIM)
    assert way.shape == (5, *SHAPE) and way.dtype == np.uint8
    assert grey_levels_apart(way[0], images[2]) <= 1 and grey_levels_apart(way[-1], images[7]) <= 1
    assert grey_levels_apart(way[2], images[2]) > 1 and grey_levels_apart(way[2], images[7]) > 1


def test_an_interpolation_of_images_has_the_images_for_ends(model):
    """Of images that the model draws itself: inverted and sampled they are the same again."""
    images = model.sample(2, labels=1, sampler="ddim", num_steps=50)
    back = editing.interpolate(model, images, 3, labels=1, sampler="ddim", num_steps=50)
    assert grey_levels_apart(back[[0, -1]], images) <= 2


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("edit", ["image_to_image", "inpaint"])
def test_an_edited_image_depends_on_its_number_alone(state, model, image, mask, edit, devices):  # noqa: F811
    arguments = (image, 0.6) if edit == "image_to_image" else (image, mask)
    many = getattr(editing, edit)(model, *arguments, 11, **DDIM)
    few = getattr(editing, edit)(model_on(state, devices), *arguments, 6, batch_size=4, **DDIM)
    assert many.shape == (11, *SHAPE) and many.dtype == np.uint8
    assert len(np.unique(many.reshape(11, -1), axis=0)) == 11
    assert grey_levels_apart(few, many[:6]) <= 1


def test_strengths(model, image):
    np.testing.assert_array_equal(editing.image_to_image(model, image, 0.0, 3), np.stack([image] * 3))
    weak, strong = (editing.image_to_image(model, image, strength, 8, **DDIM).astype(int) for strength in (0.1, 0.9))
    assert np.abs(weak - image).mean() < np.abs(strong - image).mean()
    assert editing.image_to_image(model, image, 0.5, 3, num_frames=4, **DDIM).shape == (4, 3, *SHAPE)


def test_kept_pixels_stay_as_they_are(model, mask):
    """Images of every grey level, one for each of the batch."""
    images = (np.arange(256).reshape(4, *SHAPE)).astype(np.uint8)
    painted = editing.inpaint(model, images, mask, 4, num_steps=12)
    np.testing.assert_array_equal(painted[:, ~mask], images[:, ~mask])
    assert np.abs(painted[:, mask].astype(int) - images[:, mask]).mean() > 5


@pytest.mark.parametrize(
    ("call", "fragments"),
    [
        (lambda m, x, k: editing.image_to_image(m, x, 1.5), ["strength = 1.5"]),
        (lambda m, x, k: editing.image_to_image(m, x[:4], 0.5), ["[8, 8, 1]", "[4, 8, 1]"]),
        (lambda m, x, k: editing.image_to_image(m, x / 255, 0.5), ["uint8", "float64"]),
        (lambda m, x, k: editing.image_to_image(m, x, 0.5, 0), ["num_images = 0"]),
        (lambda m, x, k: editing.inpaint(m, x, k[:4]), ["mask", "(4, 8, 1)"]),
        (lambda m, x, k: editing.inpaint(m, x, k, num_steps=5), ["jump_length = 10", "5 steps"]),
        (lambda m, x, k: editing.interpolate(m, labels=0, sampler="ddpm"), ["noise", "ddpm"]),
        (lambda m, x, k: editing.interpolate(m, labels=0, sampler="ddim", eta=0.5), ["noise", "eta"]),
        (lambda m, x, k: editing.interpolate(m, **DDIM), ["label"]),
        (lambda m, x, k: editing.interpolate(m, (0, -1), labels=0, **DDIM), ["-1"]),
        (lambda m, x, k: editing.interpolate(m, num_images=1, labels=0, **DDIM), ["num_images = 1"]),
        (lambda m, x, k: editing.interpolate(m, labels=0, steps=3), ["sample.steps"]),
    ],
)
def test_bad_arguments(model, image, mask, call, fragments):
    one_line_error(call, model, image, mask, fragments=fragments)


@pytest.mark.heavy
@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_inversion_and_sampling_return_real_images_of_a_trained_model(tmp_path, prediction):
    """In 200 steps, the first images of the data set. A network that predicts x0 can't: docs/editing.md."""
    values = {"train.num_steps": 600, "train.preview_every_steps": None, "optim.ema_decay": 0.99}
    ddpm.train(ddpm.load_config("configs/fashion_mnist.py", values | {"diffusion.prediction": prediction}), tmp_path)
    model = ddpm.load(tmp_path)
    images = load_packaged("fashion_mnist").images[:8]
    pairs = [editing.interpolate(model, images[i : i + 2], 2, sampler="ddim", num_steps=200) for i in (0, 2, 4, 6)]
    assert grey_levels_apart(np.concatenate(pairs), images) <= 2


# Image files


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_an_image_that_fits_comes_through_to_the_bit(tmp_path, caplog, mode, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, channels), np.uint8)
    Image.fromarray(pixels.squeeze()).save(tmp_path / "a.png")
    with caplog.at_level(logging.INFO, "ddpm_jax"):
        np.testing.assert_array_equal(read_image(tmp_path / "a.png", (6, 8, channels)), pixels)
    assert not caplog.records


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_any_mode_and_size(tmp_path, caplog, mode, channels):
    """A light field of 40 x 20 with black ends well outside the centre crop."""
    picture = Image.new("L", (40, 20), 0)
    picture.paste(255, (6, 0, 34, 20))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    else:
        picture = (picture.convert("RGB") if mode in ("YCbCr", "CMYK") else picture).convert(mode)
    picture.save(tmp_path / "a.tiff")
    with caplog.at_level(logging.INFO, "ddpm_jax"):
        image = read_image(tmp_path / "a.tiff", (10, 10, channels))
    assert image.shape == (10, 10, channels) and image.min() >= 250
    assert "40x20" in caplog.messages[0] and "10x10" in caplog.messages[0]


def test_transparent_is_white_in_images_and_black_in_masks(tmp_path):
    pixels = np.full((8, 8, 4), (90, 90, 90, 0), np.uint8)
    pixels[:4] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", (8, 8, 1)) == 255).all()
    mask = read_mask(tmp_path / "a.png", tmp_path / "a.png", (8, 8, 1))
    assert mask[:4].all() and not mask[4:].any()


def write(folder, **arrays):
    for name, pixels in arrays.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")


# On the command line


@pytest.fixture
def folder(tmp_path, monkeypatch, state, image):  # noqa: F811
    """A working directory with image files, and a model for --ckpt."""
    monkeypatch.chdir(tmp_path)
    upper = np.repeat(np.array([255, 0], np.uint8), 32).reshape(8, 8)
    write(tmp_path, a=image[..., 0], b=255 - image[..., 0], mask=upper,
          black=np.zeros((8, 8), np.uint8), wide=np.full((8, 16), 255, np.uint8))  # fmt: skip
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    model = model_on(state, 1)
    monkeypatch.setattr(sample, "load", lambda path, weights: model)
    return tmp_path


def draw(*argv):
    sample.main(["--ckpt", "run", "--num-images", "4", "--num-steps", "12", "--out", "out.npz", *argv])
    with np.load("out.npz") as arrays:
        return arrays["images"]


def test_interpolate(folder, model):
    images = model.sample(8, labels=2, **DDIM)
    way = draw("--interpolate", "--label", "2", "--sampler", "ddim")
    assert grey_levels_apart(way[[0, -1]], images[:2]) <= 1
    way = draw("--label", "2", "--sampler", "ddim", "--interpolate", "3", "7")
    assert grey_levels_apart(way[[0, -1]], images[[3, 7]]) <= 1
    assert draw("--sampler", "ddim", "--label", "2", "--interpolate", "--init", "a.png", "b.png").shape == (4, *SHAPE)


def test_interpolate_as_an_animation(folder):
    sample.main(
        [
            "--ckpt",
            "run",
            "--interpolate",
            "0",
            "1",
            "--label",
            "0",
            "--sampler",
            "ddim",
            "--num-images",
            "6",
            "--out",
            "way.gif",
        ]
    )
    with Image.open("way.gif") as picture:
        assert picture.n_frames == 6 and picture.size == (64, 64)


def test_init(folder, model, image):
    edited = draw("--init", "a.png", "--strength", "0.6", "--sampler", "ddim")
    np.testing.assert_array_equal(edited, editing.image_to_image(model, image, 0.6, 4, **DDIM))
    np.testing.assert_array_equal(draw("--init", "a.png"), editing.image_to_image(model, image, 0.5, 4, num_steps=12))
    sample.main(["--ckpt", "run", "--init", "a.png", "--num-images", "2", "--num-steps", "12", "--out", "way.gif"])
    with Image.open("way.gif") as picture:
        assert picture.n_frames > 5


def test_mask(folder, image, caplog):
    with caplog.at_level(logging.INFO, "ddpm_jax"):
        painted = draw("--init", "a.png", "--mask", "mask.png", "--num-resamples", "2", "--jump-length", "3")
    np.testing.assert_array_equal(painted[:, 4:], np.stack([image[4:]] * 4))
    assert grey_levels_apart(painted[:, :4], image[:4]) > 5
    assert "by ddpm" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        ("--init missing.png", ["missing.png", "No such file"]),
        ("--init .", ["directory"]),
        ("--init notes.txt", ["notes.txt", "not an image"]),
        ("--init torn.png", ["torn.png", "damaged"]),
        ("--init a.png b.png", ["--init", "one file, not 2"]),
        ("--init a.png --strength 1.1", ["--strength 1.1", "0 ... 1"]),
        ("--init a.png --strength nan", ["--strength nan"]),
        ("--init a.png --strength x", ["strength", "'x'"]),
        ("--strength 0.5", ["--strength", "--init"]),
        ("--mask mask.png", ["--mask", "--init"]),
        ("--num-resamples 3", ["--num-resamples", "--init"]),
        ("--init a.png --jump-length 3", ["--jump-length", "--mask"]),
        ("--init a.png --mask mask.png --strength 0.5", ["--strength", "--mask"]),
        ("--init a.png --mask missing.png", ["missing.png"]),
        ("--init a.png --mask black.png", ["black.png", "white"]),
        ("--init a.png --mask wide.png", ["wide.png", "16x8", "8x8"]),
        ("--init a.png --mask mask.png --out a.gif", ["--mask", ".gif"]),
        ("--init a.png --mask mask.png --num-resamples 0", ["num_resamples = 0"]),
        ("--init a.png --mask mask.png --num-steps 4", ["jump_length = 10", "4 steps"]),
        ("--interpolate 1", ["--interpolate", "not 1"]),
        ("--interpolate 1 2 3", ["--interpolate", "not 3"]),
        ("--interpolate 0 -1 --label 0 --sampler ddim", ["-1"]),
        ("--interpolate x y", ["interpolate", "x"]),
        ("--interpolate --init a.png", ["--interpolate", "not 1"]),
        ("--interpolate 0 1 --init a.png b.png", ["--interpolate", "twice"]),
        ("--interpolate --strength 0.5", ["--interpolate", "--strength"]),
        ("--interpolate --sampler ddpm --label 0", ["noise", "ddpm"]),
    ],
)
def test_bad_input(folder, argv, fragments):
    one_line_error(sample.main, ["--ckpt", "run", *argv.split()], fragments=fragments)
    assert not (folder / "run").exists() or not list((folder / "run").iterdir())
