"""Where the networks of two papers differ; blocks, channels and the names of parameters are the same."""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, Float

from ddpm_jax.models.convolution import Padding
from ddpm_jax.models.embedding import cosine_embedding, sinusoidal_embedding


@dataclasses.dataclass(frozen=True)
class Style:
    """How a network tells its blocks the time, pads, normalises and starts."""

    embed_time: Callable[[Float[Array, " B"], int], Float[Array, "B dim"]]
    """The function (t, dim) -> embedding."""
    scale_and_shift: bool
    """Whether time scales and shifts what a block's second norm gives; otherwise it is added in front of that norm."""
    thousand_steps: bool
    """Whether time runs over 1000 steps for the network whatever T is."""
    downsample_padding: Padding
    """What the convolutions of stride 2 put around an image."""
    norm_eps: float
    """GroupNorm's epsilon."""
    zero: float
    """Scale of the initial weights of the layers that end a block, an attention layer, and the network."""


DDPM = Style(
    embed_time=sinusoidal_embedding,
    scale_and_shift=False,
    thousand_steps=False,
    downsample_padding=((0, 1), (0, 1)),  # right and bottom only, as TensorFlow's SAME
    norm_eps=1e-6,
    zero=1e-10,
)
"""Ho et al. (2020), appendix B, as their code has it."""

IMPROVED = Style(
    embed_time=cosine_embedding,
    scale_and_shift=True,
    thousand_steps=True,
    downsample_padding=((1, 1), (1, 1)),
    norm_eps=1e-5,
    zero=0.0,
)
"""Nichol & Dhariwal (2021), section 3.4 and appendix A, as their code has it.

Differs from it: the layers that don't start at zero start as Ho et al.'s do.
"""

STYLES = {"ddpm": DDPM, "improved": IMPROVED}
"""The styles by their names in ModelConfig."""
