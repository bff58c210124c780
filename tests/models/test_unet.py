"""The UNet against NumPy float64 and published sizes."""

import functools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import unet_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from random_weights import SHAPE, float64, images, random_params
from reference import P_VALUE, assert_close

from ddpm_jax import ModelConfig, UNet
from ddpm_jax.config import ModelStyle
from ddpm_jax.models import bind, init_params, make_unet, num_params
from ddpm_jax.models.layers import Attention, ResBlock
from ddpm_jax.models.styles import IMPROVED, STYLES

FAST = {"xla_backend_optimization_level": 0}
"""Compiler options that halve the time of compilation, which is most of what these tests take."""

SMALL = {"channels": 8, "num_res_blocks": 1, "attention_resolutions": (4,), "num_groups": 4}
UNET = UNet(out_channels=2, multipliers=(1, 2), dropout=0.5, num_classes=3, **SMALL)
"""Two channels in each group at least: with one, GroupNorm would undo the biases in front of it."""
IMPROVED_UNET = UNET.clone(out_channels=4, num_heads=2, style="improved", time_scale=0.25)
"""As for T = 4000 with learned variances."""


def jit(function, **options):
    return jax.jit(function, compiler_options=FAST, **options)


def leaves(params):
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def shapes_of(unet, image_shape):
    """Parameters of a network, as shapes."""
    arguments = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(unet.init, jax.random.key(0), *arguments)["params"]


@pytest.fixture(scope="module")
def params():
    return random_params(shapes_of(UNET, SHAPE[1:]))


@pytest.fixture(scope="module")
def fresh_params():
    return jit(lambda: init_params(UNET, 0, SHAPE[1:]))()


@pytest.fixture(scope="module")
def apply():
    """(params, xt, t, labels) -> output without dropout."""
    return jit(lambda params, xt, t, labels: UNET.apply({"params": params}, xt, t, labels))


@pytest.fixture(scope="module")
def apply_unlabelled():
    return jit(lambda params, xt, t: UNET.apply({"params": params}, xt, t))


def training_output_and_grad(unet):
    """(params, xt, t, key) -> output in training and the gradient of a weighted sum of its squares."""

    def loss(params, xt, t, key):
        output = unet.apply({"params": params}, xt, t, jnp.asarray([0, 2]), train=True, rngs={"dropout": key})
        return jnp.sum(jnp.asarray(images(50)) * output**2), output

    return jit(jax.grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def train():
    return training_output_and_grad(UNET)


# Sizes


IMPROVED_CIFAR10 = ModelConfig(num_res_blocks=3, attention_resolutions=(16, 8), num_heads=4, dropout=0.3, style="improved")


@pytest.mark.parametrize(
    ("unet", "size", "total"),
    [
        (UNet(), 32, 35_746_307),
        (UNet(multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0), 256, 113_673_219),
        (make_unet(IMPROVED_CIFAR10, 3, learn_variance=True, num_steps=4000), 32, 52_546_438),
    ],
    ids=["cifar10", "256", "improved"],
)
def test_published_networks_have_their_size_block_by_block(unet, size, total):
    shapes = shapes_of(unet, (size, size, 3))
    assert num_params(shapes) == total
    sizes = sorted(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    expected = unet_reference.parameter_sizes(
        128, unet.multipliers, unet.num_res_blocks, unet.attention_resolutions, size, 3, unet.out_channels,
        scale_and_shift=unet.style == "improved",
    )  # fmt: skip
    assert sizes == sorted(expected)


@st.composite
def networks_and_images(draw):
    multipliers = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    block = draw(st.sampled_from([1, 1, 2]))
    edge = block * 2 ** (len(multipliers) - 1)
    shape = (edge * draw(st.integers(1, 5)), edge * draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    fields = {
        "out_channels": draw(st.integers(1, 5)),
        "channels": draw(st.integers(4, 70)),
        "multipliers": multipliers,
        "num_res_blocks": draw(st.integers(1, 3)),
        "attention_resolutions": tuple(draw(st.sets(st.sampled_from([1, 2, 4, 8]), max_size=2))),
        "num_classes": draw(st.sampled_from([None, 3])),
        "space_to_depth": block,
    }
    return fields, shape


@settings(max_examples=10)
@given(networks_and_images())
def test_any_network_takes_any_image_that_its_levels_divide(network_and_image):
    fields, shape = network_and_image
    unet = UNet(**fields)
    xt, t = jax.ShapeDtypeStruct((3, *shape), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)
    output, variables = jax.eval_shape(unet.init_with_output, jax.random.key(0), xt, t)
    assert output.shape == (3, *shape[:2], unet.out_channels)
    assert output.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(jnp.float32)}


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 4), st.sampled_from([1, 2, 3]))
def test_an_image_that_the_levels_cannot_divide(height, width, levels, block):
    unet, divisor = UNet(multipliers=(1,) * levels, space_to_depth=block), block * 2 ** (levels - 1)
    if height % divisor == 0 and width % divisor == 0:
        unet.check_resolution(height, width)
    else:
        with pytest.raises(ValueError, match=rf"images of {height}x{width} pixels .* multiples of {divisor}\b"):
            unet.check_resolution(height, width)


def test_parameters_depend_on_the_seed():
    unet = UNet(channels=4, multipliers=(1,), num_res_blocks=1)
    draw = jax.jit(lambda seed: init_params(unet, seed, (2, 2, 1))["conv_in"]["kernel"], static_argnums=0)
    assert draw(0).shape == (3, 3, 1, 4)
    assert not np.allclose(draw(0), draw(1))


def test_the_network_checks_its_image():
    with pytest.raises(ValueError, match="use multiples of 2, or fewer multipliers"):
        shapes_of(UNET, (8, 9, 2))


def test_a_config_gives_its_network():
    config = ModelConfig(
        channels=16, multipliers=(1, 3), num_classes=5, num_heads=4, space_to_depth=2, dtype="bfloat16", remat=True
    )
    unet = make_unet(config, 4, num_steps=4000)
    assert (unet.out_channels, unet.channels, unet.multipliers, unet.num_classes) == (4, 16, (1, 3), 5)
    assert (unet.space_to_depth, unet.dtype, unet.remat, unet.dropout) == (2, jnp.bfloat16, True, config.dropout)
    assert (unet.num_heads, unet.style, unet.time_scale) == (4, "ddpm", 1.0)


def test_every_style_of_a_config_is_there():
    assert set(STYLES) == set(get_args(ModelStyle))


def test_single_details_make_the_other_style_too():
    """Names and shapes of the weights, and the numbers, are those of the style that has all of them."""
    details = {"cos_first": True, "frequency_shift": 0, "scale_and_shift": True, "pad_all_sides": True, "norm_eps": 1e-5}
    theirs = IMPROVED_UNET.clone(time_scale=1.0)
    ours = theirs.clone(style="ddpm", **details)
    params = random_params(shapes_of(theirs, SHAPE[1:]), seed=7)
    assert jax.tree.map(jnp.shape, shapes_of(ours, SHAPE[1:])) == jax.tree.map(jnp.shape, params)
    arguments = {"params": params}, jnp.asarray(images(4, SHAPE)), jnp.arange(SHAPE[0])
    expected = theirs.apply(*arguments)
    np.testing.assert_array_equal(ours.apply(*arguments), expected)
    for name, value in details.items():
        changed = ours.clone(**{name: 3e-2 if name == "norm_eps" else not value})
        if name != "scale_and_shift":  # another number of weights
            assert np.abs(changed.apply(*arguments) - expected).max() > 1e-3, name


def test_heads_follow_from_their_channels():
    unet = UNET.clone(head_channels=4)
    assert [unet.heads(channels) for channels in (4, 16)] == [1, 4]
    assert UNET.clone(num_heads=2).heads(16) == 2
    with pytest.raises(ValueError, match="head_channels = 5 doesn't divide"):
        unet.clone(head_channels=5).check_resolution(8, 8)


def test_the_middle_may_be_without_attention():
    shapes = shapes_of(UNET, SHAPE[1:])
    assert shapes_of(UNET.clone(middle_attention=False), SHAPE[1:]).keys() == shapes.keys() - {"middle_attention"}


@pytest.mark.parametrize("num_steps", [300, 1000, 4000])
def test_an_improved_network_sees_a_thousand_steps(num_steps):
    unet = make_unet(IMPROVED_CIFAR10, 3, num_steps=num_steps)
    assert (unet.style, unet.num_heads, unet.time_scale * num_steps) == ("improved", 4, 1000)


# Initial weights


def test_a_fresh_network_gives_almost_zero(fresh_params, apply):
    """Ho et al.'s zero layers have the scale 1e-10: conv_out's weights are below 3e-6, and it sums 72 of them."""
    output = apply(fresh_params, jnp.asarray(images(8)), jnp.asarray([0, 999]), jnp.asarray([0, 2]))
    assert 0 < np.abs(output).max() < 1e-4


def test_fresh_blocks_pass_their_input_on(fresh_params):
    x, temb = jnp.asarray(images(9, (2, 4, 4, 16))), jnp.asarray(images(10, (2, 32)))
    attention, block = Attention(4, jnp.float32), ResBlock(16, 0.0, 4, jnp.float32)
    assert_close(attention.apply({"params": fresh_params["middle_attention"]}, x), x, atol=1e-3)
    assert_close(block.apply({"params": fresh_params["middle_block0"]}, x, temb, True), x, atol=1e-3)


def test_a_fresh_improved_network_gives_zero_and_its_blocks_do_nothing():
    """Nichol & Dhariwal's zero layers are zero to the bit."""
    fresh = jit(lambda: init_params(IMPROVED_UNET, 0, SHAPE[1:]))()
    zeros = {name for name, leaf in leaves(fresh).items() if name.endswith("/kernel") and not np.any(leaf)}
    assert zeros == {name for name in leaves(fresh) if name.endswith(("conv2/kernel", "out/kernel"))}  # conv_out as well
    x, temb = jnp.asarray(images(9, (2, 4, 4, 16))), jnp.asarray(images(10, (2, 32)))
    attention, block = Attention(4, jnp.float32, 2, IMPROVED), ResBlock(16, 0.0, 4, jnp.float32, IMPROVED)
    np.testing.assert_array_equal(attention.apply({"params": fresh["middle_attention"]}, x), x)
    np.testing.assert_array_equal(block.apply({"params": fresh["middle_block0"]}, x, temb, True), x)


def test_initial_weights_have_the_published_scale(fresh_params):
    """Kernels are uniform with variance scale / fan_avg; biases are 0, scales 1, classes normal."""
    is_zero = ("conv2", "attention/out", "conv_out")
    pooled = {False: [], True: []}
    for name, leaf in leaves(fresh_params).items():
        value = np.asarray(leaf, np.float64)
        if name.endswith("/kernel"):
            window = math.prod(value.shape[:-2])
            zero = name.removesuffix("/kernel").endswith(is_zero)
            bound = math.sqrt(3 * (1e-10 if zero else 1.0) / (window * (value.shape[-2] + value.shape[-1]) / 2))
            pooled[zero].append(value.ravel() / bound)
            assert np.abs(value).max() <= bound * (1 + 1e-6), name
        elif name.endswith("/embedding"):
            assert scipy.stats.kstest(value.ravel(), "norm").pvalue > P_VALUE
        else:
            assert (value == name.endswith("/scale")).all(), name
    assert len(pooled[True]) == 8 + 4 + 1  # conv2 of each block, out of each attention layer, conv_out
    for values in pooled.values():
        for value in [*values, np.concatenate(values)]:
            assert scipy.stats.kstest(value, "uniform", (-1, 2)).pvalue > P_VALUE
        assert max(abs(np.corrcoef(a[:64], b[:64])[0, 1]) for i, a in enumerate(values) for b in values[:i]) < 0.7


# The whole network


def test_the_network_equals_the_reference(params, apply, apply_unlabelled):
    xt, t, labels = images(11), np.array([3, 900]), np.array([2, 0])
    settings = {**SMALL, "levels": 2}
    expected = unet_reference.unet(float64(params), xt.astype(np.float64), t, labels=labels, **settings)
    assert np.abs(expected).max() > 1
    actual = apply(params, jnp.asarray(xt), jnp.asarray(t, jnp.int32), jnp.asarray(labels, jnp.int32))
    assert actual.dtype == jnp.float32
    # A hundred layers, and a time embedding good to 1e-4.
    assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    unlabelled = unet_reference.unet(float64(params), xt.astype(np.float64), t, **settings)
    assert_close(apply_unlabelled(params, jnp.asarray(xt), jnp.asarray(t, jnp.int32)), unlabelled, rtol=1e-3, atol=1e-3)
    assert np.abs(unlabelled - expected).max() > 0.1


def test_another_network_equals_the_reference():
    """Two blocks a level, channels that 32 groups do not divide, 2x2 patches, attention at the second level."""
    unet = UNet(out_channels=1, channels=6, multipliers=(2, 1), num_res_blocks=2, attention_resolutions=(2,), space_to_depth=2)
    params = random_params(shapes_of(unet, (8, 4, 1)), seed=3)
    xt, t = images(12, (2, 8, 4, 1)), np.array([0, 40])
    actual = jit(lambda *arguments: bind(unet, arguments[0])(*arguments[1:]))(
        params, jnp.asarray(xt), jnp.asarray(t, jnp.int32)
    )
    expected = unet_reference.unet(
        float64(params), xt.astype(np.float64), t, channels=6, levels=2, num_res_blocks=2, attention_resolutions=(2,),
        num_groups=32, block=2,
    )  # fmt: skip
    assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def improved():
    """(params, (xt, t, labels), output, gradient of a weighted sum of its squares) of an improved network."""
    params = random_params(shapes_of(IMPROVED_UNET, SHAPE[1:]), seed=5)
    arguments = images(16), np.array([3, 3777], np.int32), np.array([2, 0], np.int32)
    weights = jnp.asarray(images(51, (*SHAPE[:3], 4)))

    def loss(params, *arguments):
        output = IMPROVED_UNET.apply({"params": params}, *arguments)
        return jnp.sum(weights * output**2), output

    gradient, output = jit(jax.grad(loss, has_aux=True))(params, *map(jnp.asarray, arguments))
    return params, arguments, np.asarray(output), gradient


def test_an_improved_network_equals_the_reference(improved):
    params, (xt, t, labels), output, _ = improved
    network = functools.partial(unet_reference.unet, float64(params), xt.astype(np.float64), labels=labels, levels=2, **SMALL)
    assert_close(output, network(t / 4, improved=True, num_heads=2), rtol=1e-3, atol=1e-3)  # as above
    for other in (network(t, improved=True, num_heads=2), network(t / 4, improved=True)):  # without its time, or its heads
        assert np.abs(output - other).max() > 0.01


def test_every_parameter_of_an_improved_network_has_a_gradient(improved):
    largest = {name: np.abs(leaf).max() for name, leaf in leaves(improved[3]).items()}
    scale = max(largest.values())
    assert np.isfinite(scale)
    assert all((value > 1e-5 * scale) != name.endswith("key/bias") for name, value in largest.items()), largest


def test_an_improved_network_in_bfloat16_is_close_to_float32(improved):
    params, arguments, full, _ = improved
    half = IMPROVED_UNET.clone(dtype=jnp.bfloat16)
    output = jit(lambda params, *inputs: half.apply({"params": params}, *inputs))(params, *map(jnp.asarray, arguments))
    # As for the other style below: 8 bits, in each of some forty layers.
    assert 1e-4 < np.linalg.norm(output - full) / np.linalg.norm(full) < 0.05


def test_time_and_labels_and_neighbours(params, apply):
    """Time and label change the output of their image, and of no other."""
    xt = jnp.repeat(jnp.asarray(images(13, (1, *SHAPE[1:]))), 2, axis=0)

    def call(t, labels):
        return np.asarray(apply(params, xt, jnp.asarray(t), jnp.asarray(labels)))

    same = call([500, 500], [1, 1])
    assert_close(same[0], same[1], atol=1e-5)
    for other in (call([500, 510], [1, 1]), call([500, 500], [1, 2])):
        assert_close(other[0], same[0], atol=1e-5)
        assert np.abs(other[1] - same[1]).max() > 0.01


def test_labels_for_a_network_without_classes():
    unet = UNet(**SMALL, multipliers=(1,))
    with pytest.raises(ValueError, match="set num_classes"):
        jax.eval_shape(unet.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))


def test_labels_in_the_first_call_do_not_change_the_parameters():
    arguments = jax.random.key(0), jnp.zeros(SHAPE), jnp.zeros(2, jnp.int32)
    with_labels = jax.eval_shape(UNET.init, *arguments, jnp.zeros(2, jnp.int32))
    without = jax.eval_shape(UNET.init, *arguments)
    assert jax.tree.structure(with_labels) == jax.tree.structure(without)
    assert jax.tree.leaves(with_labels) == jax.tree.leaves(without)


def training_arguments(params, seed):
    return params, jnp.asarray(images(11)), jnp.asarray([3, 900]), jax.random.key(seed)


def test_dropout_acts_in_training_alone(params, train, apply):
    _, first = train(*training_arguments(params, 0))
    _, again = train(*training_arguments(params, 0))
    _, other = train(*training_arguments(params, 1))
    still = apply(*training_arguments(params, 0)[:3], jnp.asarray([0, 2]))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert np.abs(first - still).max() > 0.1


def test_dropout_drops_its_share_between_activation_and_second_convolution():
    """With conv2 an identity, the block shows silu(norm2(...)): each entry is dropped, or divided by 1 - rate."""
    block = ResBlock(8, dropout=0.25, num_groups=4, dtype=jnp.float32)
    x, temb = jnp.asarray(images(14, (4, 12, 12, 8))), jnp.asarray(images(15, (4, 16)))
    shapes = jax.eval_shape(functools.partial(block.init, deterministic=True), jax.random.key(0), x, temb)["params"]
    params = random_params(shapes, seed=4)
    identity = np.zeros((3, 3, 8, 8), np.float32)
    identity[1, 1] = np.eye(8)
    params["conv2"] = {"kernel": identity, "bias": np.zeros(8, np.float32)}
    still = np.asarray(block.apply({"params": params}, x, temb, True) - x)
    dropped = np.asarray(block.apply({"params": params}, x, temb, False, rngs={"dropout": jax.random.key(0)}) - x)
    kept = np.abs(dropped) > 1e-5
    assert_close(dropped, np.where(kept, still / 0.75, 0.0), atol=1e-5)
    clear = np.abs(still) > 1e-3
    assert scipy.stats.binomtest(int(kept[clear].sum()), int(clear.sum()), 0.75).pvalue > P_VALUE


def test_every_parameter_has_a_gradient(params, train):
    gradient, _ = train(*training_arguments(params, 0))
    largest = {name: np.abs(leaf).max() for name, leaf in leaves(gradient).items()}
    # Adding a constant to all keys moves all logits of a query alike, which softmax ignores.
    without = {name for name in largest if name.endswith("key/bias")}
    assert len(without) == 4
    scale = max(largest.values())
    assert all((value > 1e-5 * scale) != (name in without) for name, value in largest.items()), largest


def test_remat_changes_neither_output_nor_gradient(params, train):
    again = training_output_and_grad(UNET.clone(remat=True))
    arguments = training_arguments(params, 0)
    (gradient, output), (gradient_again, output_again) = train(*arguments), again(*arguments)
    assert_close(output_again, output, atol=1e-5)
    # Sums over all pixels, in another order: relative to the largest entry of each.
    for name, leaf in leaves(gradient).items():
        scale = max(np.abs(leaf).max(), 1.0)
        assert_close(leaves(gradient_again)[name] / scale, leaf / scale, atol=1e-5)
    call = functools.partial(UNET.clone(remat=True).apply, train=True, rngs={"dropout": jax.random.key(0)})
    program = jax.make_jaxpr(call)({"params": params}, *arguments[1:3])
    assert sum(equation.primitive.name.startswith(("remat", "checkpoint")) for equation in equations(program.jaxpr)) == 8 + 4


# bfloat16


def equations(jaxpr):
    """Every equation of a jaxpr, also of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


HALF = UNET.clone(dtype=jnp.bfloat16)


def test_bfloat16_is_close_to_float32(params, apply):
    arguments = params, jnp.asarray(images(11)), jnp.asarray([3, 900]), jnp.asarray([0, 2])
    half = jit(lambda params, *inputs: HALF.apply({"params": params}, *inputs))(*arguments)
    full = np.asarray(apply(*arguments))
    assert half.dtype == jnp.float32
    # bfloat16 has 8 bits, an error of .4 % in each of some forty layers.
    error = np.linalg.norm(half - full) / np.linalg.norm(full)
    assert 1e-4 < error < 0.05


def test_bfloat16_keeps_parameters_and_statistics_in_float32(params):
    assert shapes_of(HALF, SHAPE[1:]) == shapes_of(UNET, SHAPE[1:])
    call = functools.partial(HALF.apply, {"params": params})
    program = jax.make_jaxpr(call)(jnp.zeros(SHAPE), jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32))
    types = {}
    for equation in equations(program.jaxpr):
        types.setdefault(equation.primitive.name, []).append({v.aval.dtype.name for v in equation.invars})
    blocks, attentions = 8, 4
    assert types["exp"] == [{"float32"}] * attentions  # of softmax
    assert types["rsqrt"] == [{"float32"}] * (2 * blocks + attentions + 1)  # of GroupNorm
    assert all(dtypes == {"float32"} for name in ("reduce_sum", "reduce_max") for dtypes in types[name])
    assert types["conv_general_dilated"] == [{"bfloat16"}] * (2 * blocks + 4)
    shortcuts = 5  # down1_block0 and all on the way up
    assert types["dot_general"] == [{"bfloat16"}] * (6 * attentions + blocks + shortcuts + 2)
    assert program.out_avals[0].dtype == jnp.float32
