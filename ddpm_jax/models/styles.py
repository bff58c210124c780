"""Where the networks of two papers differ; blocks, channels and the names of parameters are the same."""

import dataclasses
from typing import Any

from ddpm_jax.models.convolution import Padding


@dataclasses.dataclass(frozen=True)
class Style:
    """How a network tells its blocks the time, pads, normalises and starts."""

    cos_first: bool
    """Whether the embedding of time has its cosines in front of its sines."""
    frequency_shift: int
    """What is taken from half its channels in the exponents of its frequencies."""
    scale_and_shift: bool
    """Whether time scales and shifts what a block's second norm gives; otherwise it is added in front of that norm."""
    thousand_steps: bool
    """Whether time runs over 1000 steps for the network whatever T is."""
    pad_all_sides: bool
    """Whether the convolutions of stride 2 pad an image on all sides; otherwise on the right and at the bottom only."""
    norm_eps: float
    """GroupNorm's epsilon."""
    zero: float
    """Scale of the initial weights of the layers that end a block, an attention layer, and the network."""

    @property
    def downsample_padding(self) -> Padding:
        """What the convolutions of stride 2 put around an image; (0, 1) is TensorFlow's SAME."""
        first = 1 if self.pad_all_sides else 0
        return (first, 1), (first, 1)


DDPM = Style(
    cos_first=False,
    frequency_shift=1,
    scale_and_shift=False,
    thousand_steps=False,
    pad_all_sides=False,
    norm_eps=1e-6,
    zero=1e-10,
)
"""Ho et al. (2020), appendix B, as their code has it."""

IMPROVED = Style(
    cos_first=True,
    frequency_shift=0,
    scale_and_shift=True,
    thousand_steps=True,
    pad_all_sides=True,
    norm_eps=1e-5,
    zero=0.0,
)
"""Nichol & Dhariwal (2021), section 3.4 and appendix A, as their code has it.

Differs from it: the layers that don't start at zero start as Ho et al.'s do.
"""

STYLES = {"ddpm": DDPM, "improved": IMPROVED}
"""The styles by their names in ModelConfig."""

DETAILS = ("cos_first", "frequency_shift", "scale_and_shift", "pad_all_sides", "norm_eps")
"""What a config may have otherwise than its style; fields of ModelConfig by the same names."""


def find_style(settings: Any) -> Style:
    """The style of a ModelConfig or a UNet, with those details in it that are not None there."""
    own = {name: getattr(settings, name) for name in DETAILS if getattr(settings, name) is not None}
    return dataclasses.replace(STYLES[settings.style], **own)
