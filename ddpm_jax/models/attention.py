"""Attention for CPUs, a few images at a time, so that the B N^2 weights never leave the processor's cache.

    y = w v,   w = softmax(s),   s = q k^T / sqrt(C)

and, with dw = dy v^T and ds = w * (dw - sum over keys of w dw),

    dq = ds k / sqrt(C),   dk = ds^T q / sqrt(C),   dv = w^T dy

(Vaswani et al. 2017, Eq. 1). The gradient computes the weights again instead of storing them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

CACHE_BYTES = 2**22
"""What the weights of a part may take."""


@jax.custom_vjp
@jax.jit
def attention_cpu(q: Float[Array, "B N C"], k: Float[Array, "B N C"], v: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
    """y above; float32."""
    return _in_parts(lambda q, k, v: _weights(q, k) @ v, q, k, v)


def _forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return attention_cpu(q, k, v), (q, k, v)


@jax.jit
def _backward(residuals: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, Array]:
    def gradients(q: Array, k: Array, v: Array, dy: Array) -> tuple[Array, Array, Array]:
        w = _weights(q, k)
        dw = dy @ v.mT
        ds = w * (dw - jnp.sum(w * dw, axis=-1, keepdims=True)) * q.shape[-1] ** -0.5
        return ds @ k, ds.mT @ q, w.mT @ dy

    return _in_parts(gradients, *residuals, dy)


attention_cpu.defvjp(_forward, _backward)


def _weights(q: Float[Array, "B N C"], k: Float[Array, "B N C"]) -> Float[Array, "B N N"]:
    # q is scaled, not the product: a compiler may fuse scaling and subtraction of the largest, which it has rounded otherwise.
    return jax.nn.softmax((q * q.shape[-1] ** -0.5) @ k.mT, axis=-1)


def _in_parts(function: Callable[..., PyTree], *arrays: Float[Array, "B N C"]) -> PyTree:
    """function(*arrays), a few images at a time; every part has its share of each device's images."""
    batch, length, _ = arrays[0].shape
    fitting = CACHE_BYTES // (length * length * arrays[0].dtype.itemsize)
    parts = next(n for n in range(1, batch + 1) if batch % n == 0 and (batch // n <= fitting or n == batch))
    if parts == 1:
        return function(*arrays)
    pieces = [array.reshape(-1, parts, *array.shape[1:]) for array in arrays]

    def fill(i: Array, outputs: PyTree) -> PyTree:
        values = function(*(piece[:, i] for piece in pieces))
        return jax.tree.map(lambda output, value: output.at[:, i].set(value), outputs, values)

    shapes = jax.eval_shape(function, *(piece[:, 0] for piece in pieces))
    empty = jax.tree.map(lambda value: jnp.zeros((value.shape[0], parts, *value.shape[1:]), value.dtype), shapes)
    outputs = jax.lax.fori_loop(0, parts, fill, empty)
    return jax.tree.map(lambda output: output.reshape(batch, *output.shape[2:]), outputs)
