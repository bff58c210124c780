"""The fast samplers on data whose exact denoiser is known: against float64 loops, the exact flow, and the data's law."""

import functools

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest
import reference
import scipy.stats
import solver_reference
from reference import P_VALUE, assert_close

from ddpm_jax import SAMPLERS, Denoised, make_denoiser, make_schedule, sample, schedule_from_betas
from ddpm_jax.diffusion.process import at
from ddpm_jax.diffusion.schedule import respace, spaced_timesteps

FINE = 4096
"""T - 1 of a schedule with lambda from 7 down to -6 in equal steps, so that 2^n + 1 evenly spaced timesteps are too."""
LAMBDA = np.linspace(7.0, -6.0, FINE + 1)
KINDS = ("linear", "cosine", "sigmoid", "scaled_linear")


@pytest.fixture(scope="module")
def fine():
    alpha_bar = 1 / (1 + np.exp(-2 * LAMBDA))
    return schedule_from_betas(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]))


def exact(schedule):
    def denoiser(xt, t):
        a, s = at(schedule.sqrt_alpha_bar, t, xt), at(schedule.sqrt_one_minus_alpha_bar, t, xt)
        x0 = mixture.denoise(jnp, xt, a, s)
        return Denoised(x0, (xt - a * x0) / s)

    return denoiser


@functools.cache
def program(sampler, num_steps, spacing="uniform"):
    """Compiled once for all schedules of one length."""
    return jax.jit(
        lambda key, schedule, x: sample(key, schedule, exact(schedule), x.shape, sampler, num_steps, spacing=spacing, x_init=x)
    )


@functools.cache
def start_and_end():
    x = np.random.default_rng(1).standard_normal((100, 2)).astype(np.float32)
    a = 1 / np.sqrt(1 + np.exp(-2 * LAMBDA[-1]))
    return x, mixture.flow(x.astype(np.float64), a, np.sqrt(1 - a**2))


@pytest.mark.parametrize("sampler", [name for name, known in SAMPLERS.items() if not known.stochastic])
def test_convergence_to_the_exact_flow_at_its_own_order(fine, sampler):
    """x_init is taken to where the probability flow takes it; the slope is that of the last doubling."""
    x, end = start_and_end()
    counts = (65, 129) if SAMPLERS[sampler].order < 3 else (129, 257)
    errors = [
        np.sqrt(np.mean((np.asarray(program(sampler, count)(jax.random.key(0), fine, jnp.asarray(x)), np.float64) - end) ** 2))
        for count in counts
    ]
    slope = np.log2(errors[0] / errors[1])
    assert slope >= {1: 0.8, 2: 1.8, 3: 2.5}[SAMPLERS[sampler].order], (errors, slope)


@pytest.mark.parametrize("sampler", list(solver_reference.LOOPS))
@pytest.mark.parametrize(("kind", "num_steps"), [("linear", 1), ("linear", 2), ("linear", 3), ("linear", 12), ("cosine", 12)])
def test_equals_the_loop_in_float64(sampler, kind, num_steps):
    a, v = reference.forward_kernels(reference.BETAS[kind](1000))
    timesteps = spaced_timesteps(num_steps, 1000)
    a, s = a[timesteps], np.sqrt(v[timesteps])
    x = start_and_end()[0]
    expected = solver_reference.LOOPS[sampler](a, s, x.astype(np.float64), lambda x, i: mixture.denoise(np, x, a[i], s[i]))
    actual = program(sampler, num_steps)(jax.random.key(0), make_schedule(kind, 1000), jnp.asarray(x))
    # Up to 24 evaluations, each rounded to 1e-7, along a flow that stretches differences a few times.
    assert_close(actual, expected, atol=5e-6)


@pytest.mark.parametrize(
    ("sampler", "options"), [("ddpm", {"variance": "fixed_small"}), ("ddim", {"eta": 1.0}), ("dpmpp_2m_sde", {})]
)
def test_stochastic_samplers_have_the_law_of_the_data(fine, sampler, options):
    """20,000 draws: mean, covariance and the share of each component, each p > 0.001."""
    count, steps = 20_000, 1025
    draws = np.asarray(sample(jax.random.key(2), fine, exact(fine), (count, 2), sampler, steps, **options), np.float64)
    mean, covariance = mixture.moments()
    z = (draws.mean(0) - mean) @ np.linalg.solve(covariance / count, draws.mean(0) - mean)
    assert scipy.stats.chi2.sf(z, 2) > P_VALUE
    away = draws - mean
    for i, j in ((0, 0), (0, 1), (1, 1)):
        product = away[:, i] * away[:, j]
        assert scipy.stats.ttest_1samp(product, covariance[i, j]).pvalue > P_VALUE
    # Components overlap by far less than one draw in a thousand: the nearest, in standard deviations, is the one drawn from.
    log_share = np.log(mixture.WEIGHTS) - 2 * np.log(mixture.STDS)
    distance = ((draws[:, None] - mixture.MEANS) ** 2).sum(-1) / 2 / mixture.STDS**2
    seen = np.bincount((log_share - distance).argmax(1), minlength=3)
    truth = mixture.draw(np.random.default_rng(3), 2_000_000)
    distance = ((truth[:, None] - mixture.MEANS) ** 2).sum(-1) / 2 / mixture.STDS**2
    share = np.bincount((log_share - distance).argmax(1), minlength=3) / len(truth)
    assert scipy.stats.chisquare(seen, share * count).pvalue > P_VALUE


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_no_schedule_prediction_or_number_of_steps_makes_nan(sampler, num_steps):
    """A wild network, clipped (first three images) or not; also where x_T is noise alone, which v and x0 can tell."""

    @jax.jit
    def draw(schedule):
        def network(xt, t):
            return 2.0 * jnp.sin(3.0 * xt + t.astype(jnp.float32)[:, None])

        ways = [
            make_denoiser(schedule, network, prediction, clip) for clip in (True, False) for prediction in ("v", "x0", "eps")
        ]

        def denoiser(xt, t):
            seen = [way(xt[i : i + 1], t[i : i + 1]) for i, way in enumerate(ways)]
            return Denoised(jnp.concatenate([one.x0 for one in seen]), jnp.concatenate([one.eps for one in seen]))

        return sample(jax.random.key(4), schedule, denoiser, (6, 4), sampler, num_steps)

    for kind in KINDS:
        schedule = make_schedule(kind, 1000)
        images = np.asarray(draw(schedule))
        assert np.isfinite(images).all(), kind
        assert np.abs(images[:3]).max() <= 1, kind
        noise_only = respace(schedule._replace(log_alpha_bar=schedule.log_alpha_bar.at[-1].set(-jnp.inf)), jnp.arange(1000))
        images = np.asarray(draw(noise_only))[[0, 1, 3, 4]]
        assert np.isfinite(images).all(), f"{kind}, zero terminal SNR"


@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
@pytest.mark.parametrize("kind", KINDS)
def test_spacing_by_noise(kind, spacing):
    """Ascending, distinct, ending at T - 1 for every K; the nearest timestep to its ideal where those are far apart."""
    schedule = make_schedule(kind, 60)
    log_snr = np.asarray(schedule.log_snr, np.float64)
    for values in (log_snr, np.append(log_snr[:-1], -np.inf)):
        for count in range(1, 61):
            timesteps = spaced_timesteps(count, 60, spacing, values)
            assert timesteps.shape == (count,)
            assert timesteps[-1] == 59
            assert timesteps[0] >= 0
            assert (np.diff(timesteps) >= 1).all()
    level = log_snr if spacing == "logsnr" else np.exp(-log_snr / 14)
    ideal = level[0] + (level[-1] - level[0]) * np.arange(4) / 3
    gap = np.abs(np.diff(level)).max()
    assert (np.abs(level[spaced_timesteps(4, 60, spacing, log_snr)] - ideal) <= gap).all()


def test_spacing_by_noise_needs_the_numbers():
    with pytest.raises(ValueError, match="spacing logsnr needs the numbers"):
        spaced_timesteps(5, 10, "logsnr")


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_network_in_bfloat16_agrees_with_float32(sampler):
    """Its output, within 1, is off by 2^-9 at most; the images by 0.02, two or three grey levels, after ten steps of that."""
    schedule = make_schedule("cosine", 1000)

    def network(dtype):
        return lambda xt, t: jnp.tanh(xt.astype(dtype) + (t.astype(dtype) / 1000)[:, None])

    def draw(dtype):
        denoiser = make_denoiser(schedule, network(dtype), "v")
        return sample(jax.random.key(5), schedule, denoiser, (8, 16), sampler, 10)

    half, single = draw(jnp.bfloat16), draw(jnp.float32)
    assert half.dtype == single.dtype == jnp.float32
    assert jnp.abs(half - single).max() < 0.02
