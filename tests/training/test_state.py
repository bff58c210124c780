"""The state before the first step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from ddpm_jax.models import init_params, make_unet, num_params
from ddpm_jax.parallel import make_mesh, run_once
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import init_state

CONFIG = Config(
    data=DataConfig(image_shape=(8, 8, 1)),
    model=ModelConfig(channels=8, multipliers=(1,), num_res_blocks=1, attention_resolutions=(), dropout=0.0, num_groups=4),
    optim=OptimConfig(ema_decays=(0.9,), ema_lengths=(0.05, 0.1)),
)


@pytest.fixture(scope="module")
def state():
    unet, optimizer = make_unet(CONFIG.model, 1), make_optimizer(CONFIG.optim, 100)
    return run_once(make_mesh(jax.devices()[:1]), lambda: init_state(CONFIG, unet, optimizer))


def test_the_averages_start_as_copies_of_the_weights(state):
    assert list(state.averages) == ["decay:0.9", "ema:0.05", "ema:0.1"]
    trees = [state.params, state.ema, *state.averages.values()]
    for value, *averages in zip(*map(jax.tree.leaves, trees), strict=True):
        for average in averages:
            np.testing.assert_array_equal(value, average)
        # Copies, not further names: the buffers are donated separately.
        assert len({leaf.unsafe_buffer_pointer() for leaf in (value, *averages)}) == len(trees)


def test_a_new_state_is_at_step_zero_with_empty_moments(state):
    assert state.step.dtype == jnp.int32
    assert int(state.step) == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state.params, state.ema, state.averages)))
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
