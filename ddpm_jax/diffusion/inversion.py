"""From an image back to the noise that DDIM without randomness makes it of.

With a = cos(phi), s = sin(phi) and v = a eps - s x0, a step of DDIM with eta = 0 is a rotation by d = phi_t - phi_{t-1}
(Salimans & Ho 2022, arXiv:2202.00512, appendix D), which is solved for the unknown x_t by fixed-point iteration:

    x_{t-1} = cos(d) x_t - sin(d) v(x_t)      so      x_t = (x_{t-1} + sin(d) v(x_t)) / cos(d)              (1)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.process import Denoiser, at
from ddpm_jax.diffusion.samplers import visit
from ddpm_jax.diffusion.schedule import Schedule, Spacing, spaced_timesteps


def invert(
    schedule: Schedule,
    denoiser: Denoiser,
    x0: Float[Array, "B *image"],
    num_steps: int | None = None,
    spacing: Spacing = "uniform",
    iterations: int = 4,
) -> Float[Array, "B *image"]:
    """The x_T that `sample(..., "ddim", num_steps, spacing=spacing, x_init=x_T)` makes x0 of: Eq. 1 above, step by step.

    Differs from Song et al. (2021), arXiv:2010.02502, section 5.4, who take the network's output at x_{t-1}, so that
    there and back again is as inexact as the steps are long. One iteration is about theirs; each more costs one
    evaluation for each step, and leaves a fraction of the error that falls with the length of the steps.

    An image that the denoiser changes even at the lowest noise, as a real photograph under a weak network, has no such
    x_T: what the network can't draw is taken for noise, x_T is larger than noise is, and comes back without it.

    Args:
        schedule: the one that the denoiser was made with; T steps.
        denoiser: see make_denoiser.
        x0: images in [-1, 1].
        num_steps: steps, 1 ... T, each of `iterations` denoiser calls; None means T.
        spacing: which timesteps are visited when num_steps < T; see spaced_timesteps.
        iterations: fixed-point iterations of each step, 1 or more.

    Returns:
        float32 x_T of the shape of x0.

    Raises:
        ValueError: an unknown spacing, steps outside 1 ... T, or no iterations.
    """
    if iterations < 1:
        raise ValueError(f"iterations = {iterations}: must be 1 or more")
    num_steps = schedule.num_steps if num_steps is None else num_steps
    timesteps = spaced_timesteps(num_steps, schedule.num_steps, spacing, schedule.log_snr)

    def run(schedule: Schedule, x0: Float[Array, "B *image"]) -> Float[Array, "B *image"]:
        short, denoise = visit(schedule, denoiser, timesteps)
        a, s = short.sqrt_alpha_bar, short.sqrt_one_minus_alpha_bar
        a_prev, s_prev = jnp.sqrt(short.alpha_bar_prev), short.sqrt_one_minus_alpha_bar_prev
        cos, sin = a * a_prev + s * s_prev, s * a_prev - a * s_prev

        def step(carry: tuple[Array, Array], index: Int[Array, ""]) -> tuple[tuple[Array, Array], None]:
            (x, v), t = carry, jnp.full(x0.shape[:1], index, jnp.int32)

            def xt(v: Float[Array, "B *image"]) -> Float[Array, "B *image"]:
                return (x + at(sin, t, x) * v) / at(cos, t, x)

            def iterate(_: Array, v: Float[Array, "B *image"]) -> Float[Array, "B *image"]:
                seen = denoise(xt(v), t)
                return at(a, t, x) * seen.eps - at(s, t, x) * seen.x0

            v = jax.lax.fori_loop(0, iterations, iterate, v)
            return (xt(v), v), None

        # The first guess of v is that of the step before; 0 at the image itself, which is all but free of noise.
        (x, _), _ = jax.lax.scan(step, (x0, jnp.zeros_like(x0)), jnp.arange(len(timesteps), dtype=jnp.int32))
        return x

    return jax.jit(run)(schedule, x0)
