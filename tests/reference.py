"""The mathematics once more, in NumPy float64 and plain loops, by other roads than the library's.

The library works from log alpha_bar; here products are multiplied out, q_sample is T composed one-step kernels, and the
posterior is Bayes' rule for two Gaussians. Nothing in this file imports the library.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats

RTOL, ATOL = 1e-5, 1e-6
"""Tolerance of a float32 result; a test that needs a looser one says why."""
P_VALUE = 1e-3
"""A statistical test (with a fixed key) fails below this."""


def assert_close(actual, expected, rtol=RTOL, atol=ATOL):
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(expected, np.float64), rtol=rtol, atol=atol)


# Schedules


def linear_betas(num_steps, beta_start=1e-4, beta_end=0.02):
    gaps = max(num_steps - 1, 1)
    return np.array([1000 / num_steps * (beta_start + (beta_end - beta_start) * i / gaps) for i in range(num_steps)])


def scaled_linear_betas(num_steps, beta_start=1e-4, beta_end=0.02):
    gaps = max(num_steps - 1, 1)
    low, high = math.sqrt(beta_start), math.sqrt(beta_end)
    return np.array([1000 / num_steps * (low + (high - low) * i / gaps) ** 2 for i in range(num_steps)])


def cosine_betas(num_steps, s=0.008):
    """Nichol & Dhariwal (2021), Eq. 17, with cos^2 as (1 + cos 2x) / 2."""

    def f(i):
        return (1 + math.cos((i / num_steps + s) / (1 + s) * math.pi)) / 2

    return betas_of([f(i) / f(0) for i in range(num_steps + 1)])


def sigmoid_betas(num_steps, start=-3.0, end=3.0, tau=1.0):
    """Jabri et al. (2022), algorithm 1, with the logistic function as (1 + tanh(x / 2)) / 2."""

    def logistic(x):
        return (1 + math.tanh(x / 2)) / 2

    first, last = logistic(-start / tau), logistic(-end / tau)

    def alpha_bar(i):
        return (logistic(-(i / num_steps * (end - start) + start) / tau) - last) / (first - last)

    return betas_of([alpha_bar(i) for i in range(num_steps + 1)])


def betas_of(alpha_bar, largest=0.999):
    """Betas [T] from alpha_bar at 0, 1/T, ..., 1 [T + 1]."""
    return np.array([min((now - then) / now, largest) for now, then in itertools.pairwise(alpha_bar)])


BETAS: dict[str, Callable[..., np.ndarray]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
}


def alpha_bars(betas):
    """alpha_bar [T] as an explicit product."""
    product, out = 1.0, []
    for beta in betas:
        product *= 1 - beta
        out.append(product)
    return np.array(out)


def zero_terminal_betas(betas):
    """Algorithm 1 of Lin et al. (2023), line by line: betas to sqrt(alpha_bar), shifted, scaled, and back to betas."""
    root = [math.sqrt(alpha_bar) for alpha_bar in alpha_bars(betas)]
    first, last = root[0], root[-1]
    root = [(value - last) * (first / (first - last)) for value in root]
    alphas = [root[0] ** 2] + [(root[i] / root[i - 1]) ** 2 for i in range(1, len(root))]
    return 1 - np.array(alphas)


def forward_kernels(betas):
    """(a, v) [T] each, q(x_t | x_0) = N(a_t x_0, v_t), from x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z, step by step."""
    a, v, out = 1.0, 0.0, []
    for beta in betas:
        a, v = math.sqrt(1 - beta) * a, (1 - beta) * v + beta
        out.append((a, v))
    return tuple(np.array(out).reshape(-1, 2).T)


def visited_betas(betas, timesteps):
    """Betas [K] of the process that visits only `timesteps`: each is the variance of the kernels between two visits."""
    out, first = [], 0
    for t in timesteps:
        _, variance = forward_kernels(betas[first : t + 1])
        out.append(variance[-1])
        first = t + 1
    return np.array(out)


# Forward process, posterior, reverse step: one image each, t an int


def q_sample(betas, x0, t, eps):
    a, v = forward_kernels(betas)
    return a[t] * x0 + math.sqrt(v[t]) * eps


def posterior_coefficients(betas):
    """(c0, ct, variance) [T] each, q(x_{t-1} | x_t, x_0) = N(c0 x_0 + ct x_t, variance).

    Bayes' rule in precision form: the prior N(x_{t-1}; a x_0, v) times the likelihood N(x_t; sqrt(1 - beta) x_{t-1}, beta).
    """
    out = [(1.0, 0.0, 0.0)]  # At t = 0, x_{t-1} is x_0 itself.
    for beta, a, v in zip(betas[1:], *forward_kernels(betas[:-1]), strict=True):
        slope = math.sqrt(1 - beta)
        precision = 1 / v + slope**2 / beta
        out.append((a / v / precision, slope / beta / precision, 1 / precision))
    return tuple(np.array(out).T)


def q_posterior(betas, x0, xt, t):
    c0, ct, variance = (coefficient[t] for coefficient in posterior_coefficients(betas))
    return c0 * x0 + ct * xt, variance


def p_variance(betas, t, variance):
    """Variance of p(x_{t-1} | x_t); none at t = 0."""
    if t == 0:
        return 0.0
    return betas[t] if variance == "fixed_large" else posterior_coefficients(betas)[2][t]


def p_sample(betas, x0, xt, t, variance, noise):
    """x_{t-1} from the predicted x0, with the noise given."""
    return q_posterior(betas, x0, xt, t)[0] + math.sqrt(p_variance(betas, t, variance)) * noise


# DDIM


def ddim_sigma(betas, t, eta):
    """Eq. 16 of Song et al. (2021)."""
    _, v = forward_kernels(betas)
    ab = alpha_bars(betas)
    ab_prev, v_prev = (ab[t - 1], v[t - 1]) if t else (1.0, 0.0)
    return eta * math.sqrt(v_prev / v[t]) * math.sqrt(1 - ab[t] / ab_prev)


def ddim_step(betas, x0, eps, t, eta, noise):
    """Eq. 12 of Song et al. (2021), x_{t-1} from the predicted x0 and eps."""
    ab_prev = alpha_bars(betas)[t - 1] if t else 1.0
    v_prev = forward_kernels(betas)[1][t - 1] if t else 0.0
    sigma = ddim_sigma(betas, t, eta)
    return math.sqrt(ab_prev) * x0 + math.sqrt(max(v_prev - sigma**2, 0.0)) * eps + sigma * noise


def ddim(betas, timesteps, x, denoise, eta=0.0, noises=None):
    """x_0 from x_T = x over ascending `timesteps`; denoise(x, t) -> (x0, eps)."""
    betas = visited_betas(betas, timesteps)
    for i in reversed(range(len(timesteps))):
        x0, eps = denoise(x, timesteps[i])
        x = ddim_step(betas, x0, eps, i, eta, 0.0 if noises is None else noises[i])
    return x


# Gaussian data N(m, s^2): the exact denoiser, and the exact law of what a sampler makes with it


def gaussian_x0(betas, m, s, xt, t):
    """E[x0 | xt], by the precision form of Bayes' rule."""
    a, v = (coefficient[t] for coefficient in forward_kernels(betas))
    return (m / s**2 + a * xt / v) / (1 / s**2 + a**2 / v)


def gaussian_chain(betas, m, s, timesteps, sampler, variance="fixed_large", eta=0.0):
    """Mean and variance of the sampler's x_0 from x_T ~ N(0, 1).

    With a linear denoiser every step is x <- offset + gain x + sqrt(variance) z; both are read off the step's values at
    x = 0 and x = 1.
    """
    short = visited_betas(betas, timesteps)
    a, v = forward_kernels(betas)

    def step(x, i):
        t = timesteps[i]
        x0 = gaussian_x0(betas, m, s, x, t)
        if sampler == "ddpm":
            return p_sample(short, x0, x, i, variance, 0.0)
        return ddim_step(short, x0, (x - a[t] * x0) / math.sqrt(v[t]), i, eta, 0.0)

    mean, var = np.zeros_like(m), np.ones_like(m)
    for i in reversed(range(len(timesteps))):
        offset = step(np.zeros_like(m), i)
        gain = step(np.ones_like(m), i) - offset
        noise = p_variance(short, i, variance) if sampler == "ddpm" else ddim_sigma(short, i, eta) ** 2
        mean, var = offset + gain * mean, gain**2 * var + noise
    return mean, var


# Training


def ema(initial: float, values: Sequence[float], decays: Sequence[float]) -> list[float]:
    """The moving average after each value: decay * average + (1 - decay) * value."""
    average, out = initial, []
    for value, decay in zip(values, decays, strict=True):
        average = decay * average + (1 - decay) * value
        out.append(average)
    return out


def log_mass(x0, mean, deviation):
    """Log of a Gaussian's mass on x0's grey level, from the tail in which it is a difference of small numbers."""
    lower, upper = (x0 - 1 / 255 - mean) / deviation, (x0 + 1 / 255 - mean) / deviation
    lower, upper = np.where(x0 < -0.999, -np.inf, lower), np.where(x0 > 0.999, np.inf, upper)
    swap = lower + upper > 0
    lower, upper = np.where(swap, -upper, lower), np.where(swap, -lower, upper)
    high, low = scipy.stats.norm.logcdf(upper), scipy.stats.norm.logcdf(lower)
    return high + np.log1p(-np.exp(low - high))


def vlb_term(betas, x0, guess, t, variance, place=None):
    """One image's term of the bound, bits per dimension, from the predicted x0 and the place of a learned log variance.

    At t = 0 the two fixed variances are the posterior's of t = 1, as in Ho et al.'s code.
    """
    x0, guess = x0.astype(np.float64), guess.astype(np.float64)
    c0, _, posterior = posterior_coefficients(betas)
    log_small = math.log(posterior[max(t, 1)])
    log_large = math.log(betas[t]) if t or variance == "learned_range" else log_small
    share = {"fixed_small": 0.0, "fixed_large": 1.0}[variance] if place is None else (place.astype(np.float64) + 1) / 2
    p_variance = np.broadcast_to(np.exp(share * log_large + (1 - share) * log_small), x0.shape)
    if t == 0:
        return -log_mass(x0, guess, np.sqrt(p_variance)).mean() / math.log(2)
    ratio = posterior[t] / p_variance
    kl = (ratio - 1 - np.log(ratio) + (c0[t] * (x0 - guess)) ** 2 / p_variance) / 2
    return kl.mean() / math.log(2)


# Timestep embedding


def sinusoidal_embedding(t, dim):
    """sin, then cos, of t * 10000^(-k / (dim // 2 - 1)); an odd dim ends in a zero."""
    half = dim // 2
    out = np.zeros((len(t), dim))
    for row, step in enumerate(t):
        for k in range(half):
            angle = step * 10000.0 ** (-k / (half - 1))
            out[row, k], out[row, half + k] = math.sin(angle), math.cos(angle)
    return out
