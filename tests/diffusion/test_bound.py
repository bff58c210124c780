"""The terms of the variational bound against quadrature, SciPy's normal distribution and Bayes' rule."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.integrate
import scipy.stats
from reference import assert_close, log_mass, vlb_term

from ddpm_jax import Denoised, make_denoiser, make_schedule
from ddpm_jax.diffusion.bound import discretized_gaussian_log_likelihood, gaussian_kl, vlb_terms

BETAS = reference.linear_betas(1000)
T = np.array([0, 1, 2, 300, 998, 999], np.int32)
LEVELS = np.arange(256) / 127.5 - 1


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("linear", 1000)


def float32(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


# --- the divergence of two Gaussians


@pytest.mark.parametrize(("mean", "variance", "other_mean", "other_variance"), [
    (0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -0.2, 2.0), (-1.0, 3.0, 1.0, 0.25), (0.0, 1e-4, 1e-3, 1.2e-4), (5.0, 1.0, -5.0, 1.0),
])  # fmt: skip
def test_kl_equals_its_integral(mean, variance, other_mean, other_variance):
    p, q = scipy.stats.norm(mean, math.sqrt(variance)), scipy.stats.norm(other_mean, math.sqrt(other_variance))
    width = 12 * math.sqrt(variance)
    expected, _ = scipy.integrate.quad(
        lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), mean - width, mean + width, epsabs=1e-12, epsrel=1e-10, limit=200
    )
    got = gaussian_kl(*float32(mean, math.log(variance), other_mean, math.log(other_variance)))
    assert got.dtype == jnp.float32
    assert_close(got, expected)


def test_kl_of_almost_equal_variances_keeps_its_digits():
    """KL of N(0, 1) and N(0, e^-d) is (e^d - 1 - d) / 2 = d^2 / 4 + d^3 / 12 + ...: by the series, in float64."""
    d = np.array([1e-3, 3e-3, 1e-2])
    expected = d**2 / 4 + d**3 / 12 + d**4 / 48
    got = gaussian_kl(*float32(0.0, 0.0, 0.0), *float32(-d))
    # expm1(d) - d = 5e-7 at d = 1e-3, where float32 has steps of 1.2e-10: two of them are 5e-4. Without expm1 it is 0.1.
    assert_close(got, expected, rtol=5e-4, atol=0)


# --- the decoder


@pytest.mark.parametrize("deviation", [1e-3, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.004, 0.0, 0.31, 0.999, 1.0, 1.2])
def test_decoder_equals_scipy_on_every_grey_level(mean, deviation):
    x0, mean, log_variance = (np.float32(value) for value in (LEVELS, np.full(256, mean), 2 * math.log(deviation)))
    got = discretized_gaussian_log_likelihood(*map(jnp.asarray, (x0, mean, log_variance)))
    assert_close(got, log_mass(*map(np.float64, (x0, mean, np.exp(np.float64(log_variance) / 2)))))


@pytest.mark.parametrize("deviation", [1e-3, 0.02, 0.7])
def test_masses_of_all_grey_levels_sum_to_one(deviation):
    means = np.linspace(-1.2, 1.2, 7)
    x0, mean = (grid.astype(np.float32) for grid in np.meshgrid(LEVELS, means))
    log_likelihood = discretized_gaussian_log_likelihood(*float32(x0, mean, 2 * math.log(deviation)))
    assert_close(np.exp(np.asarray(log_likelihood, np.float64)).sum(axis=1), np.ones(7))


def test_gradient_of_the_decoder_is_the_difference_quotient():
    x0 = LEVELS[[0, 3, 100, 128, 252, 255]].astype(np.float32)
    mean, deviation, step = x0.astype(np.float64) + 0.013, 0.02, 1e-6

    def total(mean, log_variance):
        return jnp.sum(discretized_gaussian_log_likelihood(jnp.asarray(x0), mean, log_variance))

    by_mean, by_log_variance = jax.grad(total, (0, 1))(*float32(mean, np.full(6, 2 * math.log(deviation))))
    wide = x0.astype(np.float64)
    quotient = (log_mass(wide, mean + step, deviation) - log_mass(wide, mean - step, deviation)) / (2 * step)
    # Through the rounding of x0 - mean = 0.013 to 6e-8, a relative 5e-6, times the slope of the gradient.
    assert_close(by_mean, quotient, rtol=1e-4, atol=1e-4)
    factor = math.exp(step / 2)
    quotient = (log_mass(wide, mean, deviation * factor) - log_mass(wide, mean, deviation / factor)) / (2 * step)
    assert_close(by_log_variance, quotient, rtol=1e-4, atol=1e-4)


# --- the terms


def images(seed, channels=2):
    """Images of grey levels, noise, a prediction of x0 and a place within the range of variances: [6, 3, 4, channels]."""
    rng = np.random.default_rng(seed)
    shape = (len(T), 3, 4, channels)
    x0 = LEVELS[rng.integers(0, 256, shape)].astype(np.float32)
    x0[:, 0, 0], x0[:, 0, 1] = -1, 1
    eps = rng.standard_normal(shape).astype(np.float32)
    guess = (x0 + rng.normal(0, 0.02, shape) * (1 + T.reshape(-1, 1, 1, 1) / 50)).astype(np.float32)
    return x0, eps, guess, rng.uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_terms_equal_the_reference(schedule, variance):
    x0, eps, guess, place = images(0)
    output = np.concatenate([guess, place], axis=-1) if variance == "learned_range" else guess
    denoiser = make_denoiser(schedule, lambda xt, t: jnp.asarray(output), "x0", clip=False)
    xt = np.stack([reference.q_sample(BETAS, x0[i], t, eps[i]) for i, t in enumerate(T)])
    terms = vlb_terms(schedule, denoiser, *float32(x0, xt), jnp.asarray(T), variance)
    assert terms.dtype == jnp.float32
    expected = [
        vlb_term(BETAS, x0[i], guess[i], t, variance, place[i] if "learned" in variance else None) for i, t in enumerate(T)
    ]
    # rtol: float32's log variances, up to 12, are off by 5e-7, and x0 - x0's guess of 0.02 is by 1e-7 of 1.
    assert_close(terms, expected, rtol=2e-5)


def test_a_perfect_posterior_costs_nothing_but_the_decoder(schedule):
    x0, eps, _, _ = images(1)
    denoiser = make_denoiser(schedule, lambda xt, t: jnp.asarray(x0), "x0")
    terms = vlb_terms(schedule, denoiser, *float32(x0, eps), jnp.asarray(T), "fixed_small")
    np.testing.assert_array_equal(terms[1:], 0)
    assert terms[0] > 0


def test_terms_of_one_image_depend_on_no_other(schedule):
    x0, eps, _, _ = images(2)

    def terms(rows):
        denoiser = make_denoiser(schedule, lambda xt, t: 0.3 * xt)
        return vlb_terms(schedule, denoiser, *float32(x0[rows], eps[rows]), jnp.asarray(T[rows]), "fixed_large")

    assert_close(terms(slice(2, 4)), terms(slice(None))[2:4])


@pytest.mark.parametrize(("kind", "num_steps"), [("cosine", 4000), ("linear", 1000), ("linear", 50), ("sigmoid", 1)])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_terms_and_gradients_are_finite_at_every_timestep(kind, num_steps, variance):
    """With a network of zeros that predicts eps, x0 = xt / sqrt(alpha_bar) is up to 1e5 away."""
    schedule = make_schedule(kind, num_steps)
    t = jnp.arange(num_steps)
    x0 = jnp.asarray(np.resize([-1.0, 1.0, LEVELS[130]], (num_steps, 1, 3, 1)), jnp.float32)
    xt = 4 * jnp.ones_like(x0)

    def total(output):
        terms = vlb_terms(schedule, make_denoiser(schedule, lambda xt, t: output, clip=False), x0, xt, t, variance)
        return jnp.sum(terms), terms

    gradient, terms = jax.jit(jax.grad(total, has_aux=True))(
        jnp.zeros((num_steps, 1, 3, 2 if variance == "learned_range" else 1))
    )
    assert np.isfinite(terms).all()
    assert np.isfinite(gradient).all()
    assert (terms >= 0).all()


def test_a_variance_that_nobody_told(schedule):
    x0, eps, _, _ = images(3)
    with pytest.raises(ValueError, match="learned_range needs a network that tells its variance"):
        vlb_terms(schedule, lambda xt, t: Denoised(xt, xt), *float32(x0, eps), jnp.asarray(T), "learned_range")
