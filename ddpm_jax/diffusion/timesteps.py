"""How training draws t, and importance sampling of it by the second moment of the loss.

    E_{t ~ uniform} [L_t] = E_{t ~ p} [L_t / (T p_t)],   p_t prop. to sqrt(E[L_t^2])

The right-hand side has the smallest variance with that p: Eq. 18 of Nichol & Dhariwal (2021), arXiv:2102.09672. E[L_t^2] is
the mean over the last 10 losses of each t, and until all timesteps have had as many, t is uniform.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.process import AnyKey

HISTORY = 10  # Losses that are kept of each timestep, section 3.3 of Nichol & Dhariwal (2021).
UNIFORM_SHARE = 0.001  # Of the draws, whatever the losses say; their code's, so that no timestep is forgotten.
UNIT = 2.0**-30  # Probabilities are whole numbers of it, at most T above 2^30 of them in all: below 2^31.


class LossHistory(NamedTuple):
    """The state of importance sampling: the last losses of each timestep, in no order."""

    losses: Float[Array, "T 10"]
    """float32."""
    seen: Int[Array, " T"]
    """Losses seen; from 10 on, 10 more than the place that comes next."""


def draw_timesteps(
    key: AnyKey, batch_size: int, num_steps: int, method: Literal["uniform", "stratified"] = "uniform"
) -> Int[Array, " B"]:
    """Timesteps int32 [B], each uniform on 0 ... T-1.

    "uniform" draws them independently, line 3 of Algorithm 1 of Ho et al. (2020). "stratified" draws t_i from the i-th of
    B equal parts of the range, so that a batch covers all noise levels: the same expectation with less variance.
    """
    if method == "uniform":
        return jax.random.randint(key, (batch_size,), 0, num_steps)
    if method != "stratified":
        raise ValueError(f"unknown way to draw timesteps {method!r}: choose uniform or stratified")
    u = (jnp.arange(batch_size, dtype=jnp.float32) + jax.random.uniform(key, (batch_size,))) / batch_size
    return jnp.minimum((u * num_steps).astype(jnp.int32), num_steps - 1)


def empty_history(num_steps: int) -> LossHistory:
    """The state before the first loss of T = num_steps timesteps."""
    return LossHistory(jnp.zeros((num_steps, HISTORY), jnp.float32), jnp.zeros((num_steps,), jnp.int32))


def draw_by_loss(key: AnyKey, history: LossHistory, batch_size: int) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Timesteps int32 [B], independent draws of p, and what their losses are to be multiplied with, 1 / (T p_t).

    The products' expectation is that of the loss under uniform t exactly, not only up to the rounding of p.
    """
    units = probability_units(history)
    ends = jnp.cumsum(units)
    place = jax.random.randint(key, (batch_size,), 0, ends[-1])
    t = jnp.searchsorted(ends, place, side="right").astype(jnp.int32)
    mean_units = ends[-1].astype(jnp.float32) / units.shape[0]
    return t, mean_units / units[t].astype(jnp.float32)


def probability_units(history: LossHistory) -> Int[Array, " T"]:
    """p_t as whole numbers, 1 or more, of their sum, which is about 2^30: so the p drawn from and the p divided by are one."""
    num_steps = history.seen.shape[0]
    second_moment = jnp.mean(jnp.square(history.losses), axis=1)
    p = jnp.sqrt(second_moment)
    total = jnp.sum(p)
    ready = jnp.all(history.seen >= HISTORY) & (total > 0)
    p = jnp.where(ready, p / jnp.where(ready, total, 1.0), 1.0 / num_steps)
    p = (1.0 - UNIFORM_SHARE) * p + UNIFORM_SHARE / num_steps
    return jnp.maximum((p / UNIT).astype(jnp.int32), 1)


def record_losses(history: LossHistory, t: Int[Array, " B"], losses: Float[Array, " B"]) -> LossHistory:
    """The history after a batch; of more than 10 losses of one timestep the last 10 count."""
    num_steps, batch_size = history.seen.shape[0], t.shape[0]
    order = jnp.argsort(t, stable=True)
    t, losses = t[order], losses[order]
    rank = jnp.arange(batch_size, dtype=jnp.int32) - jnp.searchsorted(t, t, side="left").astype(jnp.int32)
    new = jnp.zeros_like(history.seen).at[t].add(1)
    # Two losses for one place would be written in no certain order: the earlier one is sent to a row that isn't there.
    row = jnp.where(rank >= new[t] - HISTORY, t, num_steps)
    place = (history.seen[t] + rank) % HISTORY
    seen = history.seen + new
    seen = jnp.where(seen >= HISTORY, HISTORY + seen % HISTORY, seen)
    return LossHistory(history.losses.at[row, place].set(losses, mode="drop"), seen)
