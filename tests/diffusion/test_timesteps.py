"""How timesteps are drawn: uniformly, by strata, and by the losses seen so far."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from reference import P_VALUE, assert_close

from ddpm_jax.diffusion.timesteps import (
    LossHistory,
    draw_by_loss,
    draw_timesteps,
    empty_history,
    probability_units,
    record_losses,
)


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


# --- importance sampling


def full_history(losses):
    """A history of the losses [T, 10]."""
    losses = np.asarray(losses, np.float32)
    return LossHistory(jnp.asarray(losses), jnp.full(len(losses), 10, jnp.int32))


def random_losses(seed, num_steps, decades=4):
    rng = np.random.default_rng(seed)
    return 10 ** rng.uniform(-decades, 0, (num_steps, 1)) * rng.uniform(0.2, 2, (num_steps, 10))


def plain_probabilities(losses):
    """p [T] of Nichol & Dhariwal (2021): prop. to the root of the mean square, with one draw in a thousand uniform."""
    roots = np.array([np.sqrt(np.mean(np.square(row))) for row in losses])
    return 0.999 * roots / roots.sum() + 0.001 / len(roots)


@pytest.mark.parametrize("num_steps", [2, 50, 1000, 4000])
def test_probabilities_equal_the_reference(num_steps):
    losses = random_losses(num_steps, num_steps)
    units = np.asarray(probability_units(full_history(losses)), np.int64)
    assert units.min() >= 1 and units.sum() < 2**31
    # A unit is 1e-9, of a probability of at least 2.5e-7.
    assert_close(units / units.sum(), plain_probabilities(losses), atol=3e-9)


def test_draws_and_weights_belong_to_the_same_probabilities(monkeypatch):
    """Exactly: as many of the equally likely places lead to t as the weight of t says, for every t.

    The places of t run from the end of those of t - 1 to its own end, so the two ends decide.
    """
    history = full_history(random_losses(0, 100))
    ends = np.cumsum(np.asarray(probability_units(history), np.int64))
    places = np.stack([np.append(0, ends[:-1]), ends - 1])  # the first and the last place of each t
    ranges = []

    def every_end(key, shape, low, high):
        ranges.append((low, int(high)))
        return jnp.asarray(places.ravel(), jnp.int32)

    monkeypatch.setattr(jax.random, "randint", every_end)
    t, weights = draw_by_loss(jax.random.key(0), history, 200)
    assert ranges == [(0, ends[-1])]
    np.testing.assert_array_equal(np.reshape(t, (2, 100)), [range(100)] * 2)
    p = np.diff(ends, prepend=0) / ends[-1]
    assert_close(np.reshape(weights, (2, 100)), np.stack([1 / (100 * p)] * 2), atol=0)
    # The expectation over t of weight x loss is then the mean loss: sum_t p_t L_t / (T p_t).
    losses = np.random.default_rng(1).uniform(0, 5, 100)
    assert_close(np.sum(p * np.asarray(weights[:100], np.float64) * losses), losses.mean())


def test_draws_have_their_distribution():
    history = full_history(random_losses(2, 30, decades=2))
    t, weights = draw_by_loss(jax.random.key(3), history, 200_000)
    assert t.dtype == jnp.int32 and weights.dtype == jnp.float32
    p = plain_probabilities(np.asarray(history.losses, np.float64))
    assert scipy.stats.chisquare(np.bincount(t, minlength=30), p * len(t)).pvalue > P_VALUE
    pairs = np.histogram2d(np.asarray(t[::2]) > 14, np.asarray(t[1::2]) > 14, bins=2)[0]
    assert scipy.stats.chi2_contingency(pairs).pvalue > P_VALUE


def test_weighted_losses_scatter_less():
    """E[(w L)^2] = sum_t L_t^2 / (T^2 p_t), which is (mean L)^2 at best: within the uniform draws' share here."""
    losses = random_losses(4, 200)
    p = np.asarray(probability_units(full_history(losses)), np.float64)
    p /= p.sum()
    now = np.sqrt(np.mean(losses**2, axis=1))
    second_moment = np.sum(now**2 / p) / 200**2
    assert second_moment < 1.002 * now.mean() ** 2 < 0.5 * np.mean(now**2)


@pytest.mark.parametrize("seen", [0, 9])
def test_draws_are_uniform_until_every_timestep_has_ten_losses(seen):
    history = full_history(random_losses(5, 40))
    history = history._replace(seen=history.seen.at[7].set(seen))
    assert len(set(np.asarray(probability_units(history)).tolist())) == 1
    _, weights = draw_by_loss(jax.random.key(0), history, 50)
    assert_close(weights, np.ones(50))
    assert len(set(np.asarray(probability_units(full_history(random_losses(5, 40)))).tolist())) > 30


def test_losses_of_zero_are_drawn_uniformly():
    assert len(set(np.asarray(probability_units(full_history(np.zeros((8, 10))))).tolist())) == 1


@pytest.mark.parametrize(("num_steps", "batch_size"), [(2, 64), (3, 16), (7, 5), (1000, 128)])
def test_the_history_holds_the_last_ten_losses(num_steps, batch_size):
    """Against one queue for each timestep, over 12 batches; with 64 losses of 2 timesteps most are forgotten at once."""
    history, queues = empty_history(num_steps), [deque(maxlen=10) for _ in range(num_steps)]
    rng, record = np.random.default_rng(6), jax.jit(record_losses)
    for number in range(12):
        t = rng.integers(0, 1 if number == 11 else num_steps, batch_size).astype(np.int32)
        losses = rng.uniform(0, 1, batch_size).astype(np.float32)
        history = record(history, jnp.asarray(t), jnp.asarray(losses))
        for step, loss in zip(t, losses, strict=True):
            queues[step].append(loss)
        for step, queue in enumerate(queues):
            seen = int(history.seen[step])
            assert min(seen, 10) == len(queue) and seen < 20
            np.testing.assert_array_equal(np.sort(history.losses[step, : len(queue)]), np.sort(queue))
