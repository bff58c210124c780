"""Group normalisation with SiLU for CPUs, against its definition in float64 and against Flax's with autodiff."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models import layers
from ddpm_jax.models.layers import GroupNorm, ResBlock
from ddpm_jax.models.normalization import group_norm_cpu

EPS = 1e-6


def draw(shape, seed=0):
    rng = np.random.default_rng(seed)
    x, scale, bias, dy = (rng.standard_normal(each) for each in (shape, shape[-1:], shape[-1:], shape))
    return tuple(jnp.asarray(array, jnp.float32) for array in (0.5 + 2 * x, 1 + 0.5 * scale, bias, dy))


def value_and_gradients(function, *arguments, dy):
    """function(*arguments), and the gradients by each argument for the gradient dy of the value, as one program."""

    def program(arguments, dy):
        y, vjp = jax.vjp(function, *arguments)
        return [y, *vjp(dy)]

    return jax.jit(program)(arguments, dy)


def reference(x, scale, bias, num_groups, silu):
    """The definition, with the variance as the mean of squared deviations."""
    x, scale, bias = (np.asarray(array, np.float64) for array in (x, scale, bias))
    batch, height, width, channels = x.shape
    groups = x.reshape(batch, height, width, num_groups, channels // num_groups)
    mean, variance = (f(groups, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    h = ((groups - mean) / np.sqrt(variance + EPS)).reshape(x.shape) * scale + bias
    return h / (1 + np.exp(-h)) if silu else h


def assert_close(got, expected):
    """Relative 1e-5 of the largest entry."""
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    ("shape", "num_groups"), [((2, 6, 4, 8), 4), ((3, 5, 5, 6), 6), ((1, 16, 16, 64), 32), ((2, 4, 3, 7), 1)]
)
def test_values_are_those_of_the_definition(shape, num_groups, silu):
    x, scale, bias, _ = draw(shape)
    y = jax.jit(lambda *a: group_norm_cpu(*a, num_groups, EPS, silu))(x, scale, bias)
    assert y.dtype == jnp.float32
    assert_close([y], [reference(x, scale, bias, num_groups, silu)])


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("shape", "num_groups"), [((2, 6, 4, 8), 4), ((3, 5, 5, 6), 3), ((2, 16, 16, 64), 32)])
def test_gradients_are_the_slopes_of_the_definition(shape, num_groups, silu):
    """Central differences of the float64 definition, along random directions of each of the three arguments."""
    x, scale, bias, dy = draw(shape)
    arguments = [np.asarray(array, np.float64) for array in (x, scale, bias)]
    _, *gradients = value_and_gradients(lambda *a: group_norm_cpu(*a, num_groups, EPS, silu), x, scale, bias, dy=dy)
    rng, step = np.random.default_rng(0), 1e-5
    for place, gradient in enumerate(gradients):
        for _ in range(3):
            direction = rng.standard_normal(arguments[place].shape)
            ends = []
            for sign in (1, -1):
                moved = [a + sign * step * direction if i == place else a for i, a in enumerate(arguments)]
                ends.append(np.sum(reference(*moved, num_groups, silu) * np.asarray(dy, np.float64)))
            slope, size = (ends[0] - ends[1]) / (2 * step), np.linalg.norm(gradient) * np.linalg.norm(direction)
            assert abs(np.sum(np.asarray(gradient, np.float64) * direction) - slope) <= 1e-5 * size


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", [(4, 16, 16, 64), (2, 8, 8, 256)])
def test_values_and_gradients_of_flax(shape, silu):
    x, scale, bias, dy = draw(shape)

    def plain(x, scale, bias):
        h = nn.GroupNorm(32, epsilon=EPS).apply({"params": {"scale": scale, "bias": bias}}, x)
        return nn.silu(h) if silu else h

    expected = value_and_gradients(plain, x, scale, bias, dy=dy)
    got = value_and_gradients(lambda *a: group_norm_cpu(*a, 32, EPS, silu), x, scale, bias, dy=dy)
    assert_close(got, expected)


# --- where the programs for a CPU are used


def test_other_platforms_keep_the_compilers_own(monkeypatch):
    x = draw((2, 8, 8, 64))[0]
    block = ResBlock(64, 0.0, 32, jnp.float32)
    temb = jnp.ones((2, 8))

    def traced():
        params = jax.eval_shape(lambda: block.init(jax.random.key(0), x, temb, True))
        return jax.tree.map(lambda p: p.shape, params), str(jax.make_jaxpr(lambda p: block.apply(p, x, temb, True))(params))

    shapes, program = traced()
    assert "custom_vjp" in program
    monkeypatch.setattr(layers, "on_cpu", lambda: False)
    other_shapes, other_program = traced()
    assert other_shapes == shapes
    assert "custom_vjp" not in other_program and "conv_general_dilated" in other_program


def test_a_block_gives_the_same_numbers_on_other_platforms(monkeypatch):
    """Winograd, normalisation and all: values and gradients by the input and by every parameter."""
    x, _, _, dy = draw((4, 16, 16, 64))
    rng = np.random.default_rng(5)
    block, temb = ResBlock(128, 0.0, 32, jnp.float32), jnp.asarray(rng.standard_normal((4, 16)), jnp.float32)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, temb, True))
    params = jax.tree.map(lambda p: jnp.asarray(0.1 * rng.standard_normal(p.shape), jnp.float32), shapes)
    dy = jnp.concatenate([dy, dy], axis=-1)

    def run():
        found = value_and_gradients(lambda p, x: block.apply(p, x, temb, True), params, x, dy=dy)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]

    got = run()
    monkeypatch.setattr(layers, "on_cpu", lambda: False)
    assert_close(got, run())


def test_bfloat16_is_normalised_as_elsewhere():
    x = draw((2, 8, 8, 64))[0].astype(jnp.bfloat16)
    norm = GroupNorm(32, jnp.bfloat16)
    params = jax.eval_shape(norm.init, jax.random.key(0), x)
    program = str(jax.make_jaxpr(lambda p: norm.apply(p, x))(params))
    assert "custom_vjp" not in program


def test_of_each_layer_its_input_alone_is_kept_for_the_gradient():
    """Eight layers between products with a constant matrix: eight arrays, and a few more while one layer is at work."""
    x, weights = jnp.zeros((4, 16, 16, 32)), jnp.zeros((32, 32))

    def loss(x, scale, bias):
        for _ in range(8):
            x = group_norm_cpu(x @ weights, scale, bias, 8, EPS, silu=True)
        return jnp.sum(x)

    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, jnp.ones(32), jnp.zeros(32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 12 * x.nbytes
