"""Multistep samplers: what the denoiser saw at earlier steps bends the step, at one evaluation each.

In lambda = log(a / s), which grows by h in the step t -> t-1, the probability-flow ODE is solved exactly for any x0(lambda),
with a', s' at the end of the step (Lu et al. 2022, arXiv:2211.01095, proposition 4.1):

    x_{t-1} = s'/s xt + a' int_0^h exp(u - h) x0(lambda_t + u) du                              (1)
            = a' x0 + s' eps                      where x0 is constant, the first order: DDIM
              + a' (1 - exp(-h)) / 2 h/h1 (x0 - x0_last)                    the second order, h1 the step before
              + ...                               where x0 is the parabola through three of them, the third

Every method starts with lower orders, since there is nothing to look back at, and ends at the image, where h is infinite,
with x0 itself. Differs from the papers: where a step is longer than the one before, as the last ones are if timesteps are
spaced evenly, the straight line is not drawn out further than h1 goes back (h/h1 <= 1), and the parabola is left out. The
orders of convergence are the same, and few steps don't overshoot.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ddpm_jax.diffusion.process import AnyKey, Denoiser, at, normal, q_sample_prev
from ddpm_jax.diffusion.schedule import Schedule

MAX_GROWTH = 1.1  # of the step length, above which there is no third order; rounded timesteps stay below it in fine schedules

Memory = tuple[Float[Array, "*shape"], ...]


def dpmpp_2m_step(
    key: AnyKey, schedule: Schedule, denoiser: Denoiser, xt: Float[Array, "*shape"], t: Int[Array, "*batch"], memory: Memory
) -> tuple[Float[Array, "*shape"], Memory]:
    """DPM-Solver++(2M), algorithm 2 of Lu et al. (2022), arXiv:2211.01095; memory: x0 of the last step."""
    x0, eps, _ = denoiser(xt, t)
    mean = q_sample_prev(schedule, x0, t, eps)
    return mean + at(_line(schedule), t, xt) * (x0 - memory[0]), (x0,)


def dpmpp_3m_step(
    key: AnyKey, schedule: Schedule, denoiser: Denoiser, xt: Float[Array, "*shape"], t: Int[Array, "*batch"], memory: Memory
) -> tuple[Float[Array, "*shape"], Memory]:
    """DPM-Solver++(3M) of Lu et al. (2022), arXiv:2211.01095, Eq. 1 for the parabola through three x0; memory: the last two."""
    x0, eps, _ = denoiser(xt, t)
    last, older = memory
    a_end = jnp.sqrt(schedule.alpha_bar_prev)
    third, h, h1, h2 = _parabola(*step_lengths(schedule))
    # x0(u) = x0 + d1 u + d2 u (u + h1), d1 = (x0 - last) / h1, d2 = (d1 - (last - older) / h2) / (h1 + h2).
    linear, square = _integrals(h)
    bend = (square + h1 * linear) / (h1 + h2)
    newer_gain = jnp.where(third, a_end * (linear + bend) / h1, _line(schedule))
    older_gain = jnp.where(third, -a_end * bend / h2, 0.0)
    mean = q_sample_prev(schedule, x0, t, eps)
    return mean + at(newer_gain, t, xt) * (x0 - last) + at(older_gain, t, xt) * (last - older), (x0, last)


def dpmpp_2m_sde_step(
    key: AnyKey, schedule: Schedule, denoiser: Denoiser, xt: Float[Array, "*shape"], t: Int[Array, "*batch"], memory: Memory
) -> tuple[Float[Array, "*shape"], Memory]:
    """SDE-DPM-Solver++(2M) of Lu et al. (2022), arXiv:2211.01095, for the SDE of DDPM; memory: x0 of the last step.

    x_{t-1} = s'/s e^-h xt + a' (1 - e^-2h) (x0 + (x0 - x0_last) h/2h1) + s' sqrt(1 - e^-2h) z, with xt = a x0 + s eps.
    """
    x0, eps, _ = denoiser(xt, t)
    h, _, _ = step_lengths(schedule)
    s_end = schedule.sqrt_one_minus_alpha_bar_prev
    mean = at(jnp.sqrt(schedule.alpha_bar_prev), t, xt) * x0 + at(s_end * jnp.exp(-h), t, xt) * eps
    line = at(_line(schedule) * (1.0 + jnp.exp(-h)), t, xt)  # (1 - e^-2h) = (1 - e^-h) (1 + e^-h)
    noise = at(s_end * jnp.sqrt(-jnp.expm1(-2.0 * h)), t, xt) * normal(key, xt.shape)
    return mean + line * (x0 - memory[0]) + noise, (x0,)


def unipc_step(
    key: AnyKey, schedule: Schedule, denoiser: Denoiser, xt: Float[Array, "*shape"], t: Int[Array, "*batch"], memory: Memory
) -> tuple[Float[Array, "*shape"], Memory]:
    """UniPC-2 (bh2), order 3: UniC-2 and UniP-2 of Zhao et al. (2023), arXiv:2302.04867.

    What the denoiser sees at xt first corrects xt, by the step that led to it once more, now with x0 known at its end; then
    it predicts x_{t-1} as DPM-Solver++(2M) does. Memory: the corrected x_{t+1}, and x0 of the last two steps.
    """
    x0, _, _ = denoiser(xt, t)
    before, last, older = memory
    a, s = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar
    _, h1, h2 = step_lengths(schedule)
    third, h, h_older, _ = _parabola(h1, h2, jnp.zeros_like(h2))
    # From t+1 on: x0(u) = last + d1 u + d2 u (u - h), d1 = (x0 - last) / h, d2 = (d1 - slope before) / (h + h_older).
    linear, square = _integrals(h)
    bend = (square - h * linear) / (h + h_older)
    newer_gain = jnp.where(third, a * (linear + bend) / h, -0.5 * a * jnp.expm1(-h1))
    older_gain = jnp.where(third, -a * bend / h_older, 0.0)
    s_before, a_before = jnp.append(s[1:], s[-1]), jnp.append(a[1:], a[-1])
    corrected = at(s / s_before, t, xt) * before + at(a - a_before * s / s_before, t, xt) * last
    corrected = corrected + at(newer_gain, t, xt) * (x0 - last) + at(older_gain, t, xt) * (last - older)
    corrected = jnp.where(jnp.isfinite(at(h1, t, xt)), corrected, xt)

    a_end, s_end = jnp.sqrt(schedule.alpha_bar_prev), schedule.sqrt_one_minus_alpha_bar_prev
    predicted = at(s_end / s, t, xt) * corrected + at(a_end - a * s_end / s, t, xt) * x0
    return predicted + at(_line(schedule), t, xt) * (x0 - last), (corrected, x0, last)


def step_lengths(schedule: Schedule) -> tuple[Float[Array, " T"], Float[Array, " T"], Float[Array, " T"]]:
    """h of every step t -> t-1 in lambda, and those of the step before and of the one before that.

    Infinite where a step ends at the image or starts from noise alone, and where there is no step before.
    """
    half = schedule.log_snr / 2.0
    infinite = jnp.full((1,), jnp.inf, half.dtype)
    h = jnp.concatenate([infinite, half[:-1]]) - half
    h1 = jnp.concatenate([h[1:], infinite])
    return h, h1, jnp.concatenate([h1[1:], infinite])


def _line(schedule: Schedule) -> Float[Array, " T"]:
    """Coefficient of (x0 - x0_last) in the second order of Eq. 1."""
    h, h1, _ = step_lengths(schedule)
    ratio = jnp.where(jnp.isfinite(h), jnp.minimum(h / h1, 1.0), 0.0)
    return -0.5 * jnp.sqrt(schedule.alpha_bar_prev) * jnp.expm1(-h) * ratio


def _parabola(
    h: Float[Array, " T"], h1: Float[Array, " T"], h2: Float[Array, " T"]
) -> tuple[Bool[Array, " T"], Float[Array, " T"], Float[Array, " T"], Float[Array, " T"]]:
    """Whether a step of length h, after those of h1 and h2, is of third order; the lengths, 1 where it is not."""
    third = jnp.isfinite(h) & jnp.isfinite(h1) & jnp.isfinite(h2) & (h <= MAX_GROWTH * h1)
    one = jnp.ones_like(h)
    return third, jnp.where(third, h, one), jnp.where(third, h1, one), jnp.where(third, h2, one)


def _integrals(h: Float[Array, " T"]) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """Integrals over u = 0 ... h of exp(u - h) u and of exp(u - h) u^2."""
    linear = h + jnp.expm1(-h)
    return linear, jnp.square(h) - 2.0 * linear
