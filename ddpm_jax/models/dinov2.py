"""DINOv2's vision transformer (Oquab et al. 2023, arXiv:2304.07193), ViT-S, B or L with patches of 14x14 pixels."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PATCH = 14
HEAD_CHANNELS = 64


class DINOv2(nn.Module):
    """A network images [B, H, W, 3], normalised, -> features [B, F]: those of the class token after the last norm."""

    features: int = 1024
    """Channels F; 1024 in ViT-L."""
    num_blocks: int = 24
    """Transformer blocks; 24 in ViT-L."""

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B F"]:
        """The features; H and W are multiples of 14."""
        patches = nn.Conv(self.features, (PATCH, PATCH), PATCH, "VALID", name="patch_embed")(images)
        tokens = patches.reshape(len(images), -1, self.features)
        class_token: Any = self.param("cls_token", nn.initializers.zeros, (1, 1, self.features))
        positions: Any = self.param("pos_embed", nn.initializers.zeros, (1, tokens.shape[1] + 1, self.features))
        first = jnp.broadcast_to(class_token, (len(images), 1, self.features))
        h = jnp.concatenate([first, tokens], axis=1) + positions
        for index in range(self.num_blocks):
            h = Block(name=f"blocks_{index}")(h)
        return nn.LayerNorm(1e-6, name="norm")(h)[:, 0]


class Block(nn.Module):
    """Attention and a network of two layers, each behind a norm, scaled by channel, and added."""

    @nn.compact
    def __call__(self, x: Float[Array, "B N F"]) -> Float[Array, "B N F"]:
        """The tokens."""
        width = x.shape[-1]
        scales: list[Any] = [self.param(name, nn.initializers.ones, (1, 1, width)) for name in ("ls1", "ls2")]
        h = nn.Dense(3 * width, name="qkv")(nn.LayerNorm(1e-6, name="norm1")(x))
        query, key, value = jnp.moveaxis(h.reshape(*h.shape[:2], 3, -1, HEAD_CHANNELS), 2, 0)
        weights = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", query * HEAD_CHANNELS**-0.5, key))
        h = jnp.einsum("bhnm,bmhd->bnhd", weights, value).reshape(x.shape)
        x = x + scales[0] * nn.Dense(width, name="proj")(h)
        h = nn.Dense(4 * width, name="fc1")(nn.LayerNorm(1e-6, name="norm2")(x))
        return x + scales[1] * nn.Dense(width, name="fc2")(nn.gelu(h, approximate=False))
