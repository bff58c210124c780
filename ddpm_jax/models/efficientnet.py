"""EfficientNet-lite0 (Tan & Le 2019, arXiv:1905.11946; the lite variant without squeeze and excitation), batch norm folded.

Depthwise convolutions are written as sums of shifted images: XLA's CPU compiler has no quick routine for them, and elsewhere
the sums are fused as well.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpm_jax.models.layers import dense


class Stage(NamedTuple):
    """Blocks one after the other, of which the first may halve the resolution."""

    num_blocks: int
    size: int
    stride: int
    expansion: int
    features: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class EfficientNetLite0(nn.Module):
    """A network images [B, H, W, 3] in [-1, 1] -> features [B, 1280], the mean over positions of its last layer."""

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B 1280"]:
        """The features."""
        h = nn.relu6(nn.Conv(32, (3, 3), 2, same_padding(images, 3, 2), name="stem")(images))
        index = 0
        for stage in STAGES:
            for repeat in range(stage.num_blocks):
                h = Block(stage, stage.stride if repeat == 0 else 1, name=f"block{index}")(h)
                index += 1
        return nn.relu6(dense(1280, jnp.float32, name="head")(h)).mean(axis=(1, 2))


class Block(nn.Module):
    """Expanded to more channels, convolved each by itself, projected; added to the input where the shape is the same."""

    stage: Stage
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        """The features."""
        h, width = x, x.shape[-1] * self.stage.expansion
        if self.stage.expansion > 1:
            h = nn.relu6(dense(width, jnp.float32, name="expand")(h))
        h = nn.relu6(Depthwise(self.stage.size, self.stride, name="depthwise")(h))
        h = dense(self.stage.features, jnp.float32, name="project")(h)
        return x + h if x.shape == h.shape else h


class Depthwise(nn.Module):
    """A convolution of every channel by itself; parameters are kernel [K, K, 1, C] and bias."""

    size: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
        """The features."""
        channels, size, stride = x.shape[-1], self.size, self.stride
        kernel: Any = self.param("kernel", nn.initializers.lecun_normal(), (size, size, 1, channels))
        bias: Any = self.param("bias", nn.initializers.zeros, (channels,))
        padded = jnp.pad(x, ((0, 0), *same_padding(x, size, stride), (0, 0)))
        rows, columns = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
        total = jnp.zeros((len(x), rows, columns, channels), x.dtype)
        for i in range(size):
            for j in range(size):
                end = (len(x), i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1, channels)
                shifted = jax.lax.slice(padded, (0, i, j, 0), end, (1, stride, stride, 1))
                total += shifted * kernel[i, j].reshape(1, 1, 1, channels)
        return total + bias.reshape(1, 1, 1, channels)


def same_padding(x: Float[Array, "B H W C"], size: int, stride: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """TensorFlow's padding: outputs are as many as the stride goes into the input; what is odd is at the end."""
    pads = [max((-(-length // stride) - 1) * stride + size - length, 0) for length in x.shape[1:3]]
    top, left = (pad // 2 for pad in pads)
    return (top, pads[0] - top), (left, pads[1] - left)
