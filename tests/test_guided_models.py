"""Guidance of a trained model: each image against the public functions, the network without a class, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import one_line_error

import ddpm_jax as ddpm
from ddpm_jax import inference
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, SampleConfig
from ddpm_jax.inference import Model
from ddpm_jax.models import init_params, make_unet
from ddpm_jax.parallel import make_mesh, put, replicated
from ddpm_jax.validation import config_schedule

CONFIG = Config(
    data=DataConfig(image_shape=(8, 8, 1)),
    diffusion=DiffusionConfig(num_steps=50, prediction="v"),
    model=ModelConfig(channels=8, multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4, num_classes=3),
    sample=SampleConfig(sampler="ddpm", num_steps=5, batch_size=8),
)


@pytest.fixture(scope="module")
def model():
    """Random weights: fresh networks answer 0 whatever they are asked."""
    generator, mesh = np.random.default_rng(0), make_mesh(jax.devices()[:1])
    fresh = jax.device_get(jax.jit(lambda: init_params(make_unet(CONFIG.model, 1), 0, (8, 8, 1)))())
    params = jax.tree.map(lambda x: x + generator.normal(0, 0.15, x.shape).astype(np.float32), fresh)
    return Model(CONFIG, put(params, replicated(mesh)), config_schedule(CONFIG), 7, "ema", mesh)


def grey_levels_apart(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


def by_hand(model, combine):
    """Eight images by the public functions: combine(conditional, free, t) of the outputs of two applications of the UNet."""
    unet, schedule = make_unet(CONFIG.model, 1), ddpm.make_schedule("linear", num_steps=50)
    labels = jnp.arange(8) % 3
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), inference.SAMPLING), i) for i in range(8)]

    def network_fn(xt, t):
        conditional = unet.apply({"params": model.params}, xt, t, labels)
        return combine(conditional, unet.apply({"params": model.params}, xt, t), t)

    denoiser = ddpm.make_denoiser(schedule, network_fn, prediction="v")
    x = jax.jit(lambda keys: ddpm.sample(keys, schedule, denoiser, (8, 8, 8, 1), "ddpm", 5))(jnp.stack(keys))
    return np.clip(np.round((np.asarray(x, np.float64) + 1) * 127.5), 0, 255)


def test_guided_images(model):
    drawn = {scale: model.sample(8, guidance=scale) for scale in (0.0, 1.0, 3.0)}
    for scale in drawn:
        expected = by_hand(model, lambda conditional, free, t: scale * conditional + (1 - scale) * free)  # noqa: B023
        assert grey_levels_apart(drawn[scale], expected) <= 1  # the edge of rounding
    assert min(grey_levels_apart(drawn[0.0], drawn[1.0]), grey_levels_apart(drawn[3.0], drawn[1.0])) > 10


def test_interval_and_rescale_reach_the_sampler(model):
    alpha_bar = np.cumprod(1 - np.linspace(20e-4, 0.4, 50))
    sigma = jnp.asarray(np.sqrt(1 / alpha_bar - 1), jnp.float32)

    def in_part(conditional, free, t):
        inside = (sigma[t] > 0.5) & (sigma[t] <= 10.0)
        return jnp.where(inside[:, None, None, None], 3.0 * conditional - 2.0 * free, conditional)

    def rescaled(conditional, free, t):
        guided, axes = 3.0 * conditional - 2.0 * free, (1, 2, 3)
        ratio = conditional.std(axes, keepdims=True) / guided.std(axes, keepdims=True)
        return 0.6 * guided * ratio + 0.4 * guided

    plain = model.sample(8, guidance=3.0)
    for options, combine in (({"guidance_interval": (0.5, 10.0)}, in_part), ({"guidance_rescale": 0.6}, rescaled)):
        drawn = model.sample(8, guidance=3.0, **options)
        assert grey_levels_apart(drawn, by_hand(model, combine)) <= 1
        assert grey_levels_apart(drawn, plain) > 10


def test_guided_images_do_not_depend_on_devices_and_batches(model):
    mesh = make_mesh()
    on_eight = dataclasses.replace(model, mesh=mesh, params=put(jax.device_get(model.params), replicated(mesh)))
    options = {"guidance": 3.0, "guidance_interval": (0.5, 10.0), "guidance_rescale": 0.6}
    drawn = model.sample(10, **options)
    assert grey_levels_apart(on_eight.sample(10, **options), drawn) <= 1
    assert grey_levels_apart(model.sample(10, batch_size=3, **options), drawn) <= 1


def test_without_a_class_labels_make_no_difference(model):
    np.testing.assert_array_equal(model.sample(8, guidance=0.0), model.sample(8, guidance=0.0, labels=2))


def test_scale_one_is_the_model_without_guidance(model):
    """To the bit; and the settings of the config are those of a call that names none."""
    plain = model.sample(8)
    np.testing.assert_array_equal(model.sample(8, guidance=1.0, guidance_interval=(0.1, 1.0), guidance_rescale=0.5), plain)
    sample = dataclasses.replace(CONFIG.sample, guidance=3.0)
    guided = dataclasses.replace(model, config=dataclasses.replace(CONFIG, sample=sample))
    np.testing.assert_array_equal(guided.sample(8), model.sample(8, guidance=3.0))
    np.testing.assert_array_equal(guided.sample(8, guidance=1.0), plain)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_networks_that_cannot_be_guided(model, scale):
    for field, change in (
        ("model.num_classes", {"model": dataclasses.replace(CONFIG.model, num_classes=None)}),
        ("diffusion.label_dropout", {"diffusion": dataclasses.replace(CONFIG.diffusion, label_dropout=0.0)}),
    ):
        other = dataclasses.replace(model, config=dataclasses.replace(CONFIG, **change))
        one_line_error(lambda other=other: other.sample(1, guidance=scale), fragments=[f"sample.guidance = {scale}", field])


def test_a_models_network_takes_part_in_compiled_and_differentiated_programs(model):
    """model.network_fn with classifier_guided and sample: d/dx of -c |x|^2 / 2 is -c x, so eps grows by c s x."""
    xt, t = jnp.asarray(np.random.default_rng(1).standard_normal((4, 8, 8, 1)), jnp.float32), jnp.asarray([0, 10, 30, 49])
    np.testing.assert_allclose(jax.jit(model.network_fn)(xt, t), model.network_fn(xt, t), rtol=1e-4, atol=1e-5)  # two programs

    def log_prob(xt, t):
        return -0.05 * jnp.sum(jnp.square(xt), axis=(1, 2, 3))

    guided = ddpm.classifier_guided(model.schedule, model.network_fn, log_prob, scale=3.0, prediction="v")
    a2 = np.cumprod(1 - np.linspace(20e-4, 0.4, 50))[np.asarray(t)].reshape(4, 1, 1, 1)
    expected = np.asarray(model.network_fn(xt, t)) + 3.0 * 0.1 * np.sqrt(1 / a2 - 1) * np.asarray(xt)
    np.testing.assert_allclose(guided(xt, t), expected, rtol=1e-4, atol=1e-5)
    x = ddpm.sample(jax.random.key(0), model.schedule, ddpm.make_denoiser(model.schedule, guided, "v"), (2, 8, 8, 1), "ddim", 3)
    assert np.isfinite(x).all()
