"""How timesteps are drawn, and the simple loss."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.stats
from reference import P_VALUE, assert_close

from ddpm_jax import make_schedule
from ddpm_jax.diffusion.losses import draw_timesteps, simple_loss

BETAS = reference.linear_betas(1000)
T = np.array([0, 1, 250, 999], np.int32)


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("linear", 1000)


@pytest.mark.parametrize("method", ["uniform", "stratified"])
@pytest.mark.parametrize("num_steps", [1, 7, 1000])
def test_timesteps_are_in_range(method, num_steps):
    t = draw_timesteps(jax.random.key(0), 50_000, num_steps, method)
    assert t.dtype == jnp.int32
    assert t.shape == (50_000,)
    assert (t.min(), t.max()) == (0, num_steps - 1)


def test_uniform_timesteps_are_uniform_and_independent():
    t = np.asarray(draw_timesteps(jax.random.key(1), 100_000, 10))
    assert scipy.stats.chisquare(np.bincount(t, minlength=10)).pvalue > P_VALUE
    pairs = np.histogram2d(t[::2], t[1::2], bins=10)[0]
    assert scipy.stats.chisquare(pairs.ravel()).pvalue > P_VALUE


@pytest.mark.parametrize(("batch_size", "num_steps"), [(8, 1000), (125, 1000), (7, 1000), (16, 10), (1, 300)])
def test_stratified_timesteps_fall_one_in_each_part(batch_size, num_steps):
    t = np.stack([draw_timesteps(jax.random.key(seed), batch_size, num_steps, "stratified") for seed in range(20)])
    edges = np.arange(batch_size + 1) * num_steps / batch_size
    assert (t >= np.floor(edges[:-1])).all()
    assert (t < np.ceil(edges[1:])).all()
    assert len(np.unique(t, axis=0)) > 1  # drawn anew each time


def test_stratified_timesteps_are_uniform_and_independent():
    """12 steps in 4 parts: image i draws one of 3 i, 3 i + 1, 3 i + 2, each as often, whatever its neighbour draws."""
    keys = jax.random.split(jax.random.key(2), 20_000)
    t = np.asarray(jax.vmap(lambda key: draw_timesteps(key, 4, 12, "stratified"))(keys))
    for image, draws in enumerate(t.T):
        counts = np.bincount(draws - 3 * image, minlength=3)
        assert scipy.stats.chisquare(counts).pvalue > P_VALUE
    pairs = np.bincount(3 * t[:, 0] + (t[:, 1] - 3), minlength=9)
    assert scipy.stats.chisquare(pairs).pvalue > P_VALUE


def images(seed, shape=(4, 5, 3, 2)):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape).astype(np.float32) for _ in range(2))


def targets(x0, eps, t):
    a, v = (coefficient[t].reshape(-1, 1, 1, 1) for coefficient in reference.forward_kernels(BETAS))
    return {"eps": eps, "x0": x0, "v": a * eps - np.sqrt(v) * x0}


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_loss_equals_the_reference(schedule, prediction):
    x0, eps = images(3)

    def network(xp, xt, t):
        return xp.tanh(0.5 * xt + t.reshape(-1, 1, 1, 1) / 1000)

    losses = simple_loss(
        schedule,
        lambda xt, t: network(jnp, xt, t.astype(jnp.float32)),
        jnp.asarray(x0),
        jnp.asarray(T),
        jnp.asarray(eps),
        prediction,
    )
    assert losses.dtype == jnp.float32
    xt = np.stack([reference.q_sample(BETAS, x0[i].astype(np.float64), t, eps[i]) for i, t in enumerate(T)])
    difference = targets(x0.astype(np.float64), eps, T)[prediction] - network(np, xt, T)
    assert_close(losses, (difference**2).sum((1, 2, 3)) / 30)


def test_eps_is_the_default(schedule):
    x0, eps = map(jnp.asarray, images(4))
    arguments = (schedule, lambda xt, t: 0.5 * xt, x0, jnp.asarray(T), eps)
    np.testing.assert_array_equal(simple_loss(*arguments), simple_loss(*arguments, prediction="eps"))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_perfect_network_has_no_loss(schedule, prediction):
    x0, eps = images(5)
    perfect = jnp.asarray(targets(x0, eps, T)[prediction], jnp.float32)
    losses = simple_loss(schedule, lambda xt, t: perfect, jnp.asarray(x0), jnp.asarray(T), jnp.asarray(eps), prediction)
    assert (losses < 1e-9).all()


def test_a_network_of_zeros_has_the_loss_one(schedule):
    """The sum of N squared normal numbers is chi-square with N degrees of freedom."""
    shape = (16, 32, 32, 3)
    x0, eps = map(jnp.asarray, images(6, shape))
    losses = simple_loss(schedule, lambda xt, t: jnp.zeros_like(xt), x0, jnp.full(16, 700), eps)
    assert losses.shape == (16,)
    size = np.prod(shape)
    upper = scipy.stats.chi2.sf(float(losses.mean()) * size, size)
    assert 2 * min(upper, 1 - upper) > P_VALUE


def test_an_unknown_prediction(schedule):
    x0, eps = map(jnp.asarray, images(7))
    # Unwrapped: the type checks of the test session would catch a wrong name before the function does.
    with pytest.raises(ValueError, match=r"unknown prediction 'score': choose eps, x0 or v"):
        inspect.unwrap(simple_loss)(schedule, lambda xt, t: xt, x0, jnp.asarray(T), eps, "score")
