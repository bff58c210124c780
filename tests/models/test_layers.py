"""The time embedding and the layers that the UNet is made of, against NumPy float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.special
import unet_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import float64, images, random_params
from reference import assert_close

from ddpm_jax.models import layers
from ddpm_jax.models.embedding import sinusoidal_embedding
from ddpm_jax.models.layers import Attention, GroupNorm, ResBlock, depth_to_space, downsample, space_to_depth, upsample
from ddpm_jax.models.styles import DDPM, IMPROVED, STYLES

# The time embedding


@settings(max_examples=15)
@given(st.integers(4, 70), st.lists(st.integers(0, 999), min_size=3, max_size=3))
def test_sinusoidal_embedding_equals_the_reference(dim, t):
    embedding = sinusoidal_embedding(jnp.asarray(t, jnp.int32), dim)
    assert embedding.dtype == jnp.float32
    # Angles up to 999 in float32 are off by 6e-5: half a unit in their last place and as much from the frequency's.
    assert_close(embedding, reference.sinusoidal_embedding(t, dim), atol=1e-4)


@settings(max_examples=15)
@given(st.integers(4, 70), st.lists(st.integers(0, 3999), min_size=3, max_size=3))
def test_cosine_embedding_equals_the_reference(dim, steps):
    t = np.array(steps) / 4  # as with T = 4000; exact in float32
    embedding = sinusoidal_embedding(jnp.asarray(t, jnp.float32), dim, cos_first=True, frequency_shift=0)
    assert embedding.dtype == jnp.float32
    assert_close(embedding, unet_reference.cosine_embedding(t, dim), atol=1e-4)  # as above


@pytest.mark.parametrize(("dim", "shift", "least"), [(3, 0, 4), (3, 1, 4), (5, 2, 6)])
def test_a_time_embedding_is_not_too_narrow(dim, shift, least):
    with pytest.raises(ValueError, match=f"needs {least} channels or more, not {dim}"):
        sinusoidal_embedding(jnp.zeros(1, jnp.int32), dim, frequency_shift=shift)
    assert sinusoidal_embedding(jnp.ones(1, jnp.int32), least, frequency_shift=shift).shape == (1, least)


# The pieces


class Layer(nn.Module):
    """A function that makes a layer inside a module, as a module."""

    function: object

    @nn.compact
    def __call__(self, x):
        return self.function(x, jnp.float32, "layer")


def random_layer(module, *arguments):
    """(its output, its random weights) for a module."""
    params = random_params(jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"], seed=1)
    return module.apply({"params": params}, *arguments), float64(params)


@pytest.mark.parametrize(("style", "first"), [(DDPM, 0), (IMPROVED, 1)], ids=["ddpm", "improved"])
@pytest.mark.parametrize("size", [(6, 4), (2, 2), (8, 2)])
def test_downsample_pads_on_the_right_and_at_the_bottom_or_all_around(size, style, first):
    x = images(1, (2, *size, 3))
    actual, params = random_layer(Layer(functools.partial(downsample, style=style)), jnp.asarray(x))
    assert actual.shape == (2, size[0] // 2, size[1] // 2, 3)
    expected = unet_reference.convolution(params["layer"], x.astype(np.float64), stride=2, pad=((first, 1), (first, 1)))
    assert_close(actual, expected)


def test_upsample_repeats_pixels_and_convolves():
    x = images(2, (2, 3, 5, 4))
    actual, params = random_layer(Layer(upsample), jnp.asarray(x))
    twice = np.kron(x.astype(np.float64), np.ones((1, 2, 2, 1)))
    assert_close(actual, unet_reference.convolution(params["layer"], twice))


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(("options", "eps"), [({}, 1e-6), ({"eps": 1e-5}, 1e-5)], ids=["default", "improved"])
@pytest.mark.parametrize(("channels", "num_groups", "groups"), [(64, 32, 32), (48, 32, 16), (7, 32, 1), (6, 4, 2)])
def test_group_norm_has_its_eps_and_groups_that_fit(channels, num_groups, groups, options, eps, on_cpu, monkeypatch):
    monkeypatch.setattr(layers, "on_cpu", lambda: on_cpu)
    x = 1e-3 * images(3, (2, 4, 3, channels))  # with a variance of 1e-6, eps matters
    actual, params = random_layer(GroupNorm(num_groups, jnp.float32, silu=False, **options), jnp.asarray(x))
    expected = unet_reference.group_norm(params, x.astype(np.float64), groups, eps)
    assert_close(actual, expected)
    assert np.abs(expected - unet_reference.group_norm(params, x.astype(np.float64), groups, 1.1e-5 - eps)).max() > 0.1


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("num_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(4, 3), (1, 1)])
def test_attention_equals_the_reference(size, num_heads, on_cpu, monkeypatch):
    monkeypatch.setattr(layers, "on_cpu", lambda: on_cpu)
    x = images(4, (2, *size, 8))
    actual, params = random_layer(Attention(4, jnp.float32, num_heads), jnp.asarray(x))
    assert_close(actual, unet_reference.attention(params, x.astype(np.float64), 4, num_heads))


def test_heads_attend_by_themselves():
    """With `out` an identity, each half of the channels of two heads is attention with that half of query, key and value."""
    x = images(4, (2, 4, 3, 8))
    _, params = random_layer(Attention(4, jnp.float32, num_heads=2), jnp.asarray(x))
    params["out"] = {"kernel": np.eye(8), "bias": np.zeros(8)}
    both = Attention(4, jnp.float32, num_heads=2).apply({"params": params}, jnp.asarray(x)) - x
    for half in (slice(0, 4), slice(4, 8)):
        one = params | {
            name: {"kernel": params[name]["kernel"][:, half], "bias": params[name]["bias"][half]}
            for name in ("query", "key", "value")
        }
        h = unet_reference.group_norm(one["norm"], x.astype(np.float64), 4).reshape(2, 12, 8)
        q, k, v = (unet_reference.linear(one[name], h) for name in ("query", "key", "value"))
        weights = scipy.special.softmax(q @ k.swapaxes(1, 2) / 2, axis=-1)  # 2 = sqrt(D)
        assert_close(both[..., half], (weights @ v).reshape(2, 4, 3, 4), atol=2e-6)  # x was added and taken away


def test_heads_that_the_channels_cannot_hold():
    with pytest.raises(ValueError, match="num_heads = 3 doesn't divide the 8 channels"):
        jax.eval_shape(Attention(4, jnp.float32, num_heads=3).init, jax.random.key(0), jnp.zeros((1, 2, 2, 8)))


def test_attention_of_large_numbers_is_finite():
    attention, x = Attention(4, jnp.float32), jnp.asarray(images(5, (2, 4, 3, 8)))
    params = random_params(jax.eval_shape(attention.init, jax.random.key(0), x)["params"])
    params = jax.tree.map(lambda leaf: 1000 * leaf, params)  # logits of 1e12, whose exponential is infinite
    assert np.isfinite(attention.apply({"params": params}, x)).all()


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize(("features", "shortcut"), [(8, False), (12, True)])
def test_res_block_has_a_shortcut_only_where_channels_change(features, shortcut, style):
    x, temb = images(6, (2, 4, 3, 8)), images(7, (2, 16))
    block = ResBlock(features, dropout=0.0, num_groups=4, dtype=jnp.float32, style=style)
    call = functools.partial(block.apply, mutable=False)
    shapes = jax.eval_shape(functools.partial(block.init, deterministic=True), jax.random.key(0), x, temb)["params"]
    assert ("shortcut" in shapes) == shortcut
    params = random_params(shapes, seed=2)
    actual = call({"params": params}, jnp.asarray(x), jnp.asarray(temb), True)
    expected = unet_reference.res_block(
        float64(params), x.astype(np.float64), temb.astype(np.float64), 4, improved=style is IMPROVED
    )
    # A sum of up to 108 products in each of two convolutions, in an order of the compiler's choice.
    assert_close(actual, expected, atol=1e-5)


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))
def test_space_to_depth_and_back(block, height, width, channels):
    x = np.arange(2 * block**2 * height * width * channels, dtype=np.float32)
    x = x.reshape(2, block * height, block * width, channels)
    deep = space_to_depth(jnp.asarray(x), block)
    np.testing.assert_array_equal(deep, unet_reference.space_to_depth(x, block))
    np.testing.assert_array_equal(depth_to_space(deep, block), x)
