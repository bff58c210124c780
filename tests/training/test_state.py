"""The state before the first step, and the moving average of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import Config, DataConfig, ModelConfig
from ddpm_jax.models import init_params, make_unet, num_params
from ddpm_jax.parallel import make_mesh, run_once
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import ema_decay, ema_update, init_state

CONFIG = Config(
    data=DataConfig(image_shape=(8, 8, 1)),
    model=ModelConfig(channels=8, multipliers=(1,), num_res_blocks=1, attention_resolutions=(), dropout=0.0, num_groups=4),
)


@pytest.fixture(scope="module")
def state():
    unet, optimizer = make_unet(CONFIG.model, 1), make_optimizer(CONFIG.optim, 100)
    return run_once(make_mesh(jax.devices()[:1]), lambda: init_state(CONFIG, unet, optimizer))


def test_the_average_starts_as_a_copy_of_the_weights(state):
    for value, average in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_array_equal(value, average)
        # A copy, not a second name: the buffers are donated separately.
        assert value.unsafe_buffer_pointer() != average.unsafe_buffer_pointer()


def test_a_new_state_is_at_step_zero_with_empty_moments(state):
    assert state.step.dtype == jnp.int32
    assert int(state.step) == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state.params, state.ema)))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(state.params))


def test_weights_follow_from_the_seed(state):
    unet = make_unet(CONFIG.model, 1)

    def draw(seed):
        return run_once(make_mesh(jax.devices()[:1]), lambda: init_params(unet, seed, (8, 8, 1)))

    same, other = draw(CONFIG.seed), draw(CONFIG.seed + 1)
    kernel = ("conv_in", "kernel")
    np.testing.assert_array_equal(same[kernel[0]][kernel[1]], state.params[kernel[0]][kernel[1]])
    assert not np.array_equal(other[kernel[0]][kernel[1]], state.params[kernel[0]][kernel[1]])


def test_num_params_counts_scalars_of_arrays_and_of_shapes():
    tree = {"a": np.zeros((3, 4)), "b": [np.zeros(()), np.zeros(5)], "c": np.zeros((2, 0))}
    assert num_params(tree) == 12 + 1 + 5
    assert num_params({"huge": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}) == 2**40


def test_num_params_of_a_network_counted_by_hand(state):
    """Every layer of channels (1,), one block down, two up, the middle with attention: kernels and biases."""

    def conv(i, o):
        return 9 * i * o + o

    def dense(i, o):
        return i * o + o

    def norm(c):
        return 2 * c

    def block(i, o):
        return norm(i) + conv(i, o) + dense(32, o) + norm(o) + conv(o, o) + (dense(i, o) if i != o else 0)

    attention = norm(8) + 4 * dense(8, 8)
    expected = conv(1, 8) + dense(8, 32) + dense(32, 32)  # into the first level; time embedding
    expected += block(8, 8) + 2 * block(8, 8) + attention + 2 * block(16, 8)  # down; middle; up, with skips
    expected += norm(8) + conv(8, 1)
    assert num_params(state.params) == expected


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("limit", [0.0, 0.5, 0.9999])
def test_decay_of_update_n(limit, warmup):
    for n in [0, 1, 7, 8, 9, 1000, 100_000, 800_000]:
        expected = min(limit, (1 + n) / (10 + n)) if warmup else limit
        np.testing.assert_allclose(float(ema_decay(jnp.int32(n), limit, warmup)), expected, rtol=1e-6)


def test_average_of_any_sequence_is_the_weighted_sum():
    """Unrolled: (1 - d) sum d^(n - i) x_i + d^n x_0, which no recurrence enters."""
    values, decay = np.random.default_rng(0).standard_normal((40, 3)), 0.8
    average = {"w": jnp.asarray(values[0], jnp.float32)}
    for value in values[1:]:
        average = ema_update(average, {"w": jnp.asarray(value, jnp.float32)}, jnp.float32(decay))
    weights = (1 - decay) * decay ** np.arange(38, -1, -1)
    expected = decay**39 * values[0] + weights @ values[1:]
    np.testing.assert_allclose(average["w"], expected, rtol=1e-5, atol=1e-6)


def test_an_average_close_to_its_weights_stays_there():
    """With decay 0.9999 the pull of one update is 1e-4 of the gap; in the form chosen it doesn't drift when there is none."""
    value = {"w": jnp.asarray(np.random.default_rng(1).standard_normal(1000), jnp.float32)}
    average = ema_update(value, value, jnp.float32(0.9999))
    np.testing.assert_array_equal(average["w"], value["w"])
