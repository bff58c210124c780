"""Learning rate, clipping, Adam and AdamW against explicit formulas and plain float64 loops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.config import OptimConfig
from ddpm_jax.training.optimizer import make_learning_rate, make_optimizer

RTOL, ATOL = 1e-5, 1e-6


def warmup_then(config, num_steps, n):
    """Learning rate of update n, counted from 0."""
    if n < config.warmup_steps:
        return config.learning_rate * n / config.warmup_steps
    if config.decay == "constant":
        return config.learning_rate
    done = min(1.0, (n - config.warmup_steps) / (num_steps - config.warmup_steps))
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
def test_learning_rate_is_the_formula(decay, warmup_steps):
    config = OptimConfig(learning_rate=3e-4, warmup_steps=warmup_steps, decay=decay)
    schedule = make_learning_rate(config, num_steps=50)
    for n in [0, 1, 5, 9, 10, 11, 29, 30, 49, 50, 51, 1000]:
        # 1e-8 = 3e-5 of the rate: float32 keeps no more of 1 + cos where that is close to 0.
        np.testing.assert_allclose(float(schedule(jnp.int32(n))), warmup_then(config, 50, n), rtol=RTOL, atol=1e-8)


def test_cosine_starts_at_the_full_rate_and_ends_at_zero():
    config = OptimConfig(learning_rate=1.0, warmup_steps=20, decay="cosine")
    rates = [float(make_learning_rate(config, 120)(jnp.int32(n))) for n in range(121)]
    assert int(np.argmax(rates)) == 20
    assert np.all(np.diff(rates[:21]) > 0)
    assert np.all(np.diff(rates[20:]) < 0)
    np.testing.assert_allclose([rates[0], rates[20], rates[70], rates[120]], [0, 1, 0.5, 0], atol=ATOL)


def test_constant_rate_knows_nothing_of_the_end():
    config = OptimConfig(warmup_steps=3, decay="constant")
    short, long = make_learning_rate(config, 5), make_learning_rate(config, 10**6)
    assert [float(short(jnp.int32(n))) for n in range(20)] == [float(long(jnp.int32(n))) for n in range(20)]


def test_warmup_longer_than_the_run_never_leaves_the_ramp():
    config = OptimConfig(learning_rate=1.0, warmup_steps=100, decay="cosine")
    schedule = make_learning_rate(config, 10)
    np.testing.assert_allclose([float(schedule(jnp.int32(n))) for n in range(10)], np.arange(10) / 100, rtol=RTOL, atol=ATOL)


CURVATURE = np.array([3.0, 0.5, 20.0, 0.01])
TARGET = np.array([1.0, -2.0, 0.3, 5.0])
START = np.array([0.5, 0.5, -0.5, 0.25])


def quadratic_gradient(p):
    return CURVATURE * (p - TARGET)


def plain_loop(config, num_updates):
    """Clip by global norm, then Adam (Kingma & Ba 2015, Algorithm 1) or AdamW (Loshchilov & Hutter 2019), in float64."""
    p, m, v = START.copy(), np.zeros(4), np.zeros(4)
    path, norms = [], []
    for n in range(num_updates):
        g = quadratic_gradient(p)
        norm = np.sqrt(np.sum(g**2))
        norms.append(norm)
        if config.clip_norm is not None and norm > config.clip_norm:
            g = g * config.clip_norm / norm
        m = config.b1 * m + (1 - config.b1) * g
        v = config.b2 * v + (1 - config.b2) * g**2
        m_hat, v_hat = m / (1 - config.b1 ** (n + 1)), v / (1 - config.b2 ** (n + 1))
        direction = m_hat / (np.sqrt(v_hat) + config.eps)
        if config.optimizer == "adamw":
            direction = direction + config.weight_decay * p
        p = p - warmup_then(config, 10**6, n) * direction
        path.append(p)
    return np.array(path), np.array(norms)


def library_loop(config, num_updates):
    """The same with the library's optimiser and autodiff; the parameters lie in two leaves, the norm is over both."""
    optimizer = make_optimizer(config, 10**6)

    def loss(tree):
        p = jnp.concatenate([tree["a"], tree["b"]])
        return 0.5 * jnp.sum(jnp.asarray(CURVATURE, jnp.float32) * jnp.square(p - jnp.asarray(TARGET, jnp.float32)))

    @jax.jit
    def update(tree, opt_state):
        updates, opt_state = optimizer.update(jax.grad(loss)(tree), opt_state, tree)
        return optax.apply_updates(tree, updates), opt_state

    tree = {"a": jnp.asarray(START[:1], jnp.float32), "b": jnp.asarray(START[1:], jnp.float32)}
    opt_state, path = optimizer.init(tree), []
    for _ in range(num_updates):
        tree, opt_state = update(tree, opt_state)
        path.append(np.concatenate([tree["a"], tree["b"]]))
    return np.array(path)


BASE = OptimConfig(learning_rate=0.05, b1=0.8, b2=0.95, eps=1e-3, warmup_steps=0, clip_norm=None)
OPTIMIZERS = {
    "adam": {},
    "defaults of Adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "large epsilon": {"eps": 0.5},
    "warm-up": {"warmup_steps": 7},
    "clipped at times": {"clip_norm": 10.0},
    "clipped always": {"clip_norm": 0.01},
    "adam has no weight decay": {"weight_decay": 0.5},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.5},
    "adamw, clipped, warm-up": {"optimizer": "adamw", "weight_decay": 0.1, "clip_norm": 10.0, "warmup_steps": 5},
}


@pytest.mark.parametrize("changes", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_updates_follow_the_plain_loop(changes):
    config = dataclasses.replace(BASE, **changes)
    expected, norms = plain_loop(config, 30)
    if config.clip_norm == 10.0:
        assert norms.min() < 10.0 < norms.max()  # both branches of the clip are taken
    # 30 updates in float32 against float64: each adds its own rounding of about 1e-7 of a value near 1.
    np.testing.assert_allclose(library_loop(config, 30), expected, rtol=RTOL, atol=5e-6)


def test_the_first_update_of_a_warmup_changes_nothing():
    config = dataclasses.replace(BASE, warmup_steps=7)
    np.testing.assert_array_equal(library_loop(config, 1)[0], START.astype(np.float32))
