"""evaluate.py for drawn images: what is printed and written, going on, and one line for what can't be measured."""

import dataclasses
import json
import logging
import shutil

import jax
import jaxtyping
import numpy as np
import pytest
from helpers import load_script, one_line_error

from ddpm_jax import load
from ddpm_jax.checkpoint import write_config
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, SampleConfig
from ddpm_jax.data import ImageSet
from ddpm_jax.evaluation import features, samples
from ddpm_jax.evaluation.distance import frechet_distance
from ddpm_jax.evaluation.kernel_distance import kernel_distance
from ddpm_jax.evaluation.networks import FeatureNetwork
from ddpm_jax.models import make_unet
from ddpm_jax.parallel import make_mesh, run_once
from ddpm_jax.saving import Checkpoints
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import init_state

evaluate = load_script("evaluate.py")
OFFLINE = "fd_efficientnet_lite0,kid_efficientnet_lite0"


def fake_network(name, path=None):
    """Means of rows and columns in place of a network's features."""

    def apply(params, images):
        grey = images.mean(axis=3)
        pool = jax.numpy.concatenate([grey.mean(axis=1), grey.mean(axis=2)], axis=1)
        return {"pool": pool, "spatial": grey.reshape(len(grey), -1), "logits": pool / 10}

    return FeatureNetwork(name, "not at all", "0" * 64, np.float32(0), apply)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user meets
    monkeypatch.setattr(samples, "load_network", fake_network)
    monkeypatch.setattr(features, "PART_IMAGES", 8)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def untouched(images, tmp_path_factory):
    """A run folder whose network was never trained."""
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    config = Config(
        data=DataConfig(source=str(images), image_shape=(8, 8, 1)),
        diffusion=DiffusionConfig(schedule="cosine", num_steps=20),
        model=ModelConfig(channels=8, multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4),
        sample=SampleConfig(num_steps=5, batch_size=8),
    )
    unet, optimizer = make_unet(config.model, 1), make_optimizer(config.optim, 10)
    state = run_once(make_mesh(jax.devices()[:1]), lambda: init_state(config, unet, optimizer))
    write_config(workdir, config)
    with Checkpoints(workdir, config) as checkpoints:
        checkpoints.save(state, 3)
        checkpoints.wait()
    return workdir


@pytest.fixture
def run(untouched, tmp_path):
    """A copy of it that nothing was measured of."""
    return shutil.copytree(untouched, tmp_path / "run")


def measure(capsys, *options):
    evaluate.main([str(option) for option in options])
    return json.loads(capsys.readouterr().out)


def test_a_run_beside_its_data(run, images, capsys, caplog):
    caplog.set_level(logging.INFO)
    found = measure(capsys, "--ckpt", run, "--metrics", OFFLINE, "--num-images", "20", "--seed", "3", "--num-steps", "4")
    network = fake_network("efficientnet_lite0")
    drawn = network.outputs(load(run).sample(20, seed=3, num_steps=4))["pool"]
    real = network.outputs(np.load(images))["pool"]
    np.testing.assert_allclose(found["fd_efficientnet_lite0"]["value"], frechet_distance(drawn, real), rtol=1e-6)
    np.testing.assert_allclose(found["kid_efficientnet_lite0"]["value"], kernel_distance(drawn, real).value, rtol=1e-6)
    protocol = found["fd_efficientnet_lite0"]["protocol"]
    assert protocol["network"] == "efficientnet_lite0" and protocol["network_sha256"] == "0" * 64
    about = {"data": str(images), "split": "train", "num_images": 40, "image_shape": [8, 8, 1], "framing": "center"}
    assert protocol["reference"] == about
    about = {"num_images": 20, "step": 3, "weights": "ema", "seed": 3, "sampler": "ddim", "num_steps": 4, "evaluations": 4}
    assert {name: protocol["images"][name] for name in about} == about
    assert "uint8" in protocol["images"]["rounding"]
    assert json.loads((run / "evaluation.json").read_text()) == found
    assert "20 images" in caplog.text and "too large" in caplog.text


def test_the_same_command_goes_on(run, capsys, monkeypatch):
    """The third part fails; the other two are not drawn again, and the number is that of an undisturbed run."""
    options = ("--ckpt", run, "--metrics", "fd_efficientnet_lite0", "--num-images", "30")
    drawn, original = [], features._draw
    monkeypatch.setattr(features, "_draw", lambda *arguments: (drawn.append(arguments[3]), original(*arguments))[1])
    undisturbed = measure(capsys, *options, "--seed", "1")
    assert drawn == [0, 8, 16, 24]
    drawn.clear()

    def fail(*arguments):
        if arguments[3] == 16:
            raise KeyboardInterrupt
        return original(*arguments)

    for path in (run / "evaluation").rglob("*.npz"):
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(features, "_draw", fail)
        with pytest.raises(KeyboardInterrupt):
            measure(capsys, *options, "--seed", "1")
    assert measure(capsys, *options, "--seed", "1") == undisturbed
    assert drawn == [16, 24]
    drawn.clear()
    measure(capsys, *options, "--seed", "1", "--num-images", "16")
    assert drawn == []
    measure(capsys, *options, "--seed", "2")
    assert drawn == [0, 8, 16, 24]


def test_images_beside_data_or_statistics(images, tmp_path, capsys):
    drawn, stats = tmp_path / "drawn.npz", tmp_path / "stats.npz"
    np.savez(drawn, images=np.random.default_rng(1).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8))
    options = ("--images", drawn, "--metrics", "fid,sfid")
    direct = measure(capsys, *options, "--data", images, "--save-stats", stats)
    stored = measure(capsys, *options, "--stats", stats, "--out", tmp_path / "deep" / "out.json")
    for metric in ("fid", "sfid"):
        np.testing.assert_allclose(stored[metric]["value"], direct[metric]["value"], rtol=1e-9)
        assert stored[metric]["protocol"]["reference"] == {"statistics": str(stats), "num_images": 40}
    assert json.loads((tmp_path / "deep" / "out.json").read_text()) == stored
    assert direct["fid"]["protocol"]["images"] == {"num_images": 30, "source": str(drawn), "image_shape": [8, 8, 1]}


def test_the_inception_score_needs_no_real_images(images, capsys):
    found = measure(capsys, "--images", images, "--metrics", "is")
    assert found["is"]["value"] >= 1.0 and "reference" not in found["is"]["protocol"]


def test_real_images_of_another_size_are_framed(images, tmp_path, capsys):
    large = tmp_path / "large.npy"
    np.save(large, np.load(images).repeat(2, axis=1).repeat(2, axis=2))
    found = measure(capsys, "--images", images, "--metrics", "fid", "--data", large)
    assert found["fid"]["value"] < 1e-6  # shrunk by a whole factor they are the same


def test_options_of_drawing_are_those_of_the_config(run):
    given = {
        "sampler": "ddim", "num_steps": 7, "eta": 0.5, "spacing": "trailing", "threshold": "dynamic", "guidance": 1.0,
        "guidance_interval": (0.1, 2.0), "guidance_rescale": 0.5,
    }  # fmt: skip
    assert given.keys() == set(samples.DRAWING_OPTIONS)
    model = load(run)
    drawing = samples.Drawing.of(model, run, samples.SampleOptions(**given), 0, 4)
    assert drawing.config.sample == dataclasses.replace(model.config.sample, batch_size=4, **given)
    assert samples.Drawing.of(model, run, samples.SampleOptions(), 0, None).config == model.config


@pytest.mark.parametrize("framing", ["pad", "random"])
def test_real_images_are_framed_as_in_training(framing, tmp_path):
    """Padded where they are padded there; where they are cropped at random, the piece from the middle."""
    generator = np.random.default_rng(2)
    small, drawn = (generator.integers(0, 256, (20, 8, width, 1), dtype=np.uint8) for width in (4, 8))
    tall = small.repeat(2, axis=1).repeat(2, axis=2)  # 16x8
    np.save(tmp_path / "tall.npy", tall)
    expected = np.pad(small, ((0, 0), (0, 0), (2, 2), (0, 0)), constant_values=255) if framing == "pad" else tall[:, 4:12]
    metric, data = "fd_efficientnet_lite0", DataConfig(source=str(tmp_path / "tall.npy"), framing=framing)
    found = samples.evaluate_samples([metric], ImageSet(drawn), samples.SampleOptions(), data)[metric]
    network = fake_network("efficientnet_lite0")
    distance = frechet_distance(*(network.outputs(images)["pool"] for images in (drawn, expected)))
    np.testing.assert_allclose(found["value"], distance, rtol=1e-6)
    assert found["protocol"]["reference"]["framing"] == {"pad": "pad", "random": "center"}[framing]


def test_bits_per_dim_beside_them(run, capsys):
    found = measure(capsys, "--ckpt", run, "--metrics", "bpd,fid", "--num-images", "12")
    assert found["num_images"] == 12
    assert found["bpd"]["bits_per_dim"] > 0 and found["fid"]["protocol"]["images"]["num_images"] == 12


def test_too_few_images_is_one_line(images, tmp_path):
    options = ["--images", str(images), "--data", str(images), "--num-images"]
    one_line_error(evaluate.main, [*options, "1", "--metrics", "fid"], fragments=["2 or more"])
    one_line_error(evaluate.main, [*options, "3", "--metrics", "pr"], fragments=["4 or more"])
    one_line_error(evaluate.main, [*options, "41", "--metrics", "fid"], fragments=["num_images = 41", "holds 40"])


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--metrics", "fid"], ["--data", "--stats"]),
        (["--metrics", "bpd", "--data", "IMAGES"], ["bpd", "--ckpt"]),
        (["--metrics", "kid", "--stats", "IMAGES"], ["kid", "--data"]),
        (["--metrics", "fid,fd_dinov2", "--stats", "IMAGES"], ["one network"]),
        (["--metrics", "fid,fd_dinov2", "--data", "IMAGES", "--save-stats", "s.npz"], ["one network"]),
        (["--metrics", "fid", "--stats", "nowhere.npz"], ["nowhere.npz"]),
        (["--metrics", "fid", "--data", "nowhere.npz"], ["nowhere.npz"]),
        (["--metrics", "is", "--save-stats", "s.npz"], ["--save-stats", "--data"]),
        (["--metrics", "is,kid", "--save-stats", "s.npz", "--data", "IMAGES"], ["--save-stats", "fid"]),
        (["--metrics", "fid", "--save-stats", "s.npz", "--stats", "IMAGES"], ["--save-stats", "--data"]),
        (["--metrics", "fid", "--data", "IMAGES", "--stats", "IMAGES"], ["--data", "--stats", "one of them"]),
        (["--metrics", "is", "--first-image", "8"], ["first_image = 8", "is"]),
        (["--metrics", "is", "--sampler", "ddim"], ["--sampler", "--images"]),
        (["--metrics", "is", "--weights", "raw"], ["--weights", "--images"]),
        (["--metrics", "is", "--seed", "1", "--guidance-interval", "0.1", "2"], ["--guidance-interval, --seed", "--images"]),
    ],
)
def test_what_can_not_be_measured_is_one_line(images, options, fragments):
    options = [str(images) if option == "IMAGES" else option for option in options]
    one_line_error(evaluate.main, ["--images", str(images), *options], fragments=fragments)


def test_a_run_or_images(run, images):
    one_line_error(evaluate.main, ["--ckpt", str(run), "--images", str(images)], fragments=["--ckpt", "--images"])
    one_line_error(evaluate.main, ["--metrics", "fid"], fragments=["--ckpt is missing", "--images"])
    one_line_error(evaluate.main, ["--ckpt", str(run), "--metrics", "fid", "--sampler", "best"], fragments=["best"])


def test_what_can_not_be_scored_is_named_before_images_are_drawn(run, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_draw", pytest.fail)
    options = ["--ckpt", str(run), "--metrics"]
    one_line_error(evaluate.main, [*options, "fid,bpd_ode", "--ode-steps", "21"], fragments=["ode_steps = 21", "2 ... 20"])
    one_line_error(evaluate.main, [*options, "fid,bpd", "--num-images", "41"], fragments=["images 0 ... 40"])
    stats = tmp_path / "stats.npz"
    np.savez(stats, mu=np.zeros(16), sigma=np.eye(16))
    one_line_error(evaluate.main, [*options, "fid,sfid", "--stats", str(stats)], fragments=["stats.npz", "spatial", "--data"])
