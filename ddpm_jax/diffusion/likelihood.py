"""How probable images are under a model, in bits per dimension: the variational bound, and the probability-flow ODE.

The bound of Ho et al. (2020), Eq. 5, on -log p(x0), t counted from 0:

    L_T + L_{T-1} + ... + L_1 + L_0,   L_T = KL(q(x_{T-1} | x0) || N(0, I)),   L_t: see bound.py                 (1)

The ODE whose solutions have the marginals of the diffusion: with xt = a x0 + s eps, a = cos(phi), s = sin(phi), it is
dx/dphi = v = a eps - s x0 (Salimans & Ho 2022, appendix D). Along u = log tan(phi / 2) = log(s / (1 + a)), du = dphi / s,

    dx/du = s v = a x - x0(x, t)                                                                              (2)
    log p(x_0) = log N(x_T; 0, I) + integral of div(a x - x0(x, t)) du from u_0 to u_T                        (3)

Eq. 3 is the change of variables of Song et al. (2021), arXiv:2011.13456, appendix D.2. u is log sigma where there is little
noise and phi where there is much, so that both integrands are smooth over the whole schedule, alpha_bar_T = 0 included.
The divergence is Hutchinson's estimate, E[probe . J probe] over probes of random signs.

A density of images with 256 grey levels is a density of what uniform noise of one level's width makes of them; then

    bits/dim = -log2 p(x) / dims - log2(2 / 255),   2/255 = width of a grey level in [-1, 1]                  (4)

is, in the mean over that noise, an upper bound of the discrete code length (Theis et al. 2016, arXiv:1511.01844).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.bound import gaussian_kl, vlb_terms
from ddpm_jax.diffusion.process import AnyKey, Denoiser, NetworkDenoiser, Variance, as_keys, at, normal, q_sample
from ddpm_jax.diffusion.schedule import Schedule, spaced_timesteps

LEVEL_WIDTH = 2 / 255  # of one of the 256 grey levels in [-1, 1]


class VariationalBound(NamedTuple):
    """The terms of Eq. 1 for each image, in bits/dim; their sum is not below -log2 p(x0) / dims, in the mean over noise."""

    prior: Float[Array, " B"]
    """L_T: how far x_{T-1} is from the noise that sampling begins with."""
    terms: Float[Array, "B T"]
    """L_t for t = 0 ... T-1, L_0 being the discretised decoder's."""

    @property
    def total(self) -> Float[Array, " B"]:
        """The bound."""
        return self.prior + jnp.sum(self.terms, axis=1)


def bits_per_dim(
    key: AnyKey,
    schedule: Schedule,
    denoiser: Denoiser,
    x0: Float[Array, "B *image"],
    variance: Variance = "fixed_large",
) -> VariationalBound:
    """The variational bound of images with 256 grey levels, Eq. 1 above; T evaluations, one compiled `lax.scan`.

    Each L_t is seen at one draw of q(xt | x0), with the noise normal(fold_in(key, t)). For the bound of a sampler with fewer
    steps, give it the schedule and the denoiser of the shorter process: `short = denoiser.visiting(timesteps)` and
    `short.schedule`.

    Args:
        key: one key, or one for each image [B], which makes an image's number independent of its batch.
        schedule: the one that the denoiser was made with; T steps.
        denoiser: see make_denoiser; Ho et al. let it clip.
        x0: images, grey level k as k / 127.5 - 1.
        variance: of p(x_{t-1} | xt), see p_sample.

    Raises:
        ValueError: "learned_range" with a denoiser that tells no variance, or an unknown name.
    """

    def run(key: AnyKey, schedule: Schedule, x0: Float[Array, "B *image"]) -> VariationalBound:
        def term(_: None, t: Int[Array, ""]) -> tuple[None, Float[Array, " B"]]:
            times = jnp.full(x0.shape[:1], t)
            xt = q_sample(schedule, x0, times, normal(fold_in(key, t), x0.shape))
            return None, vlb_terms(schedule, denoiser, x0, xt, times, variance)

        _, terms = jax.lax.scan(term, None, jnp.arange(schedule.num_steps, dtype=jnp.int32))
        return VariationalBound(prior_bits_per_dim(schedule, x0), terms.T)

    return jax.jit(run)(as_keys(key), schedule, x0)


def prior_bits_per_dim(schedule: Schedule, x0: Float[Array, "B *image"]) -> Float[Array, " B"]:
    """L_T = KL(q(x_{T-1} | x0) || N(0, I)) of Eq. 1, in bits/dim; of the data and the schedule alone."""
    zero = jnp.zeros((), x0.dtype)
    log_variance = 2.0 * jnp.log(schedule.sqrt_one_minus_alpha_bar[-1])
    kl = gaussian_kl(schedule.sqrt_alpha_bar[-1] * x0, log_variance, zero, zero)
    return jnp.mean(kl, axis=tuple(range(1, x0.ndim))) / math.log(2)


def ode_bits_per_dim(
    key: AnyKey,
    schedule: Schedule,
    denoiser: Denoiser,
    x0: Float[Array, "B *image"],
    num_steps: int | None = None,
    num_probes: int = 1,
) -> Float[Array, " B"]:
    """Bits/dim of images with 256 grey levels by the probability-flow ODE, with uniform dequantisation; Eq. 4 above.

    Args:
        key: one key, or one for each image [B], which makes an image's number independent of its batch.
        schedule: the one that the denoiser was made with.
        denoiser: one that does not clip; see ode_log_likelihood.
        x0: images, grey level k as k / 127.5 - 1.
        num_steps: see ode_log_likelihood, as is num_probes.
        num_probes: probes of the divergence.

    Returns:
        One number for each image; the mean over the two kinds of noise is what an infinite num_probes would give.
    """
    keys = as_keys(key)
    noise_key, probe_key = fold_in(keys, 0), fold_in(keys, 1)
    noise = for_each_image(jax.random.uniform, noise_key, x0.shape) - 0.5
    log_likelihood = ode_log_likelihood(probe_key, schedule, denoiser, x0 + LEVEL_WIDTH * noise, num_steps, num_probes)
    return -log_likelihood / (math.log(2) * math.prod(x0.shape[1:])) - math.log2(LEVEL_WIDTH)


def ode_log_likelihood(
    key: AnyKey,
    schedule: Schedule,
    denoiser: Denoiser,
    x: Float[Array, "B *image"],
    num_steps: int | None = None,
    num_probes: int = 1,
) -> Float[Array, " B"]:
    """Log density of x by the probability-flow ODE, in nats, Eqs. 2 and 3 above; Heun's method, one compiled `lax.scan`.

    A network knows no time before t = 0, so what is evaluated is the density of x0 + (s_0 / a_0) eps, the data with the
    noise of the first timestep: a model in its own right, as Song et al.'s, who begin at a small positive time.

    Args:
        key: one key, or one for each image [B]; draws the probes alone.
        schedule: the one that the denoiser was made with.
        denoiser: see make_denoiser; differentiable, with clip=False: a clipped prediction is not the ODE's.
        x: any continuous data, on the scale that the model was trained with.
        num_steps: timesteps visited, 2 ... T, from 0 to T-1; two evaluations and two pullbacks between neighbours. None: T.
        num_probes: probes of random signs, each one pullback more; they lower the noise of the estimate, not its mean.

    Raises:
        ValueError: a denoiser that clips, or numbers out of range.
    """
    if isinstance(denoiser, NetworkDenoiser) and denoiser.clip:
        raise ValueError("the likelihood needs a denoiser that does not clip: make_denoiser(..., clip=False)")
    if num_probes < 1:
        raise ValueError(f"num_probes = {num_probes}: must be 1 or more")
    total_steps = schedule.num_steps
    num_steps = total_steps if num_steps is None else num_steps
    if num_steps < min(2, total_steps):
        raise ValueError(f"cannot solve the ODE in {num_steps} timesteps: choose 2 to {total_steps}")
    timesteps = jnp.asarray(spaced_timesteps(num_steps, total_steps))

    def run(key: AnyKey, schedule: Schedule, x: Float[Array, "B *image"]) -> Float[Array, " B"]:
        signs = functools.partial(jax.random.rademacher, dtype=x.dtype)
        probes = for_each_image(signs, key, x.shape, num_probes)
        return _integrate(schedule, denoiser, x, timesteps, probes)

    return jax.jit(run)(as_keys(key), schedule, x)


def _integrate(
    schedule: Schedule,
    denoiser: Denoiser,
    x: Float[Array, "B *image"],
    timesteps: Int[Array, " K"],
    probes: Float[Array, "B P *image"],
) -> Float[Array, " B"]:
    """Eq. 3 over ascending timesteps, x taken as x0 + (s / a) eps at the first of them."""
    axes, batch = tuple(range(1, x.ndim)), x.shape[:1]
    u = jnp.log(schedule.sqrt_one_minus_alpha_bar / (1.0 + schedule.sqrt_alpha_bar))[timesteps]

    def flow(x: Float[Array, "B *image"], t: Int[Array, ""]) -> tuple[Float[Array, "B *image"], Float[Array, " B"]]:
        """dx/du and its divergence."""
        t = jnp.full(batch, t)
        velocity, pullback = jax.vjp(lambda x: at(schedule.sqrt_alpha_bar, t, x) * x - denoiser(x, t).x0, x)
        rows = jax.vmap(lambda probe: pullback(probe)[0], 1, 1)(probes)  # probe . J
        return velocity, jnp.mean(jnp.sum(probes * rows, axis=tuple(range(2, rows.ndim))), axis=1)

    Carry = tuple[Float[Array, "B *image"], Float[Array, " B"]]

    def heun(carry: Carry, span: tuple[Int[Array, ""], Int[Array, ""], Float[Array, ""]]) -> tuple[Carry, None]:
        x, integral = carry
        t, t_next, du = span
        here, divergence = flow(x, t)
        there, divergence_there = flow(x + du * here, t_next)
        return (x + du / 2.0 * (here + there), integral + du / 2.0 * (divergence + divergence_there)), None

    first = schedule.sqrt_alpha_bar[timesteps[0]]
    spans = (timesteps[:-1], timesteps[1:], jnp.diff(u))
    (x, integral), _ = jax.lax.scan(heun, (first * x, jnp.zeros(batch, x.dtype)), spans)
    log_prior = -0.5 * jnp.sum(jnp.square(x) + math.log(2 * math.pi), axis=axes)
    return log_prior + integral + math.prod(x.shape[1:]) * jnp.log(first)


def for_each_image(
    draw: Callable[..., Array], key: AnyKey, shape: tuple[int, ...], count: int | None = None
) -> Float[Array, "B *rest"]:
    """draw(key, shape[1:]) for each image, or `count` of them [B, count, ...], from one key or from one for each image."""
    keys = jax.random.split(key, shape[0]) if key.ndim == 0 else key
    if keys.shape != shape[:1]:
        raise ValueError(f"one key for each image needs {shape[0]} keys, not {keys.shape}")
    inner = shape[1:] if count is None else (count, *shape[1:])
    return jax.vmap(lambda k: draw(k, inner))(keys)


def fold_in(key: AnyKey, data: int | Int[Array, ""]) -> AnyKey:
    """jax.random.fold_in for one key or for each of several."""
    return jax.random.fold_in(key, data) if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))(key, data)
