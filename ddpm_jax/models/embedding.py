"""The sinusoidal embedding of the timestep (Vaswani et al. 2017, section 3.5), in the layouts of the DDPM papers."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

MAX_PERIOD = 10_000


def sinusoidal_embedding(
    t: Num[Array, " B"], dim: int, cos_first: bool = False, frequency_shift: int = 1
) -> Float[Array, "B dim"]:
    """sin(t w_k) for k = 0 ... dim/2 - 1, then cos(t w_k), with w_k = 10000^(-k / (dim/2 - frequency_shift)). float32.

    That is Ho et al.'s (2020), with a shift of 1; Nichol & Dhariwal (2021), in their code, have the cosines first and no
    shift. An odd dim ends in a zero.

    Raises:
        ValueError: dim < 4, or a shift that leaves no frequencies.
    """
    half = dim // 2
    if dim < 4 or frequency_shift >= half:
        least = max(4, 2 * frequency_shift + 2)
        raise ValueError(f"a timestep embedding needs {least} channels or more, not {dim}")
    frequencies = np.exp(-math.log(MAX_PERIOD) * np.arange(half) / (half - frequency_shift)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    halves = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(halves[::-1] if cos_first else halves, axis=1), ((0, 0), (0, dim % 2)))
