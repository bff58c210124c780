"""Editing with any trained model: what the reverse process may start from, and what it may be held to.

interpolate      x_T on the great circle between two noises               Song et al. (2021), section 5.3
image_to_image   x_t ~ q(x_t | x0) of an image, and sampling from there    SDEdit, Meng et al. (2022)
inpaint          at every step the known pixels ~ q, the others ~ p        RePaint, Lugmayr et al. (2022)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ddpm_jax.diffusion.process import AnyKey, Denoiser, Variance, as_keys, at, fold_in, normal, q_sample, q_sample_prev
from ddpm_jax.diffusion.samplers import Sampler, find_sampler, sample, visit, with_options
from ddpm_jax.diffusion.schedule import Schedule, Spacing, spaced_timesteps


def interpolate(
    start: Float[Array, "*image"], end: Float[Array, "*image"], share: Float[Array, " K"]
) -> Float[Array, "K *image"]:
    """Points of the great circle between two noises: sin((1-c) angle)/sin(angle) start + sin(c angle)/sin(angle) end.

    Appendix D.5 of Song et al. (2021), arXiv:2010.02502 (Shoemake 1985). On the straight line between them the variance would
    fall to one half; on the circle noise stays noise, of norm |start| = |end|. Sampling from it without noise, as in

        sample(key, schedule, denoiser, x.shape, "ddim", x_init=x),   x = interpolate(start, end, jnp.linspace(0, 1, 10)),

    goes from one image to the other. Between opposite points, angle = pi, the circle is not defined.

    Args:
        start: the x_T of one image, [H, W, C] or of any shape: noise, or made from an image by `invert`.
        end: that of the other.
        share: c of each point, 0 (start) to 1 (end).
    """
    u, v = start / jnp.linalg.norm(start.ravel()), end / jnp.linalg.norm(end.ravel())
    # arccos(u . v) has lost half of its digits where u and v are close to each other.
    angle = 2.0 * jnp.arctan2(jnp.linalg.norm((u - v).ravel()), jnp.linalg.norm((u + v).ravel()))
    share = share.reshape(share.shape + (1,) * start.ndim)
    near = angle < 1e-4  # there the circle is the straight line in float32
    sine = jnp.sin(jnp.where(near, 1.0, angle))
    of_start = jnp.where(near, 1.0 - share, jnp.sin((1.0 - share) * angle) / sine)
    of_end = jnp.where(near, share, jnp.sin(share * angle) / sine)
    return of_start * start[None] + of_end * end[None]


def image_to_image(
    key: AnyKey,
    schedule: Schedule,
    denoiser: Denoiser,
    x0: Float[Array, "*shape"],
    strength: float,
    num_steps: int | None = None,
    **settings: Any,
) -> Float[Array, "..."]:
    """Noise images to a chosen level and sample from there: SDEdit, section 3 of Meng et al. (2022), arXiv:2108.01073.

    Args:
        key: one key, or one for each image [B].
        schedule: the one that the denoiser was made with; T steps.
        denoiser: see make_denoiser.
        x0: images in [-1, 1]; also what doesn't look like one of the model's, such as a drawing by hand.
        strength: 0 returns the images as they are, 1 noises them for all T steps and keeps nothing of them if alpha_bar_T = 0;
            between, the share of the T steps.
        num_steps: sampling steps from the noised image to the result, not more than there are timesteps; None: all.
        **settings: sampler, eta, spacing, variance and trajectory of `sample`.

    Raises:
        ValueError: strength outside [0, 1], or what `sample` raises.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], not {strength}")
    start = round(strength * schedule.num_steps) - 1
    if start < 0:
        return x0[None] if settings.get("trajectory") else x0
    eps = normal(fold_in(key, schedule.num_steps), x0.shape)  # the key that `sample` draws x_T from
    x_init = q_sample(schedule, x0, jnp.full(x0.shape[:1], start, jnp.int32), eps)
    num_steps = start + 1 if num_steps is None else min(num_steps, start + 1)
    return sample(key, schedule, denoiser, x0.shape, num_steps=num_steps, x_init=x_init, start=start, **settings)


def inpaint(
    key: AnyKey,
    schedule: Schedule,
    denoiser: Denoiser,
    x0: Float[Array, "*shape"],
    mask: Bool[Array, "..."],
    sampler: str | Sampler = "ddpm",
    num_steps: int | None = None,
    eta: float = 0.0,
    spacing: Spacing = "uniform",
    variance: Variance = "fixed_large",
    jump_length: int = 10,
    num_resamples: int = 10,
) -> Float[Array, "*shape"]:
    """Paint the masked pixels so that they fit the others: RePaint, Algorithm 1 of Lugmayr et al. (2022), arXiv:2201.09865.

    Every step draws the known pixels of x_{t-1} from q(x_{t-1} | x0) and takes the others from the sampler. To bring the two
    into harmony, the walk goes back to more noise and down again on its way, see repaint_moves.

    Args:
        key: one key, or one for each image [B].
        schedule: the one that the denoiser was made with; T steps.
        denoiser: see make_denoiser.
        x0: images in [-1, 1]; what they show under the mask has no influence.
        mask: True where to paint; as many axes as x0, those of size 1 for all images, rows or channels alike.
        sampler: a name in SAMPLERS, or a Sampler of your own; one that has no memory of earlier steps.
        num_steps: length K of the walk without going back, 1 ... T; None: T. It makes about K num_resamples steps in all.
        eta: noise of ddim, 0 to 1.
        spacing: which timesteps are visited when K < T.
        variance: of ddpm's steps.
        jump_length: steps that the walk goes back at a time, below K.
        num_resamples: how often each stretch of the walk is gone; 1 never goes back.

    Returns:
        Images like x0; where the mask is False they are x0 to the bit.

    Raises:
        ValueError: a sampler with memory, or a number out of range.
    """
    method = with_options(sampler_without_memory(sampler), eta, variance)
    num_steps = schedule.num_steps if num_steps is None else num_steps
    timesteps = spaced_timesteps(num_steps, schedule.num_steps, spacing, schedule.log_snr)
    moves = repaint_moves(num_steps, jump_length, num_resamples)

    def run(key: AnyKey, schedule: Schedule, x0: Float[Array, "*shape"], mask: Bool[Array, "..."]) -> Float[Array, "*shape"]:
        return _repaint(key, schedule, denoiser, method, timesteps, moves, x0, mask)

    return jax.jit(run)(as_keys(key), schedule, x0, mask)


def sampler_without_memory(sampler: str | Sampler) -> Sampler:
    """The sampler of a name, for walks that go back. Raises ValueError where its steps build upon earlier ones."""
    method = find_sampler(sampler)
    if method.memory:
        raise ValueError(
            f"sampler {sampler} builds upon earlier steps, but inpainting goes back: use one that doesn't, as ddpm"
        )
    return method


def repaint_moves(num_steps: int, jump_length: int = 10, num_resamples: int = 10) -> np.ndarray:
    """The walk of RePaint from K = num_steps steps before the image down to it, as moves (t, down) [M, 2].

    Down is x_{t-1} ~ p(x_{t-1} | x_t), the other way x_t ~ q(x_t | x_{t-1}). On reaching x_t with t = 0, j, 2j, ... (0-based,
    so never at the image itself), j = jump_length, the walk goes j steps back and down again, num_resamples - 1 times. With
    j = 1 these are the two loops of Algorithm 1; longer jumps are section 4.2 of Lugmayr et al. (2022).

    Raises:
        ValueError: a number below 1, or jumps as long as the walk.
    """
    if jump_length < 1 or num_resamples < 1:
        raise ValueError(f"jump_length = {jump_length} and num_resamples = {num_resamples} must be 1 or more")
    if num_resamples > 1 and jump_length >= num_steps:
        raise ValueError(
            f"jump_length = {jump_length} must be below the {num_steps} steps of the walk: shorten it, or take more steps"
        )
    moves: list[tuple[int, bool]] = []
    for t in reversed(range(num_steps)):
        moves.append((t, True))
        reached = t - 1
        if reached >= 0 and reached % jump_length == 0 and t + jump_length <= num_steps:
            stretch = range(t, t + jump_length)
            back_and_down = [*((s, False) for s in stretch), *((s, True) for s in reversed(stretch))]
            moves += back_and_down * (num_resamples - 1)
    return np.array(moves, np.int32)


def _repaint(
    key: AnyKey,
    schedule: Schedule,
    denoiser: Denoiser,
    method: Sampler,
    timesteps: np.ndarray,
    moves: np.ndarray,
    x0: Float[Array, "*shape"],
    mask: Bool[Array, "..."],
) -> Float[Array, "*shape"]:
    """The walk of `moves` over ascending `timesteps` [K]."""
    total_steps = schedule.num_steps
    schedule, denoise = visit(schedule, denoiser, timesteps)

    def body(x: Float[Array, "*shape"], move: tuple[Int[Array, ""], Int[Array, " 2"]]) -> tuple[Float[Array, "*shape"], None]:
        position, (index, down) = move
        move_key = fold_in(key, total_steps + 1 + position)  # below are the keys of `sample`
        t = jnp.full(x.shape[:1], index, jnp.int32)
        eps = normal(fold_in(move_key, 0), x.shape)

        def toward_image(xt: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
            # Differs from the paper's Eq. 8a, which writes alpha_bar_t: the known pixels are to be as noisy as x_{t-1}.
            known = q_sample_prev(schedule, x0, t, eps)
            return jnp.where(mask, method.step(fold_in(move_key, 1), schedule, denoise, xt, t), known)

        def toward_noise(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
            return at(jnp.sqrt(1.0 - schedule.beta), t, x) * x + at(jnp.sqrt(schedule.beta), t, x) * eps

        return jax.lax.cond(down == 1, toward_image, toward_noise, x), None

    x = normal(fold_in(key, total_steps), x0.shape)
    x, _ = jax.lax.scan(body, x, (jnp.arange(len(moves), dtype=jnp.int32), jnp.asarray(moves)))
    return x
