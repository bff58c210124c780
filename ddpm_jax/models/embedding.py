"""The sinusoidal embedding of the timestep."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MAX_PERIOD = 10_000


def sinusoidal_embedding(t: Int[Array, " B"], dim: int) -> Float[Array, "B dim"]:
    """sin(t w_k) for k = 0 ... dim/2 - 1, then cos(t w_k), with w_k = 10000^(-k / (dim/2 - 1)). float32.

    The transformer's embedding (Vaswani et al. 2017, section 3.5) as Ho et al. (2020) lay it out: all sines first,
    frequencies divided by dim/2 - 1. An odd dim ends in a zero.

    Raises:
        ValueError: dim < 4, where the frequencies are not defined.
    """
    if dim < 4:
        raise ValueError(f"a timestep embedding needs 4 channels or more, not {dim}")
    half = dim // 2
    frequencies = np.exp(-math.log(MAX_PERIOD) * np.arange(half) / (half - 1)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))
