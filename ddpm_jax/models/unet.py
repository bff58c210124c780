"""The UNet of Ho et al. (2020), appendix B, as their code builds it, and that of Nichol & Dhariwal (2021)."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.config import ModelConfig, ModelStyle
from ddpm_jax.models.embedding import sinusoidal_embedding
from ddpm_jax.models.layers import (
    Attention,
    GroupNorm,
    ResBlock,
    conv3x3,
    dense,
    depth_to_space,
    downsample,
    space_to_depth,
    upsample,
)
from ddpm_jax.models.styles import find_style


class UNet(nn.Module):
    """A network (xt [B, H, W, C], t [B]) -> output [B, H, W, out_channels] that predicts eps, x0 or v.

    Level i works at 1/2^i of the resolution with channels * multipliers[i] channels: num_res_blocks residual blocks on
    the way down, one more on the way up, joined by skip connections. Height and width must be multiples of
    space_to_depth * 2^(levels - 1).
    """

    out_channels: int = 3
    """Channels of the output."""
    channels: int = 128
    """Channels of the first level, 4 or more; the time embedding has 4 times as many."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level, as multiples of `channels`."""
    num_res_blocks: int = 2
    """Residual blocks of each level on the way down."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Heights of feature maps, in pixels, at which every block is followed by attention."""
    middle_attention: bool = True
    """Whether the middle has attention, whatever its height."""
    num_heads: int = 1
    """Heads of each attention layer; they share its channels."""
    head_channels: int | None = None
    """Channels of each head, for a number of heads that follows from the layer's channels; None: num_heads everywhere."""
    dropout: float = 0.1
    """Dropout rate of the residual blocks, in training."""
    num_groups: int = 32
    """Groups of GroupNorm; their greatest common divisor with the channels where those are no multiple of it."""
    num_classes: int | None = None
    """Number of class labels; None for an unconditional network."""
    style: ModelStyle = "ddpm"
    """Whose network it is in its details, see `ddpm_jax.models.styles`; the next five change single ones where not None."""
    cos_first: bool | None = None
    """Whether the embedding of t has its cosines in front of its sines."""
    frequency_shift: int | None = None
    """Taken from half its channels in the exponents of its frequencies."""
    scale_and_shift: bool | None = None
    """Whether time scales and shifts what a block's second norm gives, instead of being added in front of it."""
    pad_all_sides: bool | None = None
    """Whether convolutions of stride 2 pad on all sides, instead of on the right and at the bottom only."""
    norm_eps: float | None = None
    """GroupNorm's epsilon."""
    time_scale: float = 1.0
    """Factor on t in front of its embedding."""
    space_to_depth: int = 1
    """Edge of the patches that become single pixels in front of the network, and patches again behind it."""
    remat: bool = False
    """Whether the backward pass recomputes each block, which saves memory and costs time."""
    dtype: Any = jnp.float32
    """Compute dtype, float32 or bfloat16; parameters and the output stay float32."""

    @nn.compact
    def __call__(
        self,
        xt: Float[Array, "B H W C"],
        t: Int[Array, " B"],
        labels: Int[Array, " B"] | None = None,
        train: bool = False,
        rows: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B H W O"]:
        """The network's output, float32.

        Args:
            xt: noisy images.
            t: timesteps.
            labels: class indices 0 ... num_classes - 1, num_classes to leave an image's class open, or None to leave all open.
            train: whether dropout is on; it needs rngs={"dropout": key}.
            rows: numbers of the images, by which dropout tells them apart, where they are some of a larger batch; by default
                0 ... B - 1.

        Raises:
            ValueError: a resolution that the levels can't divide, channels that the heads can't divide, or labels for a
                network without classes.
        """
        self.check_resolution(xt.shape[1], xt.shape[2])
        style = find_style(self)
        res_block = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        attention = nn.remat(Attention) if self.remat else Attention
        temb = self.embed(t, labels)

        def res(h: Array, level: int, name: str) -> Array:
            features = self.channels * self.multipliers[level]
            return res_block(features, self.dropout, self.num_groups, self.dtype, style, name=name)(h, temb, not train, rows)

        def attend(h: Array, name: str) -> Array:
            return attention(self.num_groups, self.dtype, self.heads(h.shape[-1]), style, name=name)(h)

        def block(h: Array, level: int, name: str) -> Array:
            h = res(h, level, name)
            return attend(h, f"{name}_attention") if h.shape[1] in self.attention_resolutions else h

        x = space_to_depth(xt.astype(self.dtype), self.space_to_depth)
        h = conv3x3(self.channels, self.dtype, name="conv_in")(x)
        skips = [h]
        last = len(self.multipliers) - 1
        for level in range(last + 1):
            for index in range(self.num_res_blocks):
                h = block(h, level, f"down{level}_block{index}")
                skips.append(h)
            if level < last:
                h = downsample(h, self.dtype, f"down{level}_downsample", style)
                skips.append(h)

        h = res(h, last, "middle_block0")
        h = attend(h, "middle_attention") if self.middle_attention else h
        h = res(h, last, "middle_block1")

        for level in reversed(range(last + 1)):
            for index in range(self.num_res_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), level, f"up{level}_block{index}")
            if level > 0:
                h = upsample(h, self.dtype, f"up{level}_upsample")

        h = GroupNorm(self.num_groups, self.dtype, eps=style.norm_eps, name="norm_out")(h)
        h = conv3x3(self.out_channels * self.space_to_depth**2, self.dtype, scale=style.zero, name="conv_out")(h)
        return depth_to_space(h, self.space_to_depth).astype(jnp.float32)

    def embed(self, t: Int[Array, " B"], labels: Int[Array, " B"] | None) -> Float[Array, "B E"]:
        """The embedding of timestep and class, E = 4 channels: dense - silu - dense, plus one row for each class."""
        width = 4 * self.channels
        style = find_style(self)
        time = self.time_scale * t.astype(jnp.float32)
        h = sinusoidal_embedding(time, self.channels, style.cos_first, style.frequency_shift).astype(self.dtype)
        h = nn.silu(dense(width, self.dtype, name="time1")(h))
        h = dense(width, self.dtype, name="time2")(h)
        if self.num_classes is None:
            if labels is not None:
                raise ValueError("labels were given to a network without classes: set num_classes")
            return h
        # Created even where no labels are given, so that the parameters don't depend on the first call.
        table = nn.Embed(self.num_classes, width, embedding_init=nn.initializers.normal(1.0), name="classes")
        labels = jnp.full(t.shape, self.num_classes, jnp.int32) if labels is None else labels
        rows = table(jnp.minimum(labels, self.num_classes - 1)).astype(self.dtype)
        return h + jnp.where((labels < self.num_classes)[:, None], rows, jnp.zeros_like(rows))

    def heads(self, channels: int) -> int:
        """Heads of an attention layer with that many channels. Raises ValueError where head_channels doesn't divide them."""
        if self.head_channels is None:
            return self.num_heads
        if channels % self.head_channels:
            raise ValueError(
                f"head_channels = {self.head_channels} doesn't divide the {channels} channels of an attention layer"
            )
        return channels // self.head_channels

    def check_resolution(self, height: int, width: int) -> None:
        """Raise ValueError unless every level's resolution is whole, and so is every attention layer's number of heads."""
        divisor = self.space_to_depth * 2 ** (len(self.multipliers) - 1)
        if height % divisor or width % divisor:
            raise ValueError(
                f"images of {height}x{width} pixels can't be halved {len(self.multipliers) - 1} times after "
                f"space_to_depth = {self.space_to_depth}: use multiples of {divisor}, or fewer multipliers"
            )
        for level, multiplier in enumerate(self.multipliers):
            size, last = height // self.space_to_depth // 2**level, level == len(self.multipliers) - 1
            if size in self.attention_resolutions or (last and self.middle_attention):
                self.heads(self.channels * multiplier)


def make_unet(config: ModelConfig, image_channels: int, learn_variance: bool = False, num_steps: int = 1000) -> UNet:
    """The network that a config describes.

    Args:
        config: its model section.
        image_channels: channels of the images; twice as many come out with learn_variance.
        learn_variance: whether the network tells its variance too.
        num_steps: T, for styles whose networks see t as a part of 1000 steps.
    """
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields["dtype"] = jnp.dtype(config.dtype)
    time_scale = 1000 / num_steps if find_style(config).thousand_steps else 1.0
    return UNet(out_channels=image_channels * (2 if learn_variance else 1), time_scale=time_scale, **fields)


def init_params(unet: UNet, seed: int, image_shape: tuple[int, int, int]) -> PyTree:
    """Freshly drawn weights for images of [H, W, C]; the same on any number of devices."""
    xt, t = jnp.zeros((1, *image_shape), jnp.float32), jnp.zeros((1,), jnp.int32)
    return unet.init(jax.random.key(seed), xt, t)["params"]


def num_params(params: PyTree) -> int:
    """Number of scalar parameters; shapes are enough."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(params))


def bind(
    unet: UNet,
    params: PyTree,
    labels: Int[Array, " B"] | None = None,
    dropout_key: Key[Array, ""] | None = None,
    rows: Int[Array, " B"] | None = None,
) -> Callable[[Float[Array, "B H W C"], Int[Array, " B"]], Float[Array, "B H W O"]]:
    """The network with its weights and labels as a function (xt, t) -> output.

    With a dropout key it is in training mode, for the images of these numbers in the batch, by default 0 ... B - 1.
    """

    def network_fn(xt: Float[Array, "B H W C"], t: Int[Array, " B"]) -> Float[Array, "B H W O"]:
        if dropout_key is None:
            return cast(Array, unet.apply({"params": params}, xt, t, labels))
        return cast(Array, unet.apply({"params": params}, xt, t, labels, True, rows, rngs={"dropout": dropout_key}))

    return network_fn
