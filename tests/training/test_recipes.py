"""The recipes of configs/, each with a small network and small images: a training step, and what its numbers promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import ROOT

from ddpm_jax import load_config
from ddpm_jax.data.pipeline import Batch
from ddpm_jax.inference import make_network
from ddpm_jax.models import init_params, num_params
from ddpm_jax.parallel import make_mesh
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import init_state
from ddpm_jax.training.step import make_train_step
from ddpm_jax.validation import config_schedule

FAST = {"xla_backend_optimization_level": 0}

SMALL = {
    "data.image_shape": (8, 8, 3),
    "model.channels": 8,
    "model.multipliers": (1, 2),
    "model.num_res_blocks": 1,
    "model.attention_resolutions": (4,),
    "model.num_groups": 4,
    "train.batch_size": 4,
}


def recipe(name, overrides=None):
    return load_config(ROOT / "configs" / f"{name}.py", overrides)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["cifar10_improved", "stanford_cars64"])
def test_three_steps_of_a_shrunken_recipe(name):
    """Every value stays finite, and every weight has moved: those in front of two layers that start at zero move third."""
    config = recipe(name, SMALL | {"optim.warmup_steps": 0})
    unet, optimizer = make_network(config), make_optimizer(config.optim, config.train.num_steps)
    train_step = make_train_step(config, config_schedule(config), unet, optimizer, make_mesh(jax.devices()[:1]))
    step = jax.jit(train_step, compiler_options=FAST)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    state = first = jax.jit(lambda: init_state(config, unet, optimizer), compiler_options=FAST)()
    for _ in range(3):
        state, metrics = step(state, Batch(jnp.asarray(images), None))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, metrics)))
    moved = jax.tree.map(lambda before, after: bool(np.any(before != after)), first.params, state.params)
    still = [jax.tree_util.keystr(path) for path, value in jax.tree_util.tree_leaves_with_path(moved) if not value]
    # Attention's key biases have no gradient: they move all logits of a query alike.
    assert all(name.endswith("['key']['bias']") for name in still), still


def test_an_improved_network_tells_its_variances():
    config = recipe("cifar10_improved", SMALL)
    unet = make_network(config)
    assert (unet.out_channels, unet.time_scale, unet.num_heads, unet.style) == (6, 0.25, 4, "improved")


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("cifar10", 35_746_307),
        ("cifar10_improved", 52_546_438),
        ("celebahq256", 113_673_219),
        ("lsun256_cat", 113_673_219),
        ("stanford_cars64", 35_746_307),
    ],
)
def test_parameters_of_the_recipes(name, total):
    config = recipe(name)
    assert num_params(jax.eval_shape(lambda: init_params(make_network(config), 0, config.data.image_shape))) == total


# Ho et al. (2020), appendix B: steps, batch size, learning rate, mirroring (by their scripts/run_lsun.py), dropout, variance.
HO = {
    "cifar10": (800_000, 128, 2e-4, True, 0.1, "fixed_large"),
    "celebahq256": (500_000, 64, 2e-5, True, 0.0, "fixed_small"),
    "lsun256": (2_400_000, 64, 2e-5, True, 0.0, "fixed_small"),
    "lsun256_church": (1_200_000, 64, 2e-5, True, 0.0, "fixed_small"),
    "lsun256_cat": (1_800_000, 64, 2e-5, False, 0.0, "fixed_small"),
}


@pytest.mark.parametrize("name", HO)
def test_numbers_of_the_paper(name):
    config = recipe(name)
    train, diffusion = config.train, config.diffusion
    assert HO[name] == (
        train.num_steps, train.batch_size, config.optim.learning_rate, config.data.flip, config.model.dropout,
        diffusion.variance,
    )  # fmt: skip
    assert (diffusion.schedule, diffusion.num_steps, diffusion.prediction) == ("linear", 1000, "eps")
    assert (config.optim.warmup_steps, config.optim.clip_norm, config.optim.ema_decay) == (5000, 1.0, 0.9999)


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar10_cond", "cifar10_improved", "celebahq256", "lsun256", "lsun256_church", "lsun256_cat",
             "stanford_cars64"],
)  # fmt: skip
def test_a_recipe_names_a_set_that_there_is(name, tmp_path):
    """By the builders' own account, images have the recipe's shape or any, and labels are as many. Nothing is downloaded."""
    config = recipe(name)
    prefix, _, known = config.data.source.partition(":")
    assert prefix == "tfds" and config.data.split == "train"
    builder_name, _, variant = known.partition("/")
    features = tfds.builder_cls(builder_name)(config=variant or None, data_dir=tmp_path).info.features
    shape = features["image"].shape
    assert all(have in (None, want) for have, want in zip(shape, config.data.image_shape, strict=True))
    if config.model.num_classes is not None:
        assert features["label"].num_classes == config.model.num_classes


def test_three_hundred_steps_end_in_noise():
    """The signal that is left in x_T, against betas that nobody scaled."""
    scaled = np.sqrt(np.prod(1 - np.linspace(1e-4, 0.02, 300) * 1000 / 300))
    assert np.sqrt(config_schedule(recipe("stanford_cars64")).alpha_bar[-1]) == pytest.approx(scaled, rel=1e-4)
    assert scaled < 0.006 < 0.2 < np.sqrt(np.prod(1 - np.linspace(1e-4, 0.02, 300)))
