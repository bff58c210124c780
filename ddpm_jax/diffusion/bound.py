"""The terms of the variational bound on -log p(x0), Eq. 5 of Ho et al. (2020), in bits per dimension.

    L_{t-1} = KL(q(x_{t-1} | xt, x0) || p(x_{t-1} | xt))      0-based: the term of timestep t = 1 ... T-1
    L_0     = -log p(x0 | x_1),  a discretised Gaussian       0-based: the term of timestep t = 0

The prior's L_T has no parameters. The sum over t of `vlb_terms` and L_T is the bound.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.process import Denoiser, Variance, at, p_log_variance_of
from ddpm_jax.diffusion.schedule import Schedule

HALF_BIN = 1.0 / 255.0  # Half the distance of two grey levels in [-1, 1].


def gaussian_kl(
    mean: Float[Array, "..."],
    log_variance: Float[Array, "..."],
    other_mean: Float[Array, "..."],
    other_log_variance: Float[Array, "..."],
) -> Float[Array, "..."]:
    """KL(N(mean, variance) || N(other_mean, other_variance)) of each element, in nats.

    (r - 1 - log r + (mean - other_mean)^2 / other_variance) / 2,  r = variance / other_variance. The four arrays broadcast.
    """
    log_ratio = log_variance - other_log_variance
    # expm1 keeps the digits where the two variances are almost the same, as they are at most timesteps.
    return 0.5 * (jnp.expm1(log_ratio) - log_ratio + jnp.square(mean - other_mean) * jnp.exp(-other_log_variance))


def discretized_gaussian_log_likelihood(
    x0: Float[Array, "*shape"], mean: Float[Array, "*shape"], log_variance: Float[Array, "..."]
) -> Float[Array, "*shape"]:
    """Log of the mass of N(mean, variance) on x0's bin, Eq. 13 of Ho et al. (2020), in nats.

    Args:
        x0: images of 256 grey levels, -1, -1 + 2/255, ..., 1; the bins are 2/255 wide, the first and the last open.
        mean: of the Gaussian; any number.
        log_variance: broadcasts against x0.
    """
    scale = jnp.exp(-0.5 * log_variance)
    # Both edges on the lower tail, by symmetry: there log Phi has all its digits, and so has the difference of two.
    distance = jnp.abs(x0 - mean)
    near, far = (jax.scipy.special.log_ndtr(scale * (side - distance)) for side in (HALF_BIN, -HALF_BIN))
    inside = near + jnp.log(-jnp.expm1(far - near))
    outermost = jax.scipy.special.log_ndtr(scale * (HALF_BIN + jnp.sign(x0) * (mean - x0)))
    return jnp.where(jnp.abs(x0) > 1.0 - HALF_BIN, outermost, inside)


def vlb_terms(
    schedule: Schedule,
    denoiser: Denoiser,
    x0: Float[Array, "B *image"],
    xt: Float[Array, "B *image"],
    t: Int[Array, " B"],
    variance: Variance,
) -> Float[Array, " B"]:
    """The bound's term of timestep t for each image, in bits per dimension: L_{t-1}, or L_0 where t = 0.

    Args:
        schedule: T steps.
        denoiser: see make_denoiser; whether it clips is its affair.
        x0: clean images of 256 grey levels in [-1, 1].
        xt: the same, noised; draws of q(xt | x0).
        t: timesteps 0 ... T-1.
        variance: of p(x_{t-1} | xt), see p_sample; that of L_0 is its entry at t = 0.

    Raises:
        ValueError: "learned_range" with a denoiser that tells no variance, or an unknown name.
    """
    denoised = denoiser(xt, t)
    log_variance = p_log_variance_of(schedule, denoised, t, variance)
    # Both means hold the same share of xt, which cancels; left out, it takes no digits of their difference with it. At
    # t = 0 there is none, and the share of x0 is 1.
    share = at(schedule.posterior_mean_x0, t, x0)
    kl = gaussian_kl(share * x0, at(schedule.posterior_log_variance, t, x0), share * denoised.x0, log_variance)
    first = (t == 0).reshape(t.shape + (1,) * (x0.ndim - t.ndim))
    # Elsewhere the decoder sees a perfect x0: what it can't compute must not enter the gradient as 0 times infinity.
    decoder = -discretized_gaussian_log_likelihood(x0, jnp.where(first, denoised.x0, x0), log_variance)
    return jnp.mean(jnp.where(first, decoder, kl), axis=tuple(range(1, x0.ndim))) / math.log(2.0)
