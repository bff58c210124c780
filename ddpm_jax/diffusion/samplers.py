"""Samplers: from noise x_T to images x_0, each step a pure function of (key, schedule, denoiser, xt, t).

The steps are in `process.py`, `steps.py` and `multistep.py`; SAMPLERS names them, and `sample` is the loop around them. A
sampler with fewer steps than T walks a sub-sequence of the timesteps: `visit` gives that shorter process a schedule of its
own, so that a step knows nothing of the spacing.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.multistep import dpmpp_2m_sde_step, dpmpp_2m_step, dpmpp_3m_step, unipc_step
from ddpm_jax.diffusion.process import (
    AnyKey,
    Denoiser,
    NetworkDenoiser,
    Variance,
    as_keys,
    fold_in,
    normal,
    p_log_variance,
    p_sample,
)
from ddpm_jax.diffusion.schedule import Schedule, Spacing, respace, spaced_timesteps
from ddpm_jax.diffusion.steps import ddim_step, euler_step, heun_step


class Sampler(NamedTuple):
    """A sampling algorithm: its step, and what is to be known of it."""

    step: Callable[..., Any]
    """(key, schedule, denoiser, xt, t) -> x_{t-1}; with memory, (..., xt, t, memory) -> (x_{t-1}, memory)."""
    evaluations: int = 1
    """Denoiser calls of a step."""
    order: int = 1
    """Order of convergence to the ODE's solution, or of what is drawn to the SDE's law, as steps become smaller."""
    stochastic: bool = False
    """Whether a step adds noise; ddim's does where eta > 0."""
    memory: int = 0
    """Number of arrays like x that a step hands on to the next; zeros before the first step, that of t = T-1."""
    options: tuple[str, ...] = ()
    """Options of `sample` that the step takes: eta, variance."""


SAMPLERS = {
    "ddpm": Sampler(p_sample, stochastic=True, options=("variance",)),
    "ddim": Sampler(ddim_step, options=("eta",)),
    "euler": Sampler(euler_step),
    "heun": Sampler(heun_step, evaluations=2, order=2),
    "dpmpp_2m": Sampler(dpmpp_2m_step, order=2, memory=1),
    "dpmpp_3m": Sampler(dpmpp_3m_step, order=3, memory=2),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde_step, order=2, stochastic=True, memory=1),
    "unipc": Sampler(unipc_step, order=3, memory=3),
}


def find_sampler(sampler: str | Sampler) -> Sampler:
    """The sampler of a name. Raises ValueError where there is none."""
    if isinstance(sampler, Sampler):
        return sampler
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler]


def with_options(method: Sampler, eta: float, variance: Variance) -> Sampler:
    """The sampler with those options bound that its step takes. Raises ValueError where eta leaves [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], not {eta}")
    options = {name: value for name, value in {"eta": eta, "variance": variance}.items() if name in method.options}
    return method._replace(step=functools.partial(method.step, **options))


def sample(
    key: AnyKey,
    schedule: Schedule,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    sampler: str | Sampler = "ddpm",
    num_steps: int | None = None,
    eta: float = 0.0,
    spacing: Spacing = "uniform",
    x_init: Float[Array, "*shape"] | None = None,
    trajectory: bool | int = False,
    variance: Variance = "fixed_large",
    start: int | None = None,
) -> Float[Array, "..."]:
    """Draw images from the reverse process, as one compiled `lax.scan` over the steps.

    Each call compiles its program anew. To draw several times with one program, put the call into a `jax.jit` of your
    own, as a function of the key and of the network's weights.

    Args:
        key: one key, or one for each image [B]: image i then depends on key i alone, not on its batch.
        schedule: the one that the denoiser was made with; T steps.
        denoiser: see make_denoiser.
        shape: (B, H, W, C).
        sampler: a name in SAMPLERS, or a Sampler of your own.
        num_steps: steps, 1 ... T, each of as many denoiser calls as the sampler makes; None means T.
        eta: noise of ddim, 0 (none) to 1 (as much as the posterior's).
        spacing: which timesteps are visited when num_steps < T; see spaced_timesteps.
        x_init: start from this x_T [B, H, W, C] instead of from noise.
        trajectory: True returns x at every step, x_T first; a number n >= 2 returns n of these, evenly spaced, or all
            where there are fewer.
        variance: of ddpm's steps: "fixed_large", "fixed_small" or "learned_range".
        start: the timestep of x_init, T-1 if not given; the num_steps then are those from there, 1 ... start + 1.

    Returns:
        float32 images of the given shape, in [-1, 1] if the denoiser clips; with a trajectory [n, B, H, W, C].

    Raises:
        ValueError: an unknown name, steps outside 1 ... T, eta outside [0, 1], or fewer than 2 frames.
    """
    method = find_sampler(sampler)
    if variance != "learned_range":
        p_log_variance(schedule, variance)  # an unknown name is an error with every sampler
    if x_init is not None and x_init.shape != tuple(shape):
        raise ValueError(f"x_init has shape {x_init.shape}, not {tuple(shape)}")
    if start is not None and not 0 <= start < schedule.num_steps:
        raise ValueError(f"start = {start} lies outside 0 ... {schedule.num_steps - 1}")
    total_steps = schedule.num_steps if start is None else start + 1
    num_steps = total_steps if num_steps is None else num_steps
    timesteps = spaced_timesteps(num_steps, total_steps, spacing, schedule.log_snr[:total_steps])
    num_frames = num_steps + 1 if trajectory is True else min(int(trajectory), num_steps + 1)
    if num_frames < 0 or num_frames == 1:
        raise ValueError(f"a trajectory has at least 2 frames, not {int(trajectory)}")
    learned = "variance" in method.options and variance == "learned_range"
    if learned and num_steps < schedule.num_steps and not isinstance(denoiser, NetworkDenoiser):
        raise ValueError(f"variance learned_range in {num_steps} of {schedule.num_steps} steps: use make_denoiser's denoiser")
    method = with_options(method, eta, variance)

    def run(key: AnyKey, schedule: Schedule, x_init: Float[Array, "*shape"] | None) -> Float[Array, "..."]:
        return _reverse(key, schedule, denoiser, method, timesteps, shape, x_init, num_frames)

    return jax.jit(run)(as_keys(key), schedule, x_init)


def visit(schedule: Schedule, denoiser: Denoiser, timesteps: Int[np.ndarray, " K"]) -> tuple[Schedule, Denoiser]:
    """Schedule and denoiser of the process that visits only `timesteps`, ascending; their t counts them, 0 ... K-1."""
    if len(timesteps) == schedule.num_steps:
        return schedule, denoiser
    visited = jnp.asarray(timesteps)
    short = respace(schedule, visited)
    if isinstance(denoiser, NetworkDenoiser):
        return short, denoiser.visiting(visited)
    return short, lambda xt, t: denoiser(xt, visited[t])


def _reverse(
    key: AnyKey,
    schedule: Schedule,
    denoiser: Denoiser,
    method: Sampler,
    timesteps: np.ndarray,
    shape: tuple[int, ...],
    x_init: Float[Array, "*shape"] | None,
    num_frames: int,
) -> Float[Array, "..."]:
    """The loop over ascending `timesteps` [K] from the last to the first; num_frames = 0 keeps x_0 only."""
    num_steps, total_steps = len(timesteps), schedule.num_steps
    schedule, denoise = visit(schedule, denoiser, timesteps)
    visited = jnp.asarray(timesteps)

    # Frame f is x after kept[f] steps; slot[j] is the first frame not older than step j + 1, overwritten until it is due.
    kept = np.round(np.linspace(0, num_steps, max(num_frames, 2)))
    slots = jnp.asarray(np.searchsorted(kept, np.arange(1, num_steps + 1)), jnp.int32)

    Memory = tuple[Float[Array, "*shape"], ...]
    Carry = tuple[Float[Array, "*shape"], Memory, Float[Array, "F *shape"]]  # x, the sampler's memory and the frames so far

    def body(carry: Carry, position: tuple[Int[Array, ""], Int[Array, ""]]) -> tuple[Carry, None]:
        x, memory, frames = carry
        index, slot = position
        arguments = (fold_in(key, visited[index]), schedule, denoise, x, jnp.full(shape[:1], index, jnp.int32))
        if method.memory:
            x, memory = method.step(*arguments, memory)
        else:
            x = method.step(*arguments)
        return (x, memory, frames.at[slot].set(x) if num_frames else frames), None

    # Timesteps 0 ... T-1 name the keys of the steps, T that of x_T, which so is the same for any number of steps.
    x = normal(fold_in(key, total_steps), shape) if x_init is None else x_init
    frames = jnp.broadcast_to(x[None], (num_frames, *shape))
    positions = (jnp.arange(num_steps - 1, -1, -1, dtype=jnp.int32), slots)
    memory = (jnp.zeros_like(x),) * method.memory
    (x, _, frames), _ = jax.lax.scan(body, (x, memory, frames), positions)
    return frames if num_frames else x
