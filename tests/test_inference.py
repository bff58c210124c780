"""A trained model: that images depend on weights, seed, position and settings alone, and what `load` makes of a run."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm_jax as ddpm
from ddpm_jax import inference
from ddpm_jax.checkpoint import write_config
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, SampleConfig, TrainConfig
from ddpm_jax.errors import InputError
from ddpm_jax.inference import Model, draw_images, to_uint8
from ddpm_jax.models import make_unet
from ddpm_jax.parallel import make_mesh, put, replicated, run_once
from ddpm_jax.saving import Checkpoints
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import init_state
from ddpm_jax.validation import config_schedule

CONFIG = Config(
    data=DataConfig(image_shape=(8, 8, 1)),
    diffusion=DiffusionConfig(num_steps=50),
    model=ModelConfig(
        channels=8, multipliers=(1,), num_res_blocks=1, attention_resolutions=(), dropout=0.1, num_groups=4, num_classes=3
    ),
    train=TrainConfig(keep_last=3),
    sample=SampleConfig(sampler="ddpm", num_steps=5, batch_size=64),
)


@pytest.fixture(scope="module")
def state():
    """A state whose weights, average and step tell each other apart, on one device.

    Fresh networks answer 0 whatever they are asked, so every weight is moved by a random number.
    """
    unet, optimizer = make_unet(CONFIG.model, 1), make_optimizer(CONFIG.optim, 10)
    fresh = run_once(make_mesh(jax.devices()[:1]), lambda: init_state(CONFIG, unet, optimizer))
    generator = np.random.default_rng(0)

    def moved(tree):
        return jax.tree.map(lambda x: x + generator.normal(0, 0.15, x.shape).astype(np.float32), jax.device_get(tree))

    return fresh._replace(params=moved(fresh.params), ema=moved(fresh.ema), step=np.int32(7))


def model_on(state, count, config=CONFIG):
    mesh = make_mesh(jax.devices()[:count])
    return Model(config, put(state.ema, replicated(mesh)), config_schedule(config), 7, "ema", mesh)


@pytest.fixture(scope="module")
def model(state):
    return model_on(state, 1)


@pytest.fixture(scope="module")
def hundred(model):
    """Images 0 ... 99 of seed 0, 64 at a time."""
    return model.sample(num_images=100)


def grey_levels_apart(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


# --- an image depends on its position alone


def test_images_are_bytes_and_differ(hundred):
    assert hundred.shape == (100, 8, 8, 1)
    assert hundred.dtype == np.uint8
    assert len({image.tobytes() for image in hundred}) == 100
    assert np.all(hundred.std(axis=(1, 2, 3)) > 5)  # none is plain, so that equality below means something
    assert np.mean((hundred > 0) & (hundred < 255)) > 0.3


def test_images_do_not_depend_on_the_batch_size(model, hundred):
    done = []
    by_sevens = model.sample(num_images=100, batch_size=7, on_batch=done.append)
    # The compiler may order sums differently for another batch size; a value at the edge of rounding then moves by one.
    assert grey_levels_apart(by_sevens, hundred) <= 1
    assert np.mean(by_sevens == hundred) > 0.99
    assert done == [*range(7, 99, 7), 100]


def test_images_do_not_depend_on_the_number_of_devices(state, hundred):
    on_eight = model_on(state, 8).sample(num_images=100)
    assert grey_levels_apart(on_eight, hundred) <= 1
    assert np.mean(on_eight == hundred) > 0.99


def test_fewer_images_than_devices(state, hundred):
    on_eight = model_on(state, 8).sample(num_images=3)
    assert on_eight.shape == (3, 8, 8, 1)
    assert grey_levels_apart(on_eight, hundred[:3]) <= 1


def test_images_do_not_depend_on_how_many_are_asked_for(model, hundred):
    for count in (1, 65):
        assert grey_levels_apart(model.sample(num_images=count), hundred[:count]) <= 1


def test_image_i_is_drawn_from_its_own_key(model, hundred):
    """One image after another, each from one key: fold_in(fold_in(key(seed), SAMPLING), i), by the public functions."""
    unet, schedule = make_unet(CONFIG.model, 1), ddpm.make_schedule("linear", num_steps=50)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def draw(key, label):
        denoiser = ddpm.make_denoiser(schedule, lambda xt, t: unet.apply({"params": model.params}, xt, t, label))
        return ddpm.sample(key, schedule, denoiser, (1, 8, 8, 1), sampler="ddpm", num_steps=5)

    for i in (0, 1, 5, 98):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), inference.SAMPLING), i)
        x = draw(key, jnp.array([i % 3], jnp.int32))
        expected = np.clip(np.round((np.asarray(x[0], np.float64) + 1) * 127.5), 0, 255)
        assert grey_levels_apart(expected, hundred[i]) <= 1


def test_seeds_differ_and_repeat(model, hundred):
    other = model.sample(num_images=100, seed=2**32 - 1)
    assert not any(np.array_equal(a, b) for a, b in zip(other, hundred, strict=True))
    np.testing.assert_array_equal(model.sample(num_images=100, seed=2**32 - 1), other)


def test_settings_change_the_images(model, hundred):
    assert grey_levels_apart(model.sample(num_images=64, sampler="ddim"), hundred[:64]) > 10


@pytest.mark.parametrize(("threshold", "clip"), [(None, True), ("static", True), ("dynamic", "dynamic"), ("none", False)])
def test_the_threshold_reaches_the_denoiser(model, monkeypatch, threshold, clip):
    seen = []

    class Enough(Exception):
        """Raised before anything is compiled."""

    def spy(schedule, network_fn, prediction, clip):
        seen.append(clip)
        raise Enough

    monkeypatch.setattr(inference, "make_denoiser", spy)
    monkeypatch.setattr(inference, "make_draw", inference.make_draw.__wrapped__)  # leaves the kept programs alone
    with pytest.raises(Enough):
        model.sample(num_images=1, num_steps=1, threshold=threshold)
    assert seen == [clip]


def test_one_program_serves_every_batch(model, monkeypatch):
    """The last batch is filled up, and another call with the same settings traces and compiles nothing."""
    traced = []

    def sample(*args, **kwargs):
        traced.append(args)
        return ddpm.sample(*args, **kwargs)

    monkeypatch.setattr(inference, "sample", sample)
    model.sample(num_images=20, batch_size=9)
    model.sample(num_images=30, batch_size=9, seed=5)
    assert len(traced) == 1


def test_sampling_moves_nothing_behind_the_back(model, hundred):
    with jax.transfer_guard("disallow"):
        images = draw_images(CONFIG, model.mesh, model.params, 0, 70)
    np.testing.assert_array_equal(images, hundred[:70])


# --- labels


def test_labels(model, hundred):
    """Image i shows class i mod 3 unless told otherwise; labels reach the images they belong to."""
    named = model.sample(num_images=100, labels=np.arange(100) % 3)
    np.testing.assert_array_equal(named, hundred)
    ones = model.sample(num_images=100, labels=1)
    np.testing.assert_array_equal(model.sample(num_images=100, labels=np.ones(100, int)), ones)
    same = [np.array_equal(a, b) for a, b in zip(ones, hundred, strict=True)]
    assert same == [i % 3 == 1 for i in range(100)]


@pytest.mark.parametrize("labels", [3, -1, np.array([0, 1, 2, 3]), np.array([-1, 0, 0, 0])])
def test_unknown_labels_are_refused(model, labels):
    with pytest.raises(InputError, match=r"labels must lie in 0 \.\.\. 2"):
        model.sample(num_images=4, labels=labels)


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_labels_of_another_length_are_refused(model, count):
    with pytest.raises(InputError, match=r"labels must be one whole number, or 4 of them"):
        model.sample(num_images=4, labels=np.zeros(count, int))


def test_labels_need_a_network_with_classes(model):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_classes=None))
    with pytest.raises(InputError, match="without classes"):
        dataclasses.replace(model, config=config).sample(num_images=1, labels=0)


# --- frames


def test_frames_end_in_the_images(model, hundred):
    frames = model.sample(num_images=10, num_frames=3)
    assert frames.shape == (3, 10, 8, 8, 1)
    assert grey_levels_apart(frames[-1], hundred[:10]) <= 1
    # The first frame is the noise: N(0, 1), of which 16 % lie below -1 and 16 % above 1.
    for level in (0, 255):
        share = np.mean(frames[0] == level)
        assert abs(share - 0.159) < 4 * np.sqrt(0.159 * 0.841 / 640) + 0.002  # 0.002: what rounds to the last level


# --- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_images": 0}, "num_images = 0: must be 1 or more"),
        ({"num_images": -3}, "num_images = -3"),
        ({"seed": -1}, r"seed = -1: must lie in 0 \.\.\. 2\^32 - 1"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"num_steps": 51}, "sample.num_steps: .*51.*50"),
        ({"num_steps": 0}, "sample.num_steps"),
        ({"eta": 1.5}, "sample.eta = 1.5"),
        ({"batch_size": 0}, "sample.batch_size = 0"),
        ({"num_frames": 1}, "num_frames = 1: must be 0, or 2 or more"),
        ({"num_frames": -1}, "num_frames = -1"),
    ],
)
def test_settings_out_of_range(model, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        model.sample(**settings)
    assert "\n" not in str(caught.value)


# --- the network and its scale


def test_network_fn_is_the_unet(model):
    unet, generator = make_unet(CONFIG.model, 1), np.random.default_rng(3)
    xt = jnp.asarray(generator.standard_normal((4, 8, 8, 1)), jnp.float32)
    t, labels = jnp.asarray([0, 10, 30, 49], jnp.int32), jnp.asarray([0, 1, 2, 0], jnp.int32)
    apply = jax.jit(unet.apply, compiler_options={"xla_backend_optimization_level": 0})
    outputs = []
    for classes in (None, labels):
        outputs.append(np.asarray(model.network_fn(xt, t, classes)))
        # Two programs for one network of a dozen layers: atol as float32 sums of a few hundred terms have it.
        np.testing.assert_allclose(outputs[-1], apply({"params": model.params}, xt, t, classes), rtol=1e-5, atol=1e-5)
    assert np.abs(outputs[0]).max() > 0.1
    assert not np.allclose(outputs[0], outputs[1], atol=0.01)


def test_to_uint8_inverts_the_scale_of_training():
    levels = np.arange(256)
    x = (levels / 127.5 - 1).astype(np.float32)
    np.testing.assert_array_equal(to_uint8(jnp.asarray(x)), levels)
    # Nearest level, and nothing beyond the ends.
    np.testing.assert_array_equal(to_uint8(jnp.asarray(x + 0.45 / 127.5, jnp.float32)), levels)
    np.testing.assert_array_equal(to_uint8(jnp.asarray(x - 0.45 / 127.5, jnp.float32)), levels)
    np.testing.assert_array_equal(to_uint8(jnp.asarray([-1.5, -100.0, 1.01, 30.0], jnp.float32)), [0, 0, 255, 255])


# --- load


@pytest.fixture(scope="module")
def run(state, tmp_path_factory):
    """A run folder with checkpoints 5 and 7, whose weights differ by 1."""
    workdir = tmp_path_factory.mktemp("run")
    write_config(workdir, CONFIG)
    with Checkpoints(workdir, CONFIG) as checkpoints:
        for step, offset in ((5, 1.0), (7, 0.0)):
            shifted = state._replace(
                params=jax.tree.map(lambda x: x + np.float32(offset), state.params),  # noqa: B023
                ema=jax.tree.map(lambda x: x + np.float32(offset), state.ema),  # noqa: B023
                step=np.int32(step),
            )
            checkpoints.save(put(shifted, replicated(make_mesh(jax.devices()[:1]))), step)
            checkpoints.wait()
    return workdir


def assert_trees_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_load_a_run_folder(run, state, weights):
    loaded = ddpm.load(run, weights=weights)
    assert_trees_equal(loaded.params, state.ema if weights == "ema" else state.params)
    assert (loaded.step, loaded.weights, loaded.config) == (7, weights, CONFIG)
    assert loaded.mesh.size == len(jax.devices())
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(loaded.params))
    np.testing.assert_array_equal(loaded.schedule.beta, config_schedule(CONFIG).beta)


def test_load_takes_the_average_by_default(run, state):
    assert_trees_equal(ddpm.load(str(run)).params, state.ema)


def test_load_one_checkpoint(run, state, monkeypatch):
    monkeypatch.chdir(run.parent)
    loaded = ddpm.load(f"{run.name}/checkpoints/5", weights="raw")  # a relative path
    assert loaded.step == 5
    assert_trees_equal(loaded.params, jax.tree.map(lambda x: x + np.float32(1), state.params))
    assert ddpm.load(run / "checkpoints" / "7").step == 7


def test_the_name_of_a_run_folder_may_be_a_number(run, tmp_path):
    assert ddpm.load(shutil.copytree(run, tmp_path / "5")).step == 7


def test_a_loaded_model_draws_the_same_images(run, model, hundred):
    loaded = ddpm.load(run)
    on_one = dataclasses.replace(loaded, mesh=model.mesh, params=put(jax.device_get(loaded.params), replicated(model.mesh)))
    np.testing.assert_array_equal(on_one.sample(num_images=64), hundred[:64])


def test_load_errors(run, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "nowhere", "no checkpoint at .*nowhere: there is no such folder"),
        (tmp_path / "file", "no checkpoint at .*file: give a run folder"),
        (tmp_path / "empty", "no checkpoint at .*empty: give a run folder"),
        (run / "checkpoints" / "6", "no checkpoint at .*6: there is no such folder"),
        (run / "checkpoints", "no checkpoint at .*checkpoints: give a run folder"),
        (run / "checkpoints" / "7" / "ema", "no checkpoint at .*ema: give a run folder"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            ddpm.load(path)
        assert "\n" not in str(caught.value)
