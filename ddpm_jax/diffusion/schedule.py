"""Noise schedules: every coefficient of the diffusion process, by timestep.

Steps are 0-based: t = 0 ... T-1, and x at t = 0 has been noised once.

    alpha_t     = 1 - beta_t                                                   (1)
    alpha_bar_t = alpha_0 alpha_1 ... alpha_t,   alpha_bar_{-1} = 1            (2)
    snr_t       = alpha_bar_t / (1 - alpha_bar_t)                              (3)

All of it follows from log alpha_bar alone: 1 - exp(log ab) = -expm1(log ab) loses no digits where alpha_bar is
close to 1, so the same few lines serve float64 (a new schedule) and float32 (a sub-sequence of one, inside jit).
"""

import inspect
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

ScheduleKind = Literal["linear", "cosine", "sigmoid", "scaled_linear"]
Spacing = Literal["uniform", "trailing", "quadratic", "logsnr", "karras"]

MAX_BETA = 0.999  # Nichol & Dhariwal (2021), section 3.2: keeps the last steps of the cosine schedule finite.
KARRAS_RHO = 7.0  # Karras et al. (2022), table 1.
LOG_TINY = math.log(1e-20)  # Ho et al.'s floor for the log of a variance that is exactly zero.


class Schedule(NamedTuple):
    """Coefficients of q and of its posterior, one float32 array of shape [T] each, indexed by t."""

    beta: Float[Array, " T"]
    """Variance added by the step t-1 -> t, in (0, 1); 1 at the last one of a zero terminal SNR."""
    alpha_bar: Float[Array, " T"]
    """Share of x0's variance left in xt, Eq. 4 of Ho et al. (2020)."""
    alpha_bar_prev: Float[Array, " T"]
    """alpha_bar one step earlier; 1 at t = 0."""
    log_alpha_bar: Float[Array, " T"]
    """log alpha_bar; keeps the digits that 1 - alpha_bar has lost in float32."""
    log_snr: Float[Array, " T"]
    """log(alpha_bar / (1 - alpha_bar)), falling in t."""
    sqrt_alpha_bar: Float[Array, " T"]
    """Coefficient of x0 in xt."""
    sqrt_one_minus_alpha_bar: Float[Array, " T"]
    """Coefficient of eps in xt."""
    sqrt_one_minus_alpha_bar_prev: Float[Array, " T"]
    """The same one step earlier; 0 at t = 0."""
    posterior_mean_x0: Float[Array, " T"]
    """Coefficient of x0 in the posterior mean, Eq. 7."""
    posterior_mean_xt: Float[Array, " T"]
    """Coefficient of xt in the posterior mean, Eq. 7."""
    posterior_variance: Float[Array, " T"]
    """Variance of q(x_{t-1} | xt, x0), Eq. 7; 0 at t = 0. The "fixed_small" choice of section 3.2."""
    posterior_log_variance: Float[Array, " T"]
    """Its logarithm; the entry at t = 0 repeats the one at t = 1, since log 0 has no use."""

    @property
    def num_steps(self) -> int:
        """T, the number of steps."""
        return self.beta.shape[0]


def make_schedule(kind: ScheduleKind = "linear", num_steps: int = 1000, **options: float) -> Schedule:
    """The named schedule with T = num_steps steps, computed in float64 and cast to float32 once.

    Args:
        kind: "linear" (Ho et al. 2020; options beta_start = 1e-4, beta_end = 0.02) and "scaled_linear" (linear in
            sqrt(beta), Rombach et al. 2022; same options): betas given for T = 1000, multiplied by 1000/T so that
            x_T is as noisy for every T. "cosine" (Nichol & Dhariwal 2021, Eq. 17; option s = 0.008). "sigmoid"
            (Jabri et al. 2022; options start = -3, end = 3, tau = 1).
        num_steps: T >= 1.
        **options: those of the kind, as above.

    Raises:
        ValueError: unknown kind or option, T < 1, or a beta outside (0, 1).
    """
    if not isinstance(num_steps, int | np.integer) or isinstance(num_steps, bool) or num_steps < 1:
        raise ValueError(f"a schedule needs a whole number of steps, 1 or more, not {num_steps!r}")
    builders: dict[str, Any] = {
        "linear": _linear_betas,
        "scaled_linear": _scaled_linear_betas,
        "cosine": _cosine_betas,
        "sigmoid": _sigmoid_betas,
    }
    if kind not in builders:
        raise ValueError(f"unknown schedule {kind!r}: choose one of {', '.join(get_args(ScheduleKind))}")
    builder = builders[kind]
    unknown = set(options) - set(inspect.signature(builder).parameters) - {"num_steps"}
    if unknown:
        raise ValueError(f"the {kind} schedule has no option {', '.join(sorted(unknown))}")
    return schedule_from_betas(builder(int(num_steps), **options))


def schedule_from_betas(betas: Any) -> Schedule:
    """The schedule of any betas [T] in (0, 1); all coefficients in float64, cast to float32 once.

    Raises:
        ValueError: betas not one-dimensional, empty, or outside (0, 1).
    """
    beta = np.asarray(betas, np.float64)
    if beta.ndim != 1 or beta.size == 0:
        raise ValueError(f"betas must be a non-empty list of numbers, not an array of shape {beta.shape}")
    outside = ~((beta > 0) & (beta < 1))
    if outside.any():
        t = int(np.argmax(outside))
        raise ValueError(f"beta[{t}] = {beta[t]:g} lies outside (0, 1): use more steps or smaller betas")
    return _cast(_coefficients(np.cumsum(np.log1p(-beta)), np))


def rescale_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule with sqrt(alpha_bar) shifted and scaled to end at 0 and start as before: x_T is nothing but noise.

    Algorithm 1 of Lin et al. (2023), arXiv:2305.08891; in float64, cast to float32 once, and so not within a jit. At the
    last step alpha_bar = 0 and beta = 1 exactly, log_alpha_bar and log_snr are -inf and all else is finite. There a
    network can't predict eps, which is xt itself and tells nothing of x0.

    Raises:
        ValueError: a schedule of one step, which has no other to keep.
    """
    if schedule.num_steps < 2:
        raise ValueError("a zero terminal SNR needs a schedule of 2 steps or more")
    # From beta: the differences of log_alpha_bar, which the new betas are made of, have lost digits in float32.
    root = np.exp(np.cumsum(np.log1p(-np.asarray(schedule.beta, np.float64))) / 2)
    rescaled = (root[:-1] - root[-1]) * root[0] / (root[0] - root[-1])
    return _cast(_coefficients(np.append(2 * np.log(rescaled), -np.inf), np))


def respace(schedule: Schedule, timesteps: Int[Array, " K"]) -> Schedule:
    """The schedule of the K-step process that visits only `timesteps` (ascending) of the original one.

    Its marginals at the visited steps are the original's (Nichol & Dhariwal 2021, section 4):
    beta'_i = 1 - alpha_bar[t_i] / alpha_bar[t_{i-1}].
    """
    return Schedule(**_coefficients(schedule.log_alpha_bar[timesteps], jnp))


def spaced_timesteps(
    num_steps: int, total_steps: int, spacing: Spacing = "uniform", log_snr: Float[Any, " T"] | None = None
) -> np.ndarray:
    """K = num_steps ascending, distinct timesteps out of T = total_steps, the last of which is T-1. int32 [K].

    Args:
        num_steps: K, from 1 to T.
        total_steps: T.
        spacing: "uniform": equal steps that include both 0 and T-1. "trailing": equal steps counted down from T-1
            (Lin et al. 2023, table 2). "quadratic": dense at low noise (Song et al. 2021, appendix D.2). "logsnr": equal
            steps of the log signal-to-noise ratio (Lu et al. 2022); "karras": of sigma^(1/7) (Karras et al. 2022, Eq. 5);
            both as nearly as whole timesteps allow.
        log_snr: the schedule's, for "logsnr" and "karras". Its numbers are read, so that a schedule that is an argument of
            a compiled function won't do.

    Raises:
        ValueError: K outside 1 ... T, an unknown spacing, or one that needs the numbers of log_snr without them.
    """
    if not 1 <= num_steps <= total_steps:
        raise ValueError(f"cannot take {num_steps} sampling steps of a {total_steps}-step process: choose 1 to {total_steps}")
    last = total_steps - 1
    if spacing == "uniform":
        steps = np.linspace(0 if num_steps > 1 else last, last, num_steps)
    elif spacing == "trailing":
        steps = np.round(np.arange(total_steps, 0, -total_steps / num_steps)[:num_steps][::-1]) - 1
    elif spacing == "quadratic":
        steps = np.linspace(math.sqrt(last), 0, num_steps)[::-1] ** 2
    elif spacing not in get_args(Spacing):
        raise ValueError(f"unknown spacing {spacing!r}: choose one of {', '.join(get_args(Spacing))}")
    elif log_snr is None or isinstance(log_snr, jax.core.Tracer):
        raise ValueError(
            f"spacing {spacing} needs the numbers of the schedule's log_snr: don't make the schedule an argument of jit"
        )
    else:
        steps = _spaced_by_noise(num_steps, np.asarray(log_snr, np.float64), KARRAS_RHO if spacing == "karras" else None)
    position = np.arange(num_steps)
    # Rounding can make neighbours equal where steps are dense; each is then moved to the next free one, up, or down at the end.
    distinct = np.maximum.accumulate(np.round(steps).astype(np.int32) - position) + position
    return np.minimum(distinct, position + total_steps - num_steps).astype(np.int32)


def _spaced_by_noise(num_steps: int, log_snr: Float64[np.ndarray, " T"], rho: float | None) -> Float64[np.ndarray, " K"]:
    """Timesteps at equal distances of log SNR, or of sigma^(1 / rho), not yet rounded; the last is T-1."""
    finite = log_snr[np.isfinite(log_snr)]  # all of them, or all but the last
    count = num_steps - (finite.size < log_snr.size)
    level = -finite / 2 if rho is None else np.exp(-finite / 2 / rho)  # rises with t
    steps = np.interp(np.linspace(level[-1], level[0], count)[::-1], level, np.arange(finite.size)) if count else np.zeros(0)
    return np.append(steps, np.full(num_steps - count, log_snr.size - 1.0))


def _coefficients(log_alpha_bar: Any, xp: Any) -> dict[str, Any]:
    """Every field of Schedule from log alpha_bar [T], with NumPy in float64 or jax.numpy in float32."""
    log_prev = xp.concatenate([xp.zeros_like(log_alpha_bar[:1]), log_alpha_bar[:-1]])
    log_alpha = log_alpha_bar - log_prev
    beta = -xp.expm1(log_alpha)
    one_minus, one_minus_prev = 0.0 - xp.expm1(log_alpha_bar), 0.0 - xp.expm1(log_prev)
    posterior_variance = beta * one_minus_prev / one_minus
    if log_alpha_bar.shape[0] > 1:
        log_variance = xp.log(xp.concatenate([posterior_variance[1:2], posterior_variance[1:]]))
    else:
        log_variance = xp.full_like(log_alpha_bar, LOG_TINY)
    return {
        "beta": beta,
        "alpha_bar": xp.exp(log_alpha_bar),
        "alpha_bar_prev": xp.exp(log_prev),
        "log_alpha_bar": log_alpha_bar,
        "log_snr": log_alpha_bar - xp.log(one_minus),
        "sqrt_alpha_bar": xp.exp(log_alpha_bar / 2),
        "sqrt_one_minus_alpha_bar": xp.sqrt(one_minus),
        "sqrt_one_minus_alpha_bar_prev": xp.sqrt(one_minus_prev),
        "posterior_mean_x0": xp.exp(log_prev / 2) * beta / one_minus,
        "posterior_mean_xt": xp.exp(log_alpha / 2) * one_minus_prev / one_minus,
        "posterior_variance": posterior_variance,
        "posterior_log_variance": log_variance,
    }


def _cast(coefficients: dict[str, Float64[np.ndarray, " T"]]) -> Schedule:
    return Schedule(**{name: jnp.asarray(value, jnp.float32) for name, value in coefficients.items()})


def _linear_betas(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float64[np.ndarray, " T"]:
    scale = 1000 / num_steps
    return np.linspace(scale * beta_start, scale * beta_end, num_steps, dtype=np.float64)


def _scaled_linear_betas(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float64[np.ndarray, " T"]:
    if beta_start <= 0 or beta_end <= 0:
        raise ValueError(f"beta_start = {beta_start:g} and beta_end = {beta_end:g} must be greater than 0")
    scale = 1000 / num_steps
    return np.linspace(math.sqrt(scale * beta_start), math.sqrt(scale * beta_end), num_steps, dtype=np.float64) ** 2


def _cosine_betas(num_steps: int, s: float = 0.008) -> Float64[np.ndarray, " T"]:
    u = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    return _betas_from_alpha_bar(np.cos((u + s) / (1 + s) * np.pi / 2) ** 2)


def _sigmoid_betas(num_steps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Float64[np.ndarray, " T"]:
    u = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    falling = 1 / (1 + np.exp((u * (end - start) + start) / tau))
    return _betas_from_alpha_bar((falling - falling[-1]) / (falling[0] - falling[-1]))


def _betas_from_alpha_bar(alpha_bar: Float64[np.ndarray, " T1"]) -> Float64[np.ndarray, " T"]:
    """beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, at most MAX_BETA, from T+1 values that start at u = 0."""
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)
