"""Moving averages of the weights, followed during training or put together afterwards.

Constant decay d:      average <- d average + (1 - d) theta
Power function gamma:  average(t) = integral_0^t p(tau) theta(tau) dtau, profile p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)

Karras et al. (2024), "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv:2312.02696), section 3 and
appendix C. The length of a power function average is the standard deviation of its profile as a part of t. For weights that
stand still between updates, the update with decay (1 - 1/t)^(gamma + 1) makes that integral exactly, so that what is fitted to
the profiles afterwards (`solve_weights`) holds for the averages that training makes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ddpm_jax.config import OptimConfig

MAX_LENGTH = 12**-0.5  # of gamma = 0, the plain mean of all steps; longer ones would favour the oldest weights


class Profile(NamedTuple):
    """The profile of one power function average, or of several."""

    t: Float[np.ndarray, "*N"] | float
    """Updates made when it was taken, > 0."""
    gamma: Float[np.ndarray, "*N"] | float
    """Its power, >= 0."""


def ema_decay(step: Int[Array, ""], decay: float, warmup: bool) -> Float[Array, ""]:
    """Decay of the average's update number n = step (from 0): min(decay, (1 + n) / (10 + n)) with warm-up."""
    limit = jnp.float32(decay)
    if not warmup:
        return limit
    n = step.astype(jnp.float32)
    return jnp.minimum(limit, (1.0 + n) / (10.0 + n))


def ema_update(ema: PyTree, params: PyTree, decay: Float[Array, ""]) -> PyTree:
    """decay * ema + (1 - decay) * params."""
    return _move(ema, params, 1.0 - decay)


def power_rate(step: Int[Array, ""], gamma: float) -> Float[Array, ""]:
    """1 - (1 - 1/t)^(gamma + 1), what the update that leads to t = step + 1 takes of the new weights; 1 for the first one.

    The power itself rounds to 1 - 6e-8 at best, which is coarse beside (gamma + 1) / t after a million steps: hence expm1.
    """
    t = (step + 1).astype(jnp.float32)
    return -jnp.expm1((gamma + 1.0) * jnp.log1p(-1.0 / t))


def average_names(config: OptimConfig) -> tuple[str, ...]:
    """The averages followed beside the main one, as they are asked for: "decay:0.999", "ema:0.05"."""
    return (*(f"decay:{decay}" for decay in config.ema_decays), *(f"ema:{length}" for length in config.ema_lengths))


def update_averages(
    averages: dict[str, PyTree], params: PyTree, step: Int[Array, ""], config: OptimConfig
) -> dict[str, PyTree]:
    """All of `average_names` after update number n = step (from 0) has led to params."""
    rates = [1.0 - ema_decay(step, decay, config.ema_warmup) for decay in config.ema_decays]
    rates += [power_rate(step, gamma_from_length(length)) for length in config.ema_lengths]
    return {name: _move(averages[name], params, rate) for name, rate in zip(average_names(config), rates, strict=True)}


def gamma_from_length(length: float) -> float:
    """The power gamma >= 0 whose profile has the relative standard deviation `length`, 0 < length <= 1/sqrt(12).

    The root of length = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)), squared a cubic, that is not negative:
    gamma^3 + 7 gamma^2 + (16 - length^-2) gamma + 12 - length^-2 = 0. Karras et al. (2024), section 3.1.

    Raises:
        ValueError: a length out of range.
    """
    if not 0 < length <= MAX_LENGTH:
        raise ValueError(f"length = {length}: must lie in (0, 1/sqrt(12) = {MAX_LENGTH:.4f}]")
    roots = np.roots([1.0, 7.0, 16.0 - length**-2, 12.0 - length**-2])
    return max(0.0, float(roots.real.max()))


def profile_inner_product(a: Profile, b: Profile) -> Float[np.ndarray, "*N"] | float:
    """Integral of p_a(tau) p_b(tau), (g_a + 1)(g_b + 1) (t_a / t_b)^g_b / ((g_a + g_b + 1) t_b) for t_a <= t_b. Appendix C."""
    early, late, power = np.minimum(a.t, b.t), np.maximum(a.t, b.t), np.where(a.t <= b.t, b.gamma, a.gamma)
    return (a.gamma + 1) * (b.gamma + 1) * (early / late) ** power / ((a.gamma + b.gamma + 1) * late)


def solve_weights(stored: Sequence[Profile], wanted: Profile) -> tuple[Float[np.ndarray, " N"], float]:
    """Weights x of the stored averages whose sum comes nearest to the wanted one, in float64, and how near.

    Least squares between profiles, |p - sum_i x_i p_i|^2, by the normal equations over their inner products (appendix C).
    Differs from the paper: sum_i x_i = 1, by a Lagrange multiplier, so that weights that stand still come back as they are
    however coarse the fit.

    Returns:
        x, and the distance |p - sum_i x_i p_i| / |p|: 0 for a stored profile, about 1 for one that has nothing in common.
    """
    count, target = len(stored), Profile(1.0, wanted.gamma)
    t, gamma = np.array([p.t for p in stored]) / wanted.t, np.array([p.gamma for p in stored])
    system = np.ones((count + 1, count + 1))
    system[:count, :count] = profile_inner_product(Profile(t[:, None], gamma[:, None]), Profile(t, gamma))
    system[count, count] = 0.0
    right = np.append(profile_inner_product(Profile(t, gamma), target), 1.0)
    x = np.linalg.lstsq(system, right, rcond=None)[0][:count]  # neighbours are nearly parallel: the smallest of many solutions
    norm = profile_inner_product(target, target)
    distance = norm - 2 * x @ right[:count] + x @ system[:count, :count] @ x
    return x, math.sqrt(max(0.0, distance) / norm)


def _move(averages: PyTree, params: PyTree, rate: Float[Array, ""]) -> PyTree:
    return jax.tree.map(lambda average, value: average + rate * (value - average), averages, params)
