"""The pieces of the UNet: residual block, attention, down- and upsampling, space-to-depth.

Images are [B, H, W, C] in the compute dtype; parameters are float32; the statistics of GroupNorm and of the softmax
are float32 whatever the compute dtype.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ddpm_jax.models.attention import attention_cpu
from ddpm_jax.models.convolution import Padding, conv_general_dilated_cpu
from ddpm_jax.models.normalization import group_norm_cpu
from ddpm_jax.models.styles import DDPM, Style


def init_scale(scale: float = 1.0) -> Callable[..., Any]:
    """Ho et al.'s initialiser: uniform variance scaling by fan_avg."""
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


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
    eps: float = DDPM.norm_eps

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The normalised images."""
        channels = x.shape[-1]
        groups = math.gcd(self.num_groups, channels)
        if on_cpu() and x.dtype == jnp.float32:
            scale = jnp.asarray(self.param("scale", nn.initializers.ones, (channels,)))
            bias = jnp.asarray(self.param("bias", nn.initializers.zeros, (channels,)))
            return group_norm_cpu(jnp.asarray(x), scale, bias, groups, self.eps, self.silu)
        norm = nn.GroupNorm(groups, epsilon=self.eps, dtype=self.dtype)
        nn.share_scope(self, norm)
        return nn.silu(norm(x)) if self.silu else norm(x)


class Dropout(nn.Module):
    """Each value 0 with probability `rate`, and otherwise divided by 1 - rate; the rate is rounded to a multiple of 2^-16."""

    rate: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *rest"], deterministic: bool, rows: Int[Array, " B"] | None = None
    ) -> Float[Array, "B *rest"]:
        """x with some values dropped, unless deterministic; rows: see `keep_mask`, by default 0 ... B - 1."""
        dropped = min(round(self.rate * 2**16), 2**16 - 1)
        if deterministic or not dropped:
            return x
        rows = jnp.arange(x.shape[0]) if rows is None else rows
        keep = keep_mask(self.make_rng("dropout"), rows, x.shape[1:], dropped)
        return jnp.where(keep, x * (2**16 / (2**16 - dropped)), jnp.zeros_like(x))


def keep_mask(key: Key[Array, ""], rows: Int[Array, " B"], shape: tuple[int, ...], dropped: int) -> Bool[Array, "B *rest"]:
    """True with probability 1 - dropped / 2^16, independently; the mask of a row follows from fold_in(key, its number) alone.

    So a batch has the same masks however it is split among devices or in time. 16 random bits decide on each value, half of
    what a uniform float32 takes.
    """
    count = math.prod(shape)

    def one(row: Int[Array, ""]) -> Bool[Array, " N"]:
        pairs = jax.random.bits(jax.random.fold_in(key, row), (-(-count // 2),), jnp.uint32)
        halves = pairs[None] >> jnp.array([[0], [16]], jnp.uint32) & 0xFFFF
        return halves.reshape(-1)[:count] >= dropped

    return jax.vmap(one)(rows).reshape(-1, *shape)


class ResBlock(nn.Module):
    """norm - silu - conv (+ time) - norm (* and + time) - silu - dropout - conv, added to its input.

    Time comes in at one of the two places: added in front of the second norm, h + time, or as scale and shift behind it,
    (1 + scale) norm(h) + shift, by the style.
    """

    features: int
    dropout: float
    num_groups: int
    dtype: Any
    style: Style = DDPM

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        temb: Float[Array, "B E"],
        deterministic: bool,
        rows: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B H W F"]:
        """The block's output, for time embedding temb; dropout is off where deterministic, and tells images by their rows."""
        eps, modulated = self.style.norm_eps, self.style.scale_and_shift
        h = GroupNorm(self.num_groups, self.dtype, eps=eps, name="norm1")(x)
        h = conv3x3(self.features, self.dtype, name="conv1")(h)
        time = dense(self.features * (2 if modulated else 1), self.dtype, name="time")(nn.silu(temb))[:, None, None, :]
        norm2 = GroupNorm(self.num_groups, self.dtype, silu=not modulated, eps=eps, name="norm2")
        if modulated:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = nn.silu((1 + scale) * norm2(h) + shift)
        else:
            h = norm2(h + time)
        h = Dropout(self.dropout)(h, deterministic, rows)
        h = conv3x3(self.features, self.dtype, scale=self.style.zero, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, self.dtype, name="shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over the H W positions, added to its input.

    Each head does softmax(q k^T / sqrt(D)) v with D = C / num_heads channels of its own: the first D of query, key and value
    are the first head's, and so on.
    """

    num_groups: int
    dtype: Any
    num_heads: int = 1
    style: Style = DDPM

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The layer's output. Raises ValueError where the channels don't split into the heads."""
        batch, height, width, channels = x.shape
        if channels % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads} doesn't divide the {channels} channels of an attention layer")
        h = GroupNorm(self.num_groups, self.dtype, silu=False, eps=self.style.norm_eps, name="norm")(x)
        h = h.reshape(batch, height * width, channels)
        q, k, v = (split_heads(dense(channels, self.dtype, name=name)(h), self.num_heads) for name in ("query", "key", "value"))
        if on_cpu() and q.dtype == jnp.float32:
            h = attention_cpu(q, k, v)
        else:
            logits = jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
            h = jnp.einsum("bqk,bkd->bqd", weights, v)
        h = dense(channels, self.dtype, scale=self.style.zero, name="out")(merge_heads(h, self.num_heads))
        return x + h.reshape(x.shape)


def split_heads(h: Float[Array, "B N C"], num_heads: int) -> Float[Array, "B2 N D"]:
    """Each head as an image of its own: B2 = B num_heads, D = C / num_heads."""
    batch, length, channels = h.shape
    h = h.reshape(batch, length, num_heads, channels // num_heads)
    return h.swapaxes(1, 2).reshape(batch * num_heads, length, channels // num_heads)


def merge_heads(h: Float[Array, "B2 N D"], num_heads: int) -> Float[Array, "B N C"]:
    """The inverse of split_heads."""
    images, length, channels = h.shape
    h = h.reshape(images // num_heads, num_heads, length, channels)
    return h.swapaxes(1, 2).reshape(images // num_heads, length, num_heads * channels)


def downsample(x: Float[Array, "B H W C"], dtype: Any, name: str, style: Style = DDPM) -> Float[Array, "B H2 W2 C"]:
    """A 3x3 convolution of stride 2."""
    return conv3x3(x.shape[-1], dtype, stride=2, padding=style.downsample_padding, name=name)(x)


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
