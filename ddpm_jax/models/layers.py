"""The pieces of Ho et al.'s UNet: residual block, attention, down- and upsampling, space-to-depth.

Images are [B, H, W, C] in the compute dtype; parameters are float32; the statistics of GroupNorm and of the softmax
are float32 whatever the compute dtype.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpm_jax.models.attention import attention_cpu
from ddpm_jax.models.convolution import Padding, conv_general_dilated_cpu
from ddpm_jax.models.normalization import group_norm_cpu

GROUP_NORM_EPS = 1e-6


def init_scale(scale: float = 1.0) -> Callable[..., Any]:
    """Ho et al.'s initialiser: uniform variance scaling by fan_avg. Their "zero" layers have scale 1e-10."""
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


ZERO = 1e-10


def on_cpu() -> bool:
    """Whether the layers' own programs for a CPU are used: the same parameters, and the same numbers up to rounding."""
    return jax.default_backend() == "cpu"


def conv3x3(
    features: int,
    dtype: Any,
    scale: float = 1.0,
    stride: int = 1,
    padding: Padding = ((1, 1), (1, 1)),
    name: str | None = None,
) -> nn.Conv:
    """A 3x3 convolution; by default one that keeps the resolution."""
    return nn.Conv(
        features, (3, 3), stride, padding, kernel_init=init_scale(scale), dtype=dtype, name=name,
        conv_general_dilated=conv_general_dilated_cpu if on_cpu() else None,
    )  # fmt: skip


def dense(features: int, dtype: Any, scale: float = 1.0, name: str | None = None) -> nn.Dense:
    """A linear map over the last axis; on images this is a 1x1 convolution."""
    return nn.Dense(
        features, kernel_init=init_scale(scale), dtype=dtype, name=name, dot_general=_dot_matrices if on_cpu() else None
    )


def _dot_matrices(lhs: Array, rhs: Array, dimensions: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` as `nn.Dense` calls it, by one product of matrices.

    On a CPU the gradient by the kernel is several times as quick: the compiler transposes what is summed over several axes.
    """
    return jnp.reshape(jax.lax.dot(lhs.reshape(-1, lhs.shape[-1]), rhs), (*lhs.shape[:-1], rhs.shape[-1]))


class GroupNorm(nn.Module):
    """GroupNorm, and SiLU after it unless silu is off.

    It has num_groups groups, or their greatest common divisor with the channels where that doesn't fit.
    """

    num_groups: int
    dtype: Any
    silu: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The normalised images."""
        channels = x.shape[-1]
        groups = math.gcd(self.num_groups, channels)
        if on_cpu() and x.dtype == jnp.float32:
            scale = jnp.asarray(self.param("scale", nn.initializers.ones, (channels,)))
            bias = jnp.asarray(self.param("bias", nn.initializers.zeros, (channels,)))
            return group_norm_cpu(jnp.asarray(x), scale, bias, groups, GROUP_NORM_EPS, self.silu)
        norm = nn.GroupNorm(groups, epsilon=GROUP_NORM_EPS, dtype=self.dtype)
        nn.share_scope(self, norm)
        return nn.silu(norm(x)) if self.silu else norm(x)


class ResBlock(nn.Module):
    """norm - silu - conv (+ time) - norm - silu - dropout - conv, added to its input."""

    features: int
    dropout: float
    num_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], temb: Float[Array, "B E"], deterministic: bool) -> Float[Array, "B H W F"]:
        """The block's output, for time embedding temb; dropout is off where deterministic."""
        h = GroupNorm(self.num_groups, self.dtype, name="norm1")(x)
        h = conv3x3(self.features, self.dtype, name="conv1")(h)
        h = h + dense(self.features, self.dtype, name="time")(nn.silu(temb))[:, None, None, :]
        h = GroupNorm(self.num_groups, self.dtype, name="norm2")(h)
        h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
        h = conv3x3(self.features, self.dtype, scale=ZERO, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, self.dtype, name="shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Single-head self-attention over the H W positions: softmax(q k^T / sqrt(C)) v, added to its input."""

    num_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The layer's output."""
        batch, height, width, channels = x.shape
        h = GroupNorm(self.num_groups, self.dtype, silu=False, name="norm")(x).reshape(batch, height * width, channels)
        q, k, v = (dense(channels, self.dtype, name=name)(h) for name in ("query", "key", "value"))
        if on_cpu() and q.dtype == jnp.float32:
            h = attention_cpu(q, k, v)
        else:
            logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(logits * channels**-0.5, axis=-1).astype(v.dtype)
            h = jnp.einsum("bqk,bkc->bqc", weights, v)
        h = dense(channels, self.dtype, scale=ZERO, name="out")(h)
        return x + h.reshape(x.shape)


def downsample(x: Float[Array, "B H W C"], dtype: Any, name: str) -> Float[Array, "B H2 W2 C"]:
    """A 3x3 convolution of stride 2, padded on the right and at the bottom only, as TensorFlow's SAME does."""
    return conv3x3(x.shape[-1], dtype, stride=2, padding=((0, 1), (0, 1)), name=name)(x)


def upsample(x: Float[Array, "B H W C"], dtype: Any, name: str) -> Float[Array, "B H2 W2 C"]:
    """Every pixel twice in both directions, then a 3x3 convolution."""
    return conv3x3(x.shape[-1], dtype, name=name)(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


def space_to_depth(x: Float[Array, "B H W C"], block: int) -> Float[Array, "B H2 W2 C2"]:
    """Each block x block patch of pixels becomes one pixel of block^2 C channels."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // block, block, width // block, block, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // block, width // block, block * block * channels)


def depth_to_space(x: Float[Array, "B H W C"], block: int) -> Float[Array, "B H2 W2 C2"]:
    """The inverse of space_to_depth."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, block, block, channels // block**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * block, width * block, channels // block**2)
