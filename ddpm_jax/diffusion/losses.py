"""Training objectives: how t is drawn, and the simple loss.

    L_simple = E_{t, x0, eps} || target - network(xt, t) ||^2,   xt = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps

Eq. 14 of Ho et al. (2020) for target = eps; the mean over pixels and channels stands in for the sum, as in their code.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.process import AnyKey, NetworkFn, Prediction, predict_v, q_sample
from ddpm_jax.diffusion.schedule import Schedule


def draw_timesteps(
    key: AnyKey, batch_size: int, num_steps: int, method: Literal["uniform", "stratified"] = "uniform"
) -> Int[Array, " B"]:
    """Timesteps int32 [B], each uniform on 0 ... T-1.

    "uniform" draws them independently, line 3 of Algorithm 1. "stratified" draws t_i from the i-th of B equal parts of
    the range, so that a batch covers all noise levels: the same expectation with less variance.
    """
    if method == "uniform":
        return jax.random.randint(key, (batch_size,), 0, num_steps)
    if method != "stratified":
        raise ValueError(f"unknown way to draw timesteps {method!r}: choose uniform or stratified")
    u = (jnp.arange(batch_size, dtype=jnp.float32) + jax.random.uniform(key, (batch_size,))) / batch_size
    return jnp.minimum((u * num_steps).astype(jnp.int32), num_steps - 1)


def simple_loss(
    schedule: Schedule,
    network_fn: NetworkFn,
    x0: Float[Array, "B *image"],
    t: Int[Array, " B"],
    eps: Float[Array, "B *image"],
    prediction: Prediction = "eps",
) -> Float[Array, " B"]:
    """Squared error of the network's output for each image, averaged over its pixels and channels; see above."""
    xt = q_sample(schedule, x0, t, eps)
    if prediction == "eps":
        target = eps
    elif prediction == "x0":
        target = x0
    elif prediction == "v":
        target = predict_v(schedule, xt, t, x0, "x0")
    else:
        raise ValueError(f"unknown prediction {prediction!r}: choose eps, x0 or v")
    return jnp.mean(jnp.square(target - network_fn(xt, t)), axis=tuple(range(1, x0.ndim)))
