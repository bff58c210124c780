"""The steps of the samplers that look at one step only: one pure function for each algorithm; see also `multistep.py`.

A step goes from time t to time t-1 of its schedule; the last one ends at the image itself, where alpha_bar_prev = 1. With
xt = a x0 + s eps, a^2 + s^2 = 1,

    sigma = s / a,   lambda = log(a / s) = log_snr / 2

are the noise of the variance-exploding process xt / a and half the log signal-to-noise ratio.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.process import AnyKey, Denoiser, at, normal, q_sample_prev
from ddpm_jax.diffusion.schedule import Schedule

MAX_RATIO = math.e**2  # of sigma at the start of a step to sigma at its end, for Heun's method


def ddim_step(
    key: AnyKey,
    schedule: Schedule,
    denoiser: Denoiser,
    xt: Float[Array, "*shape"],
    t: Int[Array, "*batch"],
    eta: float = 0.0,
) -> Float[Array, "*shape"]:
    """x_{t-1} of DDIM, Eq. 12 of Song et al. (2021); eta = 0 is deterministic, eta = 1 has DDPM's posterior variance."""
    x0, eps, _ = denoiser(xt, t)
    # s^2 = eta^2 posterior_variance = eta^2 (1 - ab_prev) beta / (1 - ab), so 1 - ab_prev factors out of the root.
    share = eta**2 * schedule.beta / jnp.square(schedule.sqrt_one_minus_alpha_bar)
    toward_xt = schedule.sqrt_one_minus_alpha_bar_prev * jnp.sqrt(jnp.maximum(1.0 - share, 0.0))
    mean = at(jnp.sqrt(schedule.alpha_bar_prev), t, xt) * x0 + at(toward_xt, t, xt) * eps
    if eta == 0:
        return mean
    return mean + eta * at(jnp.sqrt(schedule.posterior_variance), t, xt) * normal(key, xt.shape)


def euler_step(
    key: AnyKey, schedule: Schedule, denoiser: Denoiser, xt: Float[Array, "*shape"], t: Int[Array, "*batch"]
) -> Float[Array, "*shape"]:
    """Euler's step of the probability-flow ODE d(x/a)/dsigma = eps, Eq. 1 of Karras et al. (2022), arXiv:2206.00364.

    x_{t-1} / a' = xt / a + (sigma' - sigma) eps. With xt = a x0 + s eps this is a' x0 + s' eps, which is DDIM with eta = 0,
    and defined for a = 0, where sigma is infinite, too.
    """
    x0, eps, _ = denoiser(xt, t)
    return q_sample_prev(schedule, x0, t, eps)


def heun_step(
    key: AnyKey, schedule: Schedule, denoiser: Denoiser, xt: Float[Array, "*shape"], t: Int[Array, "*batch"]
) -> Float[Array, "*shape"]:
    """Heun's step of the probability-flow ODE, algorithm 1 of Karras et al. (2022), arXiv:2206.00364: eps at both ends.

    x_{t-1} / a' = xt / a + (sigma' - sigma) (eps(xt) + eps(Euler's x_{t-1})) / 2. The step to the image, where sigma' = 0,
    is Euler's. Differs from the paper: so are those in which sigma falls to less than 1 / MAX_RATIO of what it was, where
    the second eps would be given exp(h) / 2 times its weight; their noise levels hold no such step before the last.
    """
    x0, eps, _ = denoiser(xt, t)
    a, s = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar
    a_end, s_end = jnp.sqrt(schedule.alpha_bar_prev), schedule.sqrt_one_minus_alpha_bar_prev
    end = q_sample_prev(schedule, x0, t, eps)
    after = denoiser(end, jnp.maximum(t - 1, 0)).eps
    gain = jnp.where(s * a_end <= MAX_RATIO * s_end * a, (s_end - a_end * s / a) / 2.0, 0.0)
    return end + at(gain, t, xt) * (after - eps)
