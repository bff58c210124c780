"""Data whose exact denoiser is known: a mixture of Gaussians in the plane, in float64, and its probability-flow map.

Data are sum_k weight_k N(mean_k, std_k^2 I). With xt = a x0 + s eps component k of xt is N(a mean_k, (a^2 std_k^2 + s^2) I),
Bayes' rule gives the share of each component at xt, and within one E[x0 | xt] is linear. The probability-flow map is
scipy's solution of d(x/a)/dsigma = eps, Eq. 1 of Karras et al. (2022) for s(t) = 1, with eps = (xt - a E[x0 | xt]) / s.
"""

import math

import numpy as np
import scipy.integrate

WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[-0.6, -0.3], [0.5, 0.6], [0.4, -0.7]])
STDS = np.array([0.15, 0.25, 0.1])


def denoise(xp, x, a, s):
    """E[x0 | xt = x], x [..., 2], a and s numbers or [..., 1]; xp is numpy or jax.numpy."""
    means, stds, weights = (xp.asarray(value, x.dtype) for value in (MEANS, STDS, WEIGHTS))
    a, s = (xp.broadcast_to(xp.asarray(value, x.dtype), (*x.shape[:-1], 1)) for value in (a, s))
    variance = a**2 * stds.reshape((1,) * (x.ndim - 1) + (3,)) ** 2 + s**2  # [..., 3]
    away = xp.expand_dims(x, -2) - xp.expand_dims(a, -1) * means.reshape((1,) * (x.ndim - 1) + (3, 2))  # [..., 3, 2]
    logit = xp.log(weights).reshape((1,) * (x.ndim - 1) + (3,)) - xp.sum(away**2, -1) / 2 / variance - xp.log(variance)
    share = xp.exp(logit - xp.max(logit, axis=-1, keepdims=True))
    share = share / xp.sum(share, axis=-1, keepdims=True)
    gain = a * stds.reshape((1,) * (x.ndim - 1) + (3,)) ** 2 / variance
    inside = means.reshape((1,) * (x.ndim - 1) + (3, 2)) + xp.expand_dims(gain, -1) * away
    return xp.sum(xp.expand_dims(share, -1) * inside, axis=-2)


def draw(rng, count):
    """Data [count, 2]."""
    component = rng.choice(3, count, p=WEIGHTS)
    return MEANS[component] + STDS[component, None] * rng.standard_normal((count, 2))


def moments():
    """Mean [2] and covariance [2, 2] of the data."""
    mean = WEIGHTS @ MEANS
    away = MEANS - mean
    return mean, np.diag(np.full(2, WEIGHTS @ STDS**2)) + (WEIGHTS[:, None] * away).T @ away


def flow(x, a, s, end_a=1.0, end_s=1e-9):
    """Where the probability flow takes x [N, 2] from the noise of (a, s) to that of (end_a, end_s); by log sigma."""

    def slope(log_sigma, state):
        sigma = math.exp(log_sigma)
        point_a = 1 / math.sqrt(1 + sigma**2)
        scaled = state.reshape(-1, 2)
        return np.ravel(scaled - denoise(np, point_a * scaled, point_a, point_a * sigma))

    interval = (math.log(s / a), math.log(end_s / end_a))
    solution = scipy.integrate.solve_ivp(slope, interval, np.ravel(x / a), "DOP853", rtol=1e-10, atol=1e-12)
    return end_a * solution.y[:, -1].reshape(-1, 2)
