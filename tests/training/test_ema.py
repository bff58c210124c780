"""Moving averages of the weights: followed step by step, and put together afterwards.

Oracles: the recurrence as a plain float64 loop, integrals by quadrature, least squares between profiles as functions on a grid.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import PixelNet
from scipy.integrate import quad

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, TrainConfig
from ddpm_jax.data.pipeline import Batch
from ddpm_jax.parallel import batch_sharding, make_mesh, put, run_once
from ddpm_jax.training.ema import (
    MAX_LENGTH,
    Profile,
    ema_decay,
    ema_update,
    gamma_from_length,
    power_rate,
    profile_inner_product,
    solve_weights,
    update_averages,
)
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import init_state
from ddpm_jax.training.step import make_train_step
from ddpm_jax.validation import config_schedule

RTOL, ATOL = 1e-5, 1e-6
LENGTHS = [0.01, 0.05, 0.1, 0.25, 0.2886]


# --- constant decays


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


# --- power functions: the length, and the recurrence


def density(profile):
    """p(tau), as it is defined."""
    return lambda tau: (profile.gamma + 1) * tau**profile.gamma / profile.t ** (profile.gamma + 1) if tau <= profile.t else 0.0


def integral(function, *kinks):
    """From 0 to the last of the kinks, piece by piece."""
    edges = [0.0, *sorted(kinks)]
    return sum(quad(function, a, b, epsabs=0, epsrel=1e-12)[0] for a, b in itertools.pairwise(edges) if a < b)


@pytest.mark.parametrize("length", [*LENGTHS, MAX_LENGTH])
@pytest.mark.parametrize("t", [1.0, 700.0])
def test_the_length_is_the_standard_deviation_of_the_profile(length, t):
    p = density(Profile(t, gamma_from_length(length)))
    middle = t * (1 - 3 * length)  # where a narrow peak begins, so that quadrature sees it
    assert integral(p, max(middle, 0), t) == pytest.approx(1, rel=1e-10)
    mean = integral(lambda tau: tau * p(tau), max(middle, 0), t)
    variance = integral(lambda tau: (tau - mean) ** 2 * p(tau), max(middle, 0), t)
    assert np.sqrt(variance) / t == pytest.approx(length, rel=1e-8)


def test_powers_known_by_hand():
    """gamma = 0, the plain mean, has length 1/sqrt(12); gamma = 1, a ramp, has 1/sqrt(18)."""
    assert gamma_from_length(MAX_LENGTH) == pytest.approx(0, abs=1e-12)
    assert gamma_from_length(18**-0.5) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.289, 1.0, np.nan, np.inf])
def test_lengths_out_of_range(length):
    with pytest.raises(ValueError, match=r"length = .*: must lie in \(0, 1/sqrt\(12\) = 0.2887\]"):
        gamma_from_length(length)


@pytest.mark.parametrize("gamma", [0.0, 6.94, 100.0])
@pytest.mark.parametrize("step", [0, 1, 10, 999, 10**6])
def test_the_rate_is_exact_at_every_step(gamma, step):
    """Where the naive float32 formula is wrong by as much as 1e-2."""
    expected = 1 - (1 - 1 / np.float64(step + 1)) ** (gamma + 1)
    np.testing.assert_allclose(float(power_rate(jnp.int32(step), gamma)), expected, rtol=RTOL)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_average_is_the_integral_of_its_profile(length):
    """Weights that stand still between updates: theta_n over (n - 1, n], each with the profile's mass there."""
    config = OptimConfig(ema_lengths=(length,))
    values, name = np.random.default_rng(0).standard_normal((30, 3)) + 5, f"ema:{length}"
    averages = {name: {"w": jnp.full(3, -2.0)}}  # the first update forgets what was there
    for step, value in enumerate(values):
        averages = update_averages(averages, {"w": jnp.asarray(value, jnp.float32)}, jnp.int32(step), config)
    p = density(Profile(30.0, gamma_from_length(length)))
    masses = [quad(p, n, n + 1, epsabs=1e-15, epsrel=1e-12)[0] for n in range(30)]
    np.testing.assert_allclose(averages[name]["w"], masses @ values, rtol=RTOL, atol=ATOL)


# --- profiles and what is put together from them


PAIRS = [
    ((1.0, 0.05), (1.0, 0.1)),
    ((500.0, 0.1), (1000.0, 0.05)),
    ((1000.0, 0.02), (300.0, 0.25)),
    ((7.0, 0.2886), (8.0, 0.1)),
]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_inner_products_are_integrals(a, b):
    a, b = (Profile(t, gamma_from_length(length)) for t, length in (a, b))
    p, q = density(a), density(b)
    expected = integral(lambda tau: p(tau) * q(tau), 0.8 * min(a.t, b.t), min(a.t, b.t))
    assert profile_inner_product(a, b) == pytest.approx(expected, rel=1e-9)
    assert profile_inner_product(b, a) == pytest.approx(expected, rel=1e-9)


def test_inner_products_of_long_runs_do_not_overflow():
    a, b = Profile(1.6e6, gamma_from_length(0.005)), Profile(2.0e6, gamma_from_length(0.01))
    assert 0 <= profile_inner_product(a, b) < profile_inner_product(b, b) < np.inf


def stored_profiles(count, lengths=(0.05, 0.1), t=1000.0):
    return [Profile(t * (n + 1) / count, gamma_from_length(length)) for n in range(count) for length in lengths]


def least_squares(stored, wanted):
    """Functions on Gauss points of each piece between the profiles' ends; the last weight is 1 minus the others."""
    nodes, masses = np.polynomial.legendre.leggauss(40)
    ends = [0.0, *sorted({p.t for p in (*stored, wanted)})]
    pieces = list(itertools.pairwise(ends))
    tau = np.concatenate([(a + b) / 2 + (b - a) / 2 * nodes for a, b in pieces])
    root = np.sqrt(np.concatenate([(b - a) / 2 * masses for a, b in pieces]))
    columns = np.array([[density(p)(x) for x in tau] * root for p in stored]).T
    target = np.array([density(wanted)(x) for x in tau]) * root
    rest = np.linalg.lstsq(columns[:, :-1] - columns[:, -1:], target - columns[:, -1], rcond=None)[0]
    x = np.append(rest, 1 - rest.sum())
    return x, np.linalg.norm(target - columns @ x) / np.linalg.norm(target)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("length", [0.03, 0.075, 0.15])
@pytest.mark.parametrize("t", [1000.0, 930.0])
def test_weights_are_the_least_squares_between_profiles(count, length, t):
    stored, wanted = stored_profiles(count), Profile(t, gamma_from_length(length))
    x, distance = solve_weights(stored, wanted)
    expected, expected_distance = least_squares(stored, wanted)
    assert x.dtype == np.float64
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-8)  # normal equations square the condition, up to 500 here
    assert distance == pytest.approx(expected_distance, rel=1e-6)
    assert x.sum() == pytest.approx(1, abs=1e-12)


def test_a_stored_average_is_its_own_reconstruction():
    stored = stored_profiles(16)
    for index in (0, 7, 31):
        x, distance = solve_weights(stored, stored[index])
        # The smallest eigenvalue of the inner products is 1e-4 of the largest: errors in x are of that size's inverse.
        np.testing.assert_allclose(x, np.eye(32)[index], atol=1e-9)
        assert distance < 1e-6


def test_more_snapshots_come_nearer():
    wanted = Profile(1000.0, gamma_from_length(0.075))
    distances = [solve_weights(stored_profiles(count), wanted)[1] for count in (1, 4, 16, 64)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.01 > 0.001 > distances[-1]


# --- in the train step


CONFIG = Config(
    data=DataConfig(image_shape=(8, 8, 1)),
    diffusion=DiffusionConfig(num_steps=50),
    model=ModelConfig(multipliers=(1,), attention_resolutions=(), dropout=0.1),
    optim=OptimConfig(
        learning_rate=1e-2, warmup_steps=0, eps=1e-2, ema_decay=0.9, ema_decays=(0.0, 0.7, 0.95), ema_lengths=(0.05, 0.25)
    ),
    train=TrainConfig(batch_size=16, num_steps=100),
)


def train(config, count, devices=1):
    """The states after each of some steps."""
    mesh, unet = make_mesh(jax.devices()[:devices]), PixelNet(out_channels=1, dropout=config.model.dropout)
    optimizer = make_optimizer(config.optim, config.train.num_steps)
    state = run_once(mesh, lambda: init_state(config, unet, optimizer))
    train_step = make_train_step(config, config_schedule(config), unet, optimizer, mesh)
    train_step = jax.jit(train_step, compiler_options={"xla_backend_optimization_level": 0})
    for step in range(count):
        images = np.random.default_rng(step).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
        state, _ = train_step(state, Batch(put(images, batch_sharding(mesh))))
        yield state


@pytest.mark.parametrize("warmup", [False, True])
def test_every_average_of_a_real_run_is_the_plain_loop(warmup):
    """Over the weights that training really visits, in float64, by each average's own recurrence."""
    config = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, ema_warmup=warmup))
    plain = {}
    for n, state in enumerate(train(config, 30)):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
        decays = {f"decay:{d}": min(d, (1 + n) / (10 + n)) if warmup else d for d in (0.0, 0.7, 0.95)}
        for length in (0.05, 0.25):
            gamma = np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max()
            decays[f"ema:{length}"] = (1 - 1 / (n + 1)) ** (gamma + 1)
        if not plain:
            start = jax.tree.map(lambda x: np.asarray(x, np.float64), next(train(zero_rate(config), 1)).params)
            plain = dict.fromkeys(decays, start)
        for name, d in decays.items():
            plain[name] = jax.tree.map(lambda a, x: d * a + (1 - d) * x, plain[name], params)  # noqa: B023
    assert list(state.averages) == list(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL), state.averages, plain)
    kernels = [tree["Dense_0"]["kernel"] for tree in (state.params, state.ema, *state.averages.values())]
    np.testing.assert_allclose(kernels[2], kernels[0], rtol=RTOL, atol=ATOL)  # decay 0 is the weights themselves
    for index, kernel in enumerate(kernels[2:]):
        assert all(not np.allclose(kernel, other, atol=1e-4) for other in kernels[index + 3 :])


def zero_rate(config):
    """The config of a run that stays at its initial weights."""
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=1e-30))


def test_averages_do_not_touch_the_training():
    without = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, ema_decays=(), ema_lengths=()))
    *_, plain = train(without, 5)
    *_, state = train(CONFIG, 5)
    assert plain.averages == {}
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(state._replace(averages={})), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_and_eight_devices_follow_the_same_averages():
    *_, one = train(CONFIG, 20)
    *_, eight = train(CONFIG, 20, devices=8)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(eight.averages))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL), one.averages, eight.averages)
