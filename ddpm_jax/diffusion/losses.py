"""Training objectives: the simple loss and its weights, the variational bound, and the two together.

    L_simple = E_{t, x0, eps} w_t || target - network(xt, t) ||^2,   xt = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps
    L_vlb    = E_{t, x0, eps} T L_t,   L_t = KL(q(x_{t-1} | xt, x0) || p(x_{t-1} | xt)), or the decoder's term at t = 0
    L_hybrid = L_simple + 0.001 L_vlb,   whose second part trains the variance alone

L_simple is Eq. 14 of Ho et al. (2020) for target = eps; the mean over pixels and channels stands in for the sum, as in their
code. L_vlb, in bits per dimension, and L_hybrid are those of Nichol & Dhariwal (2021), arXiv:2102.09672, section 3.1 and
their code. With one prediction seen as x0, eps or v, the squared errors are

    |x0 error|^2,   |eps error|^2 = snr |x0 error|^2,   |v error|^2 = (snr + 1) |x0 error|^2               (1)
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.bound import vlb_terms
from ddpm_jax.diffusion.process import NetworkFn, Prediction, Variance, make_denoiser, predict_v, q_sample
from ddpm_jax.diffusion.schedule import Schedule

Loss = Literal["simple", "vlb", "hybrid"]
LossWeight = Literal["constant", "min_snr", "truncated_snr"]

VLB_SHARE = 0.001  # lambda of Nichol & Dhariwal (2021), section 3.1.


def simple_loss(
    schedule: Schedule,
    network_fn: NetworkFn,
    x0: Float[Array, "B *image"],
    t: Int[Array, " B"],
    eps: Float[Array, "B *image"],
    prediction: Prediction = "eps",
    weight: Float[Array, " T"] | None = None,
) -> Float[Array, " B"]:
    """Squared error of the network's output for each image, averaged over its pixels and channels; see above.

    Args:
        schedule: T steps.
        network_fn: the network with its weights.
        x0: clean images in [-1, 1].
        t: timesteps 0 ... T-1.
        eps: standard normal noise.
        prediction: what the network's output means: "eps", "x0" or "v".
        weight: w_t, see loss_weight; None: 1.
    """
    xt = q_sample(schedule, x0, t, eps)
    return _squared_error(schedule, network_fn(xt, t), x0, xt, t, eps, prediction, weight)


def vlb_loss(
    schedule: Schedule,
    network_fn: NetworkFn,
    x0: Float[Array, "B *image"],
    t: Int[Array, " B"],
    eps: Float[Array, "B *image"],
    prediction: Prediction,
    variance: Variance,
) -> Float[Array, " B"]:
    """T times the bound's term of t for each image: over uniform t, its mean is the bound but for L_T, in bits per dimension.

    The arguments are those of simple_loss; x0 holds 256 grey levels, and `variance` is that of p, see p_sample.
    """
    denoiser = make_denoiser(schedule, network_fn, prediction, clip=False)
    xt = q_sample(schedule, x0, t, eps)
    return schedule.num_steps * vlb_terms(schedule, denoiser, x0, xt, t, variance)


def hybrid_loss(
    schedule: Schedule,
    network_fn: NetworkFn,
    x0: Float[Array, "B *image"],
    t: Int[Array, " B"],
    eps: Float[Array, "B *image"],
    prediction: Prediction = "eps",
    weight: Float[Array, " T"] | None = None,
) -> Float[Array, " B"]:
    """simple_loss + 0.001 vlb_loss of a learned variance, where the bound's gradient reaches the variance alone.

    Raises:
        ValueError: a network that tells no variance.
    """
    xt = q_sample(schedule, x0, t, eps)
    output = network_fn(xt, t)
    if output.shape[-1] != 2 * x0.shape[-1]:
        raise ValueError(f"the hybrid loss needs a network of {2 * x0.shape[-1]} output channels, not {output.shape[-1]}")
    output, place = jnp.split(output, 2, axis=-1)
    told = jnp.concatenate([jax.lax.stop_gradient(output), place], axis=-1)
    bound = vlb_loss(schedule, lambda xt, t: told, x0, t, eps, prediction, "learned_range")
    return _squared_error(schedule, output, x0, xt, t, eps, prediction, weight) + VLB_SHARE * bound


def loss_weight(schedule: Schedule, kind: LossWeight, prediction: Prediction, gamma: float = 5.0) -> Float[Array, " T"]:
    """w_t of simple_loss for a network that predicts eps, x0 or v.

    "constant": 1 for each of the three, which by Eq. 1 are three different objectives. The others are one objective,
    whatever is predicted: the error of x0 has the weight

    "min_snr": min(snr, gamma), Hang et al. (2023), arXiv:2303.09556.
    "truncated_snr": max(snr, 1), Salimans & Ho (2022), arXiv:2202.00512, section 4.

    Where snr = 0, at the end of a schedule of zero terminal SNR, min_snr is 0, and a weight of eps is not a number.
    """
    snr = jnp.exp(schedule.log_snr)
    if kind == "constant":
        return jnp.ones_like(snr)
    if kind not in ("min_snr", "truncated_snr"):
        raise ValueError(f"unknown weight {kind!r}: choose constant, min_snr or truncated_snr")
    of_x0 = jnp.minimum(snr, gamma) if kind == "min_snr" else jnp.maximum(snr, 1.0)
    return of_x0 / {"x0": jnp.ones_like(snr), "eps": snr, "v": snr + 1.0}[prediction]


def _squared_error(
    schedule: Schedule,
    output: Float[Array, "B *image"],
    x0: Float[Array, "B *image"],
    xt: Float[Array, "B *image"],
    t: Int[Array, " B"],
    eps: Float[Array, "B *image"],
    prediction: str,
    weight: Float[Array, " T"] | None,
) -> Float[Array, " B"]:
    if prediction == "eps":
        target = eps
    elif prediction == "x0":
        target = x0
    elif prediction == "v":
        target = predict_v(schedule, xt, t, x0, "x0")
    else:
        raise ValueError(f"unknown prediction {prediction!r}: choose eps, x0 or v")
    error = jnp.mean(jnp.square(target - output), axis=tuple(range(1, x0.ndim)))
    return error if weight is None else weight[t] * error
