"""Group normalisation followed by SiLU for CPUs, with a gradient of its own; elsewhere XLA's fusion is left alone.

    h = x a + c,   a = scale / std,   c = bias - mean a,   y = h sigmoid(h)

with mean and std over the pixels and the channels of a group (Wu & He 2018, arXiv:1803.08494). Two things make it quick on
a CPU: sums go over the pixels of each channel first, in one pass, and then over the few channels of a group; and the
gradient needs x alone, in two passes, where autodiff stores and reads five arrays of the size of x.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm_cpu(
    x: Float[Array, "B H W C"], scale: Float[Array, " C"], bias: Float[Array, " C"], num_groups: int, eps: float, silu: bool
) -> Float[Array, "B H W C"]:
    """y above, or h where silu is off; float32."""
    return _forward(x, scale, bias, num_groups, eps, silu)[0]


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _forward(x: Array, scale: Array, bias: Array, num_groups: int, eps: float, silu: bool) -> tuple[Array, tuple[Array, ...]]:
    mean, rstd = _statistics(x, num_groups, eps)
    h = _normalise(x, scale, bias, mean, rstd)
    return (h * jax.nn.sigmoid(h) if silu else h), (x, scale, bias, mean, rstd)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(num_groups: int, eps: float, silu: bool, residuals: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    """dx = rstd (dh scale - mean of it - xhat times mean of it times xhat), means over the group; xhat = (x - mean) rstd."""
    x, scale, bias, mean, rstd = residuals
    dh = dy
    if silu:
        h = _normalise(x, scale, bias, mean, rstd)
        gate = 0.5 + 0.5 * jnp.tanh(0.5 * h)  # the sigmoid; written as in the forward pass, it would be stored since then
        dh = dy * (gate * (1 + h * (1 - gate)))
    dh_sum = jnp.sum(dh, axis=(1, 2))  # [B, C], as all that follows
    dh_xhat_sum = (jnp.sum(dh * x, axis=(1, 2)) - mean * dh_sum) * rstd
    shift = _group_mean(dh_sum * scale[None], x.shape, num_groups)
    slope = _group_mean(dh_xhat_sum * scale[None], x.shape, num_groups) * rstd
    dx = dh * _spread(rstd * scale[None]) - x * _spread(rstd * slope) + _spread(rstd * (slope * mean - shift))
    return dx, jnp.sum(dh_xhat_sum, axis=0), jnp.sum(dh_sum, axis=0)


group_norm_cpu.defvjp(_forward, _backward)


def _statistics(x: Array, num_groups: int, eps: float) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Mean and 1 / std of the group that each channel belongs to; the variance is E[x^2] - E[x]^2, as in Flax."""
    mean = _group_mean(jnp.sum(x, axis=(1, 2)), x.shape, num_groups)
    square = _group_mean(jnp.sum(jnp.square(x), axis=(1, 2)), x.shape, num_groups)
    return mean, jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + eps)


def _group_mean(sums: Float[Array, "B C"], shape: tuple[int, ...], num_groups: int) -> Float[Array, "B C"]:
    """From the sums over each channel's pixels, the mean over its group."""
    batch, height, width, channels = shape
    size = channels // num_groups
    means = jnp.sum(sums.reshape(batch, num_groups, size), axis=2) / (height * width * size)
    return jnp.repeat(means, size, axis=1)


def _normalise(x: Array, scale: Array, bias: Array, mean: Array, rstd: Array) -> Array:
    a = rstd * scale[None]
    return x * _spread(a) + _spread(bias[None] - mean * a)


def _spread(values: Float[Array, "B C"]) -> Float[Array, "B 1 1 C"]:
    return values[:, None, None, :]
