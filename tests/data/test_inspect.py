"""python -m ddpm_jax.data: what it prints and draws is what training sees, and bad input ends in one line."""

import os
import re
import subprocess
import sys

import jax
import jaxtyping
import numpy as np
import pytest
from helpers import ROOT, one_line_error
from PIL import Image
from training.networks import make_pixel_net

from ddpm_jax.config import load_config, override
from ddpm_jax.data import ImageSet
from ddpm_jax.data import __main__ as inspect_data
from ddpm_jax.data.order import make_order
from ddpm_jax.images import make_grid
from ddpm_jax.parallel import make_mesh
from ddpm_jax.training import step as step_module
from ddpm_jax.validation import config_schedule

CONFIG = ROOT / "configs" / "fashion_mnist.py"
SMALL = ["--data.image-shape", "None", "--seconds", "0"]


@pytest.fixture(autouse=True)
def without_type_checks(monkeypatch):
    """What a user meets, who runs without the type checks of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def source(tmp_path):
    """The path of 20 images of 8x8x1, image i all of grey 10 i on its left half, of class i mod 3, class 2 without images."""
    images = np.zeros((20, 8, 8, 1), np.uint8)
    images[:, :, :4] = 10 * np.arange(20, dtype=np.uint8)[:, None, None, None]
    path = tmp_path / "images.npz"
    np.savez(path, images=images, labels=np.arange(20) % 2 * 3)
    return path


def test_what_it_prints_and_draws(source, tmp_path, capsys):
    out = tmp_path / "first.png"
    inspect_data.main([str(CONFIG), "--data.source", str(source), "--out", str(out), *SMALL, "--data.class-names", *"abcd"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{source}: 20 images of 8x8x1, uint8, 0.0 MiB, kept on the device"
    assert lines[1] == "an epoch is 1.2 steps of 16 images"
    assert lines[2] == "2 classes, 10 to 10 images each"
    assert [line.split() for line in lines[3:5]] == [["0", "a", "10"], ["3", "d", "10"]]
    order = make_order(0, 20, 16)(0, 1)[0]
    expected = ", ".join("ad"[i % 2] for i in order)
    assert lines[5] == f"first batch: 16 images in {out}: {expected}"
    images = np.load(source)["images"][order]
    np.testing.assert_array_equal(np.asarray(Image.open(out)), make_grid(images)[..., 0])


def test_the_batch_is_mirrored_as_in_the_first_step(source, monkeypatch):
    """What the train step hands to its loss, taken from there."""
    values = {"data.source": str(source), "data.flip": True, "model.multipliers": [1], "model.attention_resolutions": []}
    config = override(load_config(CONFIG), values)
    mesh, image_set = make_mesh(jax.devices()[:1]), inspect_data.load_images(config.data)
    images, _ = inspect_data.first_batch(config, image_set, mesh)
    seen = []

    def make_loss(config, schedule):
        def losses(network_fn, x0, t, eps):
            jax.debug.callback(seen.append, x0)
            return 0.0 * x0[:, 0, 0, 0]

        return losses

    monkeypatch.setattr(step_module, "make_loss", make_loss)
    unet = make_pixel_net(config.model, 1, False, 1000)
    loss_and_grad = step_module.make_loss_and_grad(config, config_schedule(config), unet, mesh)
    (batch,) = inspect_data.batches(config, image_set, mesh, [0])
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    loss_and_grad(key, {}, jax.tree.map(lambda array: array[0], batch))
    jax.effects_barrier()
    np.testing.assert_allclose((np.asarray(seen[0]) + 1) * 127.5, images, atol=1e-3)
    left = (images[:, 0, 0, 0] > 0).mean()
    assert 0.2 < left < 0.8  # some were mirrored, some not


def test_speed_counts_images_that_arrived(monkeypatch):
    """By a clock that goes on by a second whenever it is looked at."""
    images = ImageSet(np.zeros((64, 4, 4, 1), np.uint8))
    config = override(load_config(CONFIG), {"train.batch_size": 8, "train.steps_per_dispatch": 2})
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr(inspect_data.time, "perf_counter", lambda: next(clock))
    # Began at 0; after dispatches 1, 2, 3 and 4 it is 1, 2, 3 and 4; 4 > 3.5 ends it, and at 5 the rate is taken.
    rate = inspect_data.images_per_second(config, images, make_mesh(), 3.5)
    assert rate == pytest.approx(4 * 16 / 5)


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        ([], ["no config"]),
        (["--seed", "3"], ["no config"]),
        (["missing.py"], ["missing.py"]),
        ([str(CONFIG), "--data.sourse", "x"], ["'data.sourse'", "'data.source'"]),
        ([str(CONFIG), "--data.source", "nothing"], ["nothing"]),
        ([str(CONFIG), "--out", "a.jpg"], ["a.jpg", ".png"]),
        ([str(CONFIG), "--train.batch-size", "9"], ["train.batch_size = 9"]),
        ([str(CONFIG), "--seconds", "0", "--model.num-classes", "4"], ["training would refuse", "label 9"]),
    ],
)
def test_bad_input(tmp_path, monkeypatch, argv, fragments):
    monkeypatch.chdir(tmp_path)
    one_line_error(inspect_data.main, argv, fragments=fragments)


def test_as_a_command(tmp_path):
    """With its measurement; and exit status 2 for what it can't use."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "ddpm_jax.data", CONFIG]
    done = subprocess.run([*command, "--seconds", "0.2"], cwd=tmp_path, env=env, text=True, capture_output=True, check=True)
    assert re.search(r"^ +7  sneaker +1000$", done.stdout, re.MULTILINE)
    speed = re.search(r"^pipeline alone: (\d+) images/s$", done.stdout, re.MULTILINE)
    assert int(speed[1]) > 1000 and (tmp_path / "data.png").exists() and done.stderr == ""
    wrong = subprocess.run([*command, "--data.source", "no"], cwd=tmp_path, env=env, text=True, capture_output=True)
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and wrong.stderr.startswith("error: ")
