"""The sinusoidal embedding of the timestep (Vaswani et al. 2017, section 3.5), in the two layouts of the DDPM papers."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

MAX_PERIOD = 10_000


def sinusoidal_embedding(t: Num[Array, " B"], dim: int) -> Float[Array, "B dim"]:
    """sin(t w_k) for k = 0 ... dim/2 - 1, then cos(t w_k), with w_k = 10000^(-k / (dim/2 - 1)). float32.

    Ho et al. (2020). An odd dim ends in a zero.

    Raises:
        ValueError: dim < 4, where the frequencies are not defined.
    """
    angles = _angles(t, dim, dim // 2 - 1)
    return _join(jnp.sin(angles), jnp.cos(angles), dim)


def cosine_embedding(t: Num[Array, " B"], dim: int) -> Float[Array, "B dim"]:
    """cos(t w_k) for k = 0 ... dim/2 - 1, then sin(t w_k), with w_k = 10000^(-k / (dim/2)). float32.

    Nichol & Dhariwal (2021), in their code. An odd dim ends in a zero.

    Raises:
        ValueError: dim < 4, as for the other layout.
    """
    angles = _angles(t, dim, dim // 2)
    return _join(jnp.cos(angles), jnp.sin(angles), dim)


def _angles(t: Num[Array, " B"], dim: int, divisor: int) -> Float[Array, "B half"]:
    if dim < 4:
        raise ValueError(f"a timestep embedding needs 4 channels or more, not {dim}")
    frequencies = np.exp(-math.log(MAX_PERIOD) * np.arange(dim // 2) / divisor).astype(np.float32)
    return t.astype(jnp.float32)[:, None] * frequencies[None, :]


def _join(first: Float[Array, "B half"], second: Float[Array, "B half"], dim: int) -> Float[Array, "B dim"]:
    return jnp.pad(jnp.concatenate([first, second], axis=1), ((0, 0), (0, dim % 2)))
