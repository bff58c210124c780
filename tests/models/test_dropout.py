"""Dropout: its rate and scale, and masks that belong to the rows of a batch, however it is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ddpm_jax.models.layers import Dropout, keep_mask

P_VALUE = 1e-3


def drop(x, rate, key=0, rows=None, deterministic=False):
    rngs = {"dropout": jax.random.key(key)}
    return np.asarray(Dropout(rate).apply({}, jnp.asarray(x), deterministic, rows, rngs=rngs))


def masks(rows, shape=(5, 7, 3), dropped=2**14, key=0):
    return np.asarray(keep_mask(jax.random.key(key), jnp.asarray(rows), shape, dropped))


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_are_dropped_at_the_rate_and_the_others_scaled_up(rate, dtype):
    """The rate is met within a binomial's bounds and the scale to 2^-16 / (1 - rate), which bfloat16 can't tell."""
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (16, 9, 10, 11)), dtype)
    output = drop(x, rate)
    assert output.dtype == dtype
    kept = output != 0
    assert scipy.stats.binomtest(int(kept.sum()), kept.size, 1 - rate).pvalue > P_VALUE
    rtol = 2**-16 / (1 - rate) + 1e-6 if dtype == jnp.float32 else 2**-7
    expected = np.asarray(x, np.float64)[kept] / (1 - rate)
    np.testing.assert_allclose(output[kept].astype(np.float64), expected, rtol=rtol)


def test_the_expectation_is_the_value():
    """Over 4,000 masks of each of 30 values, dropped half of the time: the mean's deviation is 1 / sqrt(4000) of the value."""
    x = np.arange(1.0, 31.0, dtype=np.float32)
    mean = drop(np.broadcast_to(x, (4000, 30)), 0.5).mean(axis=0)
    np.testing.assert_allclose(mean / x, 1, atol=4.5 / np.sqrt(4000))


def test_dropout_is_off_where_deterministic_or_without_a_rate():
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(drop(x, 0.5, deterministic=True), x)
    np.testing.assert_array_equal(drop(x, 0.0), x)
    np.testing.assert_array_equal(drop(x, 1 - 2**-20), 0)  # all but one of 2^16


@pytest.mark.parametrize("shape", [(5, 7, 3), (4, 6), (1,), (3,)])  # odd and even numbers of values
def test_the_mask_of_a_row_is_that_of_its_number_alone(shape):
    whole = masks(range(12), shape)
    assert whole.shape == (12, *shape)
    np.testing.assert_array_equal(masks([7], shape)[0], whole[7])
    np.testing.assert_array_equal(masks([9, 2, 5], shape), whole[[9, 2, 5]])
    x = np.ones((12, *shape), np.float32)
    thirds = [np.arange(i, 12, 3) for i in range(3)]
    pieces = np.concatenate([drop(x[rows], 0.25, rows=jnp.asarray(rows)) for rows in thirds])
    np.testing.assert_array_equal(drop(x, 0.25), pieces[np.argsort(np.concatenate(thirds))])


def test_rows_and_neighbouring_values_and_keys_are_independent():
    """Each pair of values is kept together with probability 9/16: rows, neighbours, the two halves of a word, and keys."""
    kept = masks(range(64), (10, 10, 4))
    flat = kept.reshape(64, -1)
    pairs = {
        "rows": kept[:-1] & kept[1:],
        "neighbours": flat[:, :-1] & flat[:, 1:],
        "halves of a word": flat[:, :200] & flat[:, 200:],
        "keys": kept & masks(range(64), (10, 10, 4), key=1),
    }
    for name, both in pairs.items():
        assert scipy.stats.binomtest(int(both.sum()), both.size, 9 / 16).pvalue > P_VALUE, name
    assert scipy.stats.chisquare(kept.sum(axis=(0, 1, 2))).pvalue > P_VALUE  # and each channel alike


def test_the_gradient_passes_through_what_was_kept():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 6, 5)), jnp.float32)
    gradient = jax.grad(lambda x: Dropout(0.25).apply({}, x, False, rngs={"dropout": jax.random.key(3)}).sum())(x)
    np.testing.assert_allclose(gradient, np.where(drop(x, 0.25, key=3) != 0, 4 / 3, 0), rtol=1e-6)
