"""The steps of the samplers: one pure function for each algorithm.

A step goes from time t to time t-1 of its schedule; the last one ends at the image itself, where alpha_bar_prev = 1. With
xt = a x0 + s eps, a^2 + s^2 = 1,

    sigma = s / a,   lambda = log(a / s) = log_snr / 2

are the noise of the variance-exploding process xt / a and half the log signal-to-noise ratio.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.process import AnyKey, Denoiser, at, normal
from ddpm_jax.diffusion.schedule import Schedule


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
