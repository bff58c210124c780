"""Likelihoods of data whose law is known in closed form, and the variational bound as a plain loop in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.special
import scipy.stats
from reference import P_VALUE, assert_close

from ddpm_jax import Denoised, bits_per_dim, make_denoiser, make_schedule, ode_bits_per_dim, ode_log_likelihood
from ddpm_jax.diffusion.schedule import respace

MEAN, SPREAD = 0.1, 0.3  # of the Gaussian data
LN2 = math.log(2)


def table(values, t, x):
    """values[t] in float32, ready to multiply x."""
    return jnp.asarray(values, jnp.float32)[t].reshape(t.shape + (1,) * (x.ndim - 1))


def gaussian_denoiser(betas, mean=MEAN, spread=SPREAD):
    """E[x0 | xt] of Gaussian data: linear in xt, so the reference's values at 0 and 1 tell all of it."""
    T = range(len(betas))
    offset = np.array([reference.gaussian_x0(betas, mean, spread, 0.0, t) for t in T])
    gain = np.array([reference.gaussian_x0(betas, mean, spread, 1.0, t) for t in T]) - offset
    a, v = reference.forward_kernels(betas)

    def denoiser(xt, t):
        x0 = table(offset, t, xt) + table(gain, t, xt) * xt
        return Denoised(x0, (xt - table(a, t, xt) * x0) / table(np.sqrt(v), t, xt))

    return denoiser


def gaussian_images(seed, shape):
    return MEAN + SPREAD * np.random.default_rng(seed).standard_normal(shape)


def grey_levels(images):
    """Rounded to the 256 grey levels, as float64 in [-1, 1]."""
    return np.clip(np.round((images + 1) * 127.5), 0, 255) / 127.5 - 1


def float32(x):
    return jnp.asarray(x, jnp.float32)


# The probability-flow ODE


@pytest.mark.parametrize("kind", ["linear", "cosine", "sigmoid", "scaled_linear"])
@pytest.mark.parametrize("num_steps", [None, 200])
def test_ode_likelihood_of_gaussian_data_is_the_closed_form(kind, num_steps):
    """To 0.01 bits/dim for every image; what is left is the noise of t = 0, and x_T that is not quite N(0, 1)."""
    x = gaussian_images(0, (16, 8, 8, 1))
    schedule, denoiser = make_schedule(kind), gaussian_denoiser(reference.BETAS[kind](1000))
    actual = ode_log_likelihood(jax.random.key(0), schedule, denoiser, float32(x), num_steps)
    expected = scipy.stats.norm.logpdf(x, MEAN, SPREAD).sum(axis=(1, 2, 3))
    assert actual.shape == (16,)
    np.testing.assert_allclose(actual / (64 * LN2), expected / (64 * LN2), rtol=0, atol=0.01)


def test_ode_bits_per_dim_of_grey_levels():
    """The mean over uniform noise of -log2 N(x) is in closed form: it adds the noise's variance to the square."""
    x0 = grey_levels(gaussian_images(1, (32, 16, 16, 1)))
    schedule, denoiser = make_schedule("cosine"), gaussian_denoiser(reference.cosine_betas(1000))
    actual = np.asarray(ode_bits_per_dim(jax.random.key(1), schedule, denoiser, float32(x0), 200))
    width = 2 / 255
    nats = ((x0 - MEAN) ** 2 + width**2 / 12) / (2 * SPREAD**2) + math.log(SPREAD * math.sqrt(2 * math.pi))
    expected = nats.mean(axis=(1, 2, 3)) / LN2 - math.log2(width)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0.01)
    # The noise moves an image by |x - mean| width / (sqrt(12) spread^2 ln 2 sqrt(pixels)), on average by nothing.
    assert abs(np.mean(actual - expected)) < 0.002
    assert np.std(actual - expected) > 1e-4


def exact_gaussian_ode(betas, x):
    """Log likelihood of x under the exact flow of Gaussian data and x_T ~ N(0, 1); it keeps (x - a mean) / sqrt(variance)."""
    a, v = reference.forward_kernels(betas)
    variance = a**2 * SPREAD**2 + v
    growth = math.sqrt(variance[-1] / variance[0])
    end = a[-1] * MEAN + a[0] * (x - MEAN) * growth
    return (scipy.stats.norm.logpdf(end) + math.log(growth) + math.log(a[0])).reshape(len(x), -1).sum(axis=1)


def test_ode_likelihood_converges_at_second_order():
    """Heun's order, as the number of intervals doubles; 2^k of them divide the 1024 of the schedule evenly."""
    betas = reference.cosine_betas(1025)
    schedule, denoiser = make_schedule("cosine", 1025), gaussian_denoiser(betas)
    x = gaussian_images(2, (64, 4))
    exact, errors = exact_gaussian_ode(betas, x), []
    for intervals in (16, 32, 64, 128):
        actual = ode_log_likelihood(jax.random.key(2), schedule, denoiser, float32(x), intervals + 1)
        errors.append(np.sqrt(np.mean((np.asarray(actual, np.float64) - exact) ** 2)))
    slope = -np.polyfit(np.log([16, 32, 64, 128]), np.log(errors), 1)[0]
    assert slope > 1.8, errors


def test_ode_likelihood_of_a_mixture():
    """A denoiser that is not linear, in one dimension, where one probe is exact; the density with the noise of t = 0."""
    weights, means, spreads = np.array([0.3, 0.7]), np.array([-0.6, 0.4]), np.array([0.05, 0.2])
    betas = reference.cosine_betas(4000)
    a, v = reference.forward_kernels(betas)

    def denoiser(xt, t):
        a_t, v_t = table(a, t, xt), table(v, t, xt)
        m, s2 = float32(means)[None], float32(spreads**2)[None]
        total = a_t**2 * s2 + v_t
        share = jax.nn.softmax(
            jnp.log(float32(weights))[None] - 0.5 * jnp.log(total) - (xt - a_t * m) ** 2 / (2 * total), axis=1
        )
        x0 = jnp.sum(share * (m + a_t * s2 / total * (xt - a_t * m)), axis=1, keepdims=True)
        return Denoised(x0, (xt - a_t * x0) / jnp.sqrt(v_t))

    x = np.linspace(-0.8, 1, 181)[:, None]
    actual = ode_log_likelihood(jax.random.key(3), make_schedule("cosine", 4000), denoiser, float32(x))
    noisy = np.sqrt(spreads**2 + v[0] / a[0] ** 2)
    expected = scipy.special.logsumexp(np.log(weights) + scipy.stats.norm.logpdf(x, means, noisy), axis=1)
    # Heun's error, largest in the tail of the narrow peak; a quarter of what 1000 steps leave.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-3)


CORRELATED = np.array([[1.0, 0.5, -0.3], [0.5, 1.0, 0.2], [-0.3, 0.2, 1.0]]) * 0.1


def correlated_denoiser(betas):
    a, v = (coefficient[:, None, None] for coefficient in reference.forward_kernels(betas))
    gains = float32(a * CORRELATED @ np.linalg.inv(a**2 * CORRELATED + v * np.eye(3)))

    def denoiser(xt, t):
        x0 = jnp.einsum("bij,bj->bi", gains[t], xt)
        return Denoised(x0, (xt - table(a.ravel(), t, xt) * x0) / table(np.sqrt(v.ravel()), t, xt))

    return denoiser


def test_the_estimate_of_the_divergence_is_unbiased_and_probes_lower_its_noise():
    betas = reference.cosine_betas(200)
    a, v = reference.forward_kernels(betas)
    point = np.array([0.3, -0.2, 0.4])
    exact = scipy.stats.multivariate_normal.logpdf(point, np.zeros(3), CORRELATED + v[0] / a[0] ** 2 * np.eye(3))
    x = jnp.broadcast_to(float32(point), (4000, 3))
    draw = functools.partial(ode_log_likelihood, jax.random.key(4), make_schedule("cosine", 200), correlated_denoiser(betas), x)
    one, sixteen = (np.asarray(draw(num_probes=count), np.float64) for count in (1, 16))
    assert one.std() > 0.1
    assert scipy.stats.ttest_1samp(one, exact).pvalue > P_VALUE
    # 16 probes: a quarter of the noise, to within what 4000 draws tell of it.
    assert one.std() / sixteen.std() == pytest.approx(4, rel=0.15)
    assert scipy.stats.ttest_1samp(sixteen, exact).pvalue > P_VALUE


def test_each_image_has_a_key_of_its_own():
    """Image i depends on key i, whatever its batch, in the noise of dequantisation and in the probes."""
    betas = reference.cosine_betas(50)
    keys = jax.random.split(jax.random.key(5), 6)
    x0 = float32(grey_levels(np.random.default_rng(3).normal(0, 0.3, (6, 3))))
    arguments = (make_schedule("cosine", 50), correlated_denoiser(betas))
    whole = ode_bits_per_dim(keys, *arguments, x0)
    for part in (slice(0, 2), slice(2, 6)):
        assert_close(ode_bits_per_dim(keys[part], *arguments, x0[part]), whole[part])
    assert np.abs(ode_bits_per_dim(keys[::-1], *arguments, x0) - whole).min() > 1e-4
    with pytest.raises(ValueError, match="one key for each image needs 6 keys"):
        ode_bits_per_dim(keys[:3], *arguments, x0)


def test_a_schedule_that_ends_in_pure_noise():
    """alpha_bar_T = 0 (Lin et al. 2023): x_T is N(0, 1) exactly, and the density that of the data with the noise of t = 0."""
    betas = reference.cosine_betas(1000)
    a, v = reference.forward_kernels(betas)
    schedule = make_schedule("cosine")
    schedule = schedule._replace(
        sqrt_alpha_bar=schedule.sqrt_alpha_bar.at[-1].set(0.0),
        sqrt_one_minus_alpha_bar=schedule.sqrt_one_minus_alpha_bar.at[-1].set(1.0),
    )
    x = gaussian_images(5, (16, 12))
    actual = ode_log_likelihood(jax.random.key(0), schedule, gaussian_denoiser(betas), float32(x))
    expected = scipy.stats.norm.logpdf(x, MEAN, math.sqrt(SPREAD**2 + v[0] / a[0] ** 2)).sum(axis=1)
    # Heun's error over 999 steps, per image of 12 numbers.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-3)


def test_a_schedule_of_one_step_has_no_interval():
    """Then x_T = a x + s eps is all there is: a change of scale."""
    schedule, x = make_schedule("linear", 1, beta_start=5e-4, beta_end=5e-4), gaussian_images(4, (3, 2))
    actual = ode_log_likelihood(jax.random.key(0), schedule, gaussian_denoiser(np.array([0.5])), float32(x))
    a = math.sqrt(0.5)
    assert_close(actual, (scipy.stats.norm.logpdf(a * x) + math.log(a)).sum(axis=1))


def test_what_the_ode_cannot_take():
    schedule, x = make_schedule("cosine", 10), jnp.zeros((2, 2, 2, 1))
    clipping = make_denoiser(schedule, lambda xt, t: xt)
    with pytest.raises(ValueError, match="does not clip"):
        ode_log_likelihood(jax.random.key(0), schedule, clipping, x)
    denoiser = make_denoiser(schedule, lambda xt, t: xt, clip=False)
    for num_steps in (0, 1, 11):
        with pytest.raises(ValueError, match=rf"{num_steps}\b.*10"):
            ode_log_likelihood(jax.random.key(0), schedule, denoiser, x, num_steps)
    with pytest.raises(ValueError, match="num_probes = 0"):
        ode_log_likelihood(jax.random.key(0), schedule, denoiser, x, num_probes=0)


# The variational bound

T = 30
BETAS = reference.cosine_betas(T)
SHAPE = (5, 4, 3, 2)


def network(xp, x, t):
    """A smooth x0 and a place of the variance between its bounds, both of x and t."""
    return 0.9 * xp.tanh(0.8 * x + 0.2 * xp.cos(t)), xp.sin(2.0 * x + 0.3 * t)


def smooth_denoiser(xt, t):
    """Its learned variance is written out here from the float64 betas."""
    time = t.astype(jnp.float32).reshape(-1, 1, 1, 1)
    x0, place = network(jnp, xt, time)
    lower, upper = table(reference_log_variance("fixed_small"), t, xt), table(np.log(BETAS), t, xt)
    return Denoised(x0, jnp.zeros_like(x0), lower + (place + 1.0) / 2.0 * (upper - lower))


def reference_log_variance(variance):
    """Log of the reverse steps' variance by t; at t = 0, where the posterior has none, that of t = 1 stands in."""
    posterior = reference.posterior_coefficients(BETAS)[2]
    values = np.log(BETAS) if variance == "fixed_large" else np.log(np.maximum(posterior, 1e-300))
    values[0] = np.log(posterior[1])
    return values


def bin_log_probability(x0, mean, sigma):
    """Log of the mass between the edges of each pixel's grey level, Eq. 13 of Ho et al. (2020), pixel by pixel."""
    out = np.empty(x0.shape)
    for index, x in np.ndenumerate(x0):
        level = round((x + 1) * 127.5)
        law = scipy.stats.norm(mean[index], sigma[index])
        if level == 255:
            out[index] = law.logsf((level - 0.5) / 127.5 - 1)
        elif level == 0:
            out[index] = law.logcdf(0.5 / 127.5 - 1)
        else:
            out[index] = np.log(law.cdf((level + 0.5) / 127.5 - 1) - law.cdf((level - 0.5) / 127.5 - 1))
    return out


def kl(mean, variance, other_mean, other_variance):
    """Of two Gaussians, by the textbook."""
    return 0.5 * (np.log(other_variance / variance) + (variance + (mean - other_mean) ** 2) / other_variance - 1)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_the_bound_is_hos_decomposition(variance):
    x0 = grey_levels(np.random.default_rng(5).normal(0, 0.8, SHAPE))  # some pixels are black or white: the open bins
    assert {-1.0, 1.0} <= set(x0.ravel())
    key = jax.random.key(6)
    bound = bits_per_dim(key, make_schedule("cosine", T), smooth_denoiser, float32(x0), variance)
    assert bound.prior.shape == (5,)
    assert bound.terms.shape == (5, T)

    expected = np.empty((5, T))
    for t in range(T):
        noise = np.asarray(jax.random.normal(jax.random.fold_in(key, t), SHAPE), np.float64)
        xt = reference.q_sample(BETAS, x0, t, noise)
        prediction, place = network(np, xt, float(t))
        fixed = "fixed_large" if variance == "fixed_large" else "fixed_small"
        log_variance = np.full(SHAPE, reference_log_variance(fixed)[t])
        if variance == "learned_range":
            fraction = (place + 1) / 2
            log_variance = fraction * np.log(BETAS[t]) + (1 - fraction) * reference_log_variance("fixed_small")[t]
        mean, _ = reference.q_posterior(BETAS, prediction, xt, t)
        if t == 0:
            nats = -bin_log_probability(x0, mean, np.exp(log_variance / 2))
        else:
            true_mean, true_variance = reference.q_posterior(BETAS, x0, xt, t)
            nats = kl(true_mean, true_variance, mean, np.exp(log_variance))
        expected[:, t] = nats.mean(axis=(1, 2, 3)) / LN2
    a, v = reference.forward_kernels(BETAS)
    prior = kl(a[-1] * x0, v[-1], 0.0, 1.0).mean(axis=(1, 2, 3)) / LN2
    # x_t / a is known to float32's 6e-8 only, which the network's slope and 1 / variance of the step magnify.
    assert_close(bound.terms, expected, rtol=1e-4, atol=1e-6)
    assert_close(bound.prior, prior)
    assert_close(bound.total, prior + expected.sum(axis=1), rtol=1e-4)


def reverse_variance(betas, spread=SPREAD):
    """Variance [T] of q(x_{t-1} | xt) of Gaussian data: the posterior's, and that of what is not known of x0."""
    share, _, posterior = reference.posterior_coefficients(betas)
    a, v = reference.forward_kernels(betas)
    return posterior + share**2 / (1 / spread**2 + a**2 / v)


def grey_level_bits(x0, mean, spread):
    """-log2 of the mass of N(mean, spread^2) on each grey level, the first and the last open to the outside."""
    levels = np.round((x0 + 1) * 127.5)
    upper, lower = (scipy.stats.norm.cdf((levels + side) / 127.5 - 1, mean, spread) for side in (0.5, -0.5))
    return -np.log2(np.where(levels == 255, 1.0, upper) - np.where(levels == 0, 0.0, lower))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("num_steps", [20, 1000])
def test_the_bound_is_not_below_the_exact_value(variance, num_steps):
    """With the exact denoiser of Gaussian data the model's own law is a Gaussian, cut into grey levels by the decoder.

    The chain's x_1 is Gaussian, of known mean and variance; the decoder adds its own variance.
    """
    betas = reference.cosine_betas(num_steps)
    x0 = grey_levels(gaussian_images(7, (256, 8, 8, 1)))
    schedule = make_schedule("cosine", num_steps)
    bound = bits_per_dim(jax.random.key(7), schedule, gaussian_denoiser(betas), float32(x0), variance)
    mean, chain_variance = reference.gaussian_chain(betas, np.array(MEAN), SPREAD, range(num_steps), "ddpm", variance)
    spread = math.sqrt(chain_variance + reference.posterior_coefficients(betas)[2][1])
    gap = np.asarray(bound.total, np.float64) - grey_level_bits(x0, mean, spread).mean(axis=(1, 2, 3))
    # An image's gap is an expectation over noise, seen with 64 pixels' draws; its mean over images is tested from below.
    assert scipy.stats.ttest_1samp(gap, 0.0, alternative="less").pvalue > P_VALUE
    assert gap.mean() > 0.01


@pytest.mark.parametrize("num_steps", [5, 1000])
def test_the_bound_of_the_exact_reverse_process_is_the_exact_value(num_steps):
    """Where denoiser and variance are those of the data, Eq. 5 of Ho et al. holds with equality, for any number of steps."""
    betas = reference.cosine_betas(num_steps)
    x0 = grey_levels(gaussian_images(8, (400, 8, 8, 1)))
    log_variance, mean_denoiser = np.log(reverse_variance(betas)), gaussian_denoiser(betas)

    def denoiser(xt, t):
        return mean_denoiser(xt, t)._replace(log_variance=table(log_variance, t, xt) + jnp.zeros_like(xt))

    bound = bits_per_dim(jax.random.key(8), make_schedule("cosine", num_steps), denoiser, float32(x0), "learned_range")
    gap = np.asarray(bound.total, np.float64) - grey_level_bits(x0, MEAN, SPREAD).mean(axis=(1, 2, 3))
    assert scipy.stats.ttest_1samp(gap, 0.0).pvalue > P_VALUE
    assert gap.std() / math.sqrt(400) < 0.01  # so that the test above would see a hundredth of a bit


def test_the_bound_of_a_shorter_process():
    """What `visiting` makes has a bound of its own: that of the process with the shorter schedule."""
    schedule, timesteps = make_schedule("cosine", T), jnp.array([0, 3, 10, 20, T - 1], jnp.int32)
    x0, key = float32(grey_levels(gaussian_images(8, SHAPE))), jax.random.key(8)
    short = make_denoiser(schedule, lambda xt, t: jnp.tanh(xt) * table(np.cos(np.arange(T)), t, xt)).visiting(timesteps)
    bound = bits_per_dim(key, short.schedule, short, x0)
    assert bound.terms.shape == (5, 5)
    by_hand = make_denoiser(
        respace(schedule, timesteps), lambda xt, t: jnp.tanh(xt) * table(np.cos(np.asarray(timesteps)), t, xt)
    )
    assert_close(bound.total, bits_per_dim(key, respace(schedule, timesteps), by_hand, x0).total)


def test_the_bound_of_an_image_depends_on_its_key_alone():
    keys = jax.random.split(jax.random.key(9), 5)
    x0, schedule = float32(grey_levels(gaussian_images(9, SHAPE))), make_schedule("cosine", T)
    whole = bits_per_dim(keys, schedule, smooth_denoiser, x0)
    part = bits_per_dim(keys[3:], schedule, smooth_denoiser, x0[3:])
    assert_close(part.terms, whole.terms[3:])
    assert np.abs(bits_per_dim(keys[::-1], schedule, smooth_denoiser, x0).total - whole.total)[[0, 1, 3, 4]].min() > 1e-3


def test_a_variance_that_is_not_there():
    schedule, x0 = make_schedule("cosine", T), jnp.zeros(SHAPE)
    with pytest.raises(ValueError, match="learned_range"):
        bits_per_dim(jax.random.key(0), schedule, gaussian_denoiser(BETAS), x0, "learned_range")
