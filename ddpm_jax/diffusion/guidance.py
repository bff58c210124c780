"""Guidance: a network that follows a class more (or less) strongly than it was trained to, made from other networks.

By Bayes' rule grad log p(xt | y) = grad log p(xt) + grad log p(y | xt), gradients with respect to xt. Guidance weighs the
last term by a scale w, which samples from about p(xt) p(y | xt)^w:

    eps = eps(xt) + w (eps(xt, y) - eps(xt))      classifier-free: both terms from networks                     (1)
    eps = eps(xt) - w s grad log p(y | xt)        by a classifier of noisy images, since eps = -s grad log p     (2)

with xt = a x0 + s eps. At given xt, x0 and v are affine in eps, so that (1) holds for each of them as it stands, and in (2)
a shift d of eps is one of -(s / a) d of x0 and of d / a of v. Both functions return a network like those they are given,
(xt, t) -> output, for make_denoiser: they act before x0 is clipped. Of a network with twice the channels of xt the second
half tells the variance and is left as it is.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ddpm_jax.diffusion.process import NetworkFn, Prediction, at
from ddpm_jax.diffusion.schedule import Schedule

LogProbFn = Callable[[Float[Array, "*shape"], Int[Array, "*batch"]], Float[Array, "*batch"]]


def classifier_free(
    schedule: Schedule,
    conditional_fn: NetworkFn,
    unconditional_fn: NetworkFn,
    scale: float,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> NetworkFn:
    """The network unconditional + scale (conditional - unconditional), Eq. 6 of Ho & Salimans (2022) with scale = 1 + w.

    Args:
        schedule: the one that the networks were trained with.
        conditional_fn: (xt, t) -> output, with the class in it; predicts eps, x0 or v.
        unconditional_fn: the same for no class.
        scale: 0 gives unconditional_fn itself, 1 conditional_fn itself; more than 1 follows the class more strongly, at the
            price of variety.
        interval: (low, high): guidance acts where low < sigma <= high, sigma = s / a, and the conditional network stands
            alone elsewhere, where the other is not evaluated (Kynkäänniemi et al. 2024, arXiv:2404.07724). None: everywhere.
        rescale: phi of Lin et al. (2023), section 3.4, 0 ... 1: how far each image's output is brought back to the standard
            deviation that the conditional's has; 1 wholly. Acts on the output, so it depends on what the network predicts:
            it is of use for v and x0, and of little for eps, whose deviation is close to 1.

    Raises:
        ValueError: scale not finite, rescale outside [0, 1], or not 0 <= low < high.
    """
    if not math.isfinite(scale):
        raise ValueError(f"the guidance scale must be finite, not {scale}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"the guidance rescale must lie in [0, 1], not {rescale}")
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"the guidance interval needs 0 <= low < high, not {interval[0]} and {interval[1]}")
    if scale == 1:
        return conditional_fn
    if scale == 0 and interval is None:
        return unconditional_fn

    def combined(conditional: Array, xt: Array, t: Array) -> Array:
        channels = xt.shape[-1]
        asked, free = conditional[..., :channels], unconditional_fn(xt, t)[..., :channels].astype(xt.dtype)
        guided = free + scale * (asked - free)
        if rescale:
            axes = tuple(range(t.ndim, xt.ndim))
            deviation = [jnp.std(x, axes, keepdims=True) for x in (asked, guided)]
            # An output without any deviation, such as an untrained network's, stays as it is.
            ratio = deviation[0] / jnp.where(deviation[1] > 0, deviation[1], 1.0)
            guided = guided * (rescale * ratio + (1.0 - rescale))
        return jnp.concatenate([guided, conditional[..., channels:]], axis=-1)

    def network_fn(xt: Float[Array, "*shape"], t: Int[Array, "*batch"]) -> Float[Array, "..."]:
        conditional = conditional_fn(xt, t).astype(xt.dtype)
        if interval is None:
            return combined(conditional, xt, t)
        inside = _inside(schedule, interval, t)

        def within() -> Array:
            return jnp.where(inside.reshape(t.shape + (1,) * (xt.ndim - t.ndim)), combined(conditional, xt, t), conditional)

        return jax.lax.cond(jnp.any(inside), within, lambda: conditional)

    return network_fn


def classifier_guided(
    schedule: Schedule,
    network_fn: NetworkFn,
    log_prob_fn: LogProbFn,
    scale: float = 1.0,
    prediction: Prediction = "eps",
) -> NetworkFn:
    """The network with eps - scale s grad log p(y | xt) for eps, Algorithm 2 of Dhariwal & Nichol (2021), arXiv:2105.05233.

    It is the network's score that changes, so this serves every sampler; with an exact classifier and scale 1 an
    unconditional network becomes the conditional one.

    Args:
        schedule: the one that the network was trained with.
        network_fn: (xt, t) -> output.
        log_prob_fn: (xt, t) -> log p(y | xt) [B] of the classes wanted, differentiable in xt; each image's number may depend
            on that image alone. Any constant may be added. A classifier of noisy images must have seen noise in training.
        scale: w; 1 is Bayes' rule, more follows the class more strongly.
        prediction: what network_fn predicts: "eps", "x0" or "v".

    Raises:
        ValueError: an unknown prediction.
    """
    # Where nothing is left of x0 (a = 0, zero terminal SNR) xt tells nothing of the class, and the network stays as it is.
    a = jnp.where(schedule.sqrt_alpha_bar > 0, schedule.sqrt_alpha_bar, jnp.inf)
    s = schedule.sqrt_one_minus_alpha_bar
    if prediction == "eps":
        weight = -s
    elif prediction == "x0":
        weight = jnp.square(s) / a
    elif prediction == "v":
        weight = -s / a
    else:
        raise ValueError(f"unknown prediction {prediction!r}: choose eps, x0 or v")

    def guided_fn(xt: Float[Array, "*shape"], t: Int[Array, "*batch"]) -> Float[Array, "..."]:
        output = network_fn(xt, t).astype(xt.dtype)
        gradient = jax.grad(lambda x: jnp.sum(log_prob_fn(x, t)))(xt)
        channels = xt.shape[-1]
        shifted = output[..., :channels] + scale * at(weight, t, xt) * gradient
        return jnp.concatenate([shifted, output[..., channels:]], axis=-1)

    return guided_fn


def _inside(schedule: Schedule, interval: tuple[float, float], t: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """Whether low < sigma_t <= high, for each image; sigma = s / a."""
    sigma = jnp.exp(-0.5 * schedule.log_snr[t])
    return (interval[0] < sigma) & (sigma <= interval[1])
