"""Samplers: from noise x_T to images x_0, each step a pure function of (key, schedule, denoiser, xt, t).

    ddpm:  x_{t-1} ~ p(x_{t-1} | xt)                                   Algorithm 2 of Ho et al. (2020)
    ddim:  x_{t-1} = sqrt(ab_prev) x0 + sqrt(1 - ab_prev - s^2) eps + s z,
           s^2 = eta^2 posterior_variance                              Eqs. 12 and 16 of Song et al. (2021), arXiv:2010.02502

A sampler with fewer steps than T walks a sub-sequence of the timesteps: `respace` gives that shorter process a schedule
of its own, so that a step knows nothing of the spacing.
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.process import AnyKey, Denoised, Denoiser, Variance, as_keys, at, normal, p_log_variance, p_sample
from ddpm_jax.diffusion.schedule import Schedule, Spacing, respace, spaced_timesteps

Sampler = Literal["ddpm", "ddim"]
Step = Callable[[AnyKey, Schedule, Denoiser, Float[Array, "*shape"], Int[Array, "*batch"]], Float[Array, "*shape"]]


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


def sample(
    key: AnyKey,
    schedule: Schedule,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    sampler: Sampler = "ddpm",
    num_steps: int | None = None,
    eta: float = 0.0,
    spacing: Spacing = "uniform",
    x_init: Float[Array, "*shape"] | None = None,
    trajectory: bool | int = False,
    variance: Variance = "fixed_large",
) -> Float[Array, "..."]:
    """Draw images from the reverse process, as one compiled `lax.scan` over the steps.

    Each call compiles its program anew. To draw several times with one program, put the call into a `jax.jit` of your
    own, as a function of the key and of the network's weights.

    Args:
        key: one key, or one for each image [B]: image i then depends on key i alone, not on its batch.
        schedule: the one that the denoiser was made with; T steps.
        denoiser: see make_denoiser.
        shape: (B, H, W, C).
        sampler: "ddpm" (ancestral) or "ddim".
        num_steps: denoiser calls, 1 ... T; None means T.
        eta: noise of ddim, 0 (none) to 1 (as much as the posterior's).
        spacing: which timesteps are visited when num_steps < T; see spaced_timesteps.
        x_init: start from this x_T [B, H, W, C] instead of from noise.
        trajectory: True returns x at every step, x_T first; a number n >= 2 returns n of these, evenly spaced, or all
            where there are fewer.
        variance: of ddpm's steps, "fixed_large" or "fixed_small".

    Returns:
        float32 images of the given shape, in [-1, 1] if the denoiser clips; with a trajectory [n, B, H, W, C].

    Raises:
        ValueError: an unknown name, steps outside 1 ... T, eta outside [0, 1], or fewer than 2 frames.
    """
    if sampler not in get_args(Sampler):
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(get_args(Sampler))}")
    p_log_variance(schedule, variance)  # an unknown name is an error with every sampler
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], not {eta}")
    if x_init is not None and x_init.shape != tuple(shape):
        raise ValueError(f"x_init has shape {x_init.shape}, not {tuple(shape)}")
    num_steps = schedule.num_steps if num_steps is None else num_steps
    timesteps = spaced_timesteps(num_steps, schedule.num_steps, spacing)
    num_frames = num_steps + 1 if trajectory is True else min(int(trajectory), num_steps + 1)
    if num_frames < 0 or num_frames == 1:
        raise ValueError(f"a trajectory has at least 2 frames, not {int(trajectory)}")
    step = functools.partial(ddim_step, eta=eta) if sampler == "ddim" else functools.partial(p_sample, variance=variance)

    def run(key: AnyKey, schedule: Schedule, x_init: Float[Array, "*shape"] | None) -> Float[Array, "..."]:
        return _reverse(key, schedule, denoiser, step, timesteps, shape, x_init, num_frames)

    return jax.jit(run)(as_keys(key), schedule, x_init)


def _reverse(
    key: AnyKey,
    schedule: Schedule,
    denoiser: Denoiser,
    step: Step,
    timesteps: np.ndarray,
    shape: tuple[int, ...],
    x_init: Float[Array, "*shape"] | None,
    num_frames: int,
) -> Float[Array, "..."]:
    """The loop over ascending `timesteps` [K] from the last to the first; num_frames = 0 keeps x_0 only."""
    num_steps, total_steps = len(timesteps), schedule.num_steps
    if num_steps < total_steps:
        schedule = respace(schedule, jnp.asarray(timesteps))
    visited = jnp.asarray(timesteps)

    def denoise(x: Float[Array, "*shape"], index: Int[Array, "*batch"]) -> Denoised:
        return denoiser(x, visited[index])

    # Frame f is x after kept[f] steps; slot[j] is the first frame not older than step j + 1, overwritten until it is due.
    kept = np.round(np.linspace(0, num_steps, max(num_frames, 2)))
    slots = jnp.asarray(np.searchsorted(kept, np.arange(1, num_steps + 1)), jnp.int32)

    Carry = tuple[Float[Array, "*shape"], Float[Array, "F *shape"]]  # x and the frames so far

    def body(carry: Carry, position: tuple[Int[Array, ""], Int[Array, ""]]) -> tuple[Carry, None]:
        x, frames = carry
        index, slot = position
        t = jnp.full(shape[:1], index, jnp.int32)
        x = step(_fold_in(key, visited[index]), schedule, denoise, x, t)
        return (x, frames.at[slot].set(x) if num_frames else frames), None

    # Timesteps 0 ... T-1 name the keys of the steps, T that of x_T, which so is the same for any number of steps.
    x = normal(_fold_in(key, jnp.int32(total_steps)), shape) if x_init is None else x_init
    frames = jnp.broadcast_to(x[None], (num_frames, *shape))
    positions = (jnp.arange(num_steps - 1, -1, -1, dtype=jnp.int32), slots)
    (x, frames), _ = jax.lax.scan(body, (x, frames), positions)
    return frames if num_frames else x


def _fold_in(key: AnyKey, index: Int[Array, ""]) -> AnyKey:
    return jax.random.fold_in(key, index) if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))(key, index)
