"""Inception-v3 as FID uses it: the network of 2015, ported from TensorFlow, with batch norm folded into its convolutions.

It differs from the Inception-v3 of other libraries: average pools leave out what is padded, the last block has a maximum pool,
and there are 1008 classes. Modules are named as in the published weights, see evaluation/weights.py.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

Size = tuple[int, int]

SPATIAL_CHANNELS = 7  # of sFID's features: Nash et al. (2021) take as many as make about 2048 numbers


class InceptionOutputs(NamedTuple):
    """What metrics are made from."""

    pool: Float[Array, "B 2048"]
    """The last features, averaged over positions: FID's, KID's, and those of precision and recall."""
    spatial: Float[Array, "B 2023"]
    """Features of an inner layer at all of its 17x17 positions: sFID's."""
    logits: Float[Array, "B 1008"]
    """Of the classes, without bias: the Inception Score's."""


class Conv(nn.Module):
    """A convolution without padding, or one that keeps the size, and ReLU; its parameters are kernel and bias."""

    features: int
    size: Size = (1, 1)
    stride: int = 1
    same: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        """The features."""
        padding = "SAME" if self.same else "VALID"
        conv = nn.Conv(self.features, self.size, self.stride, padding)
        nn.share_scope(self, conv)
        return nn.relu(conv(x))


class BlockA(nn.Module):
    """35x35: branches of 1x1, 5x5 and two of 3x3, and an average pool."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W F"]:
        """The features of all branches."""
        narrow = Conv(64, name="branch1x1")(x)
        middle = Conv(64, (5, 5), name="branch5x5_2")(Conv(48, name="branch5x5_1")(x))
        wide = Conv(96, (3, 3), name="branch3x3dbl_2")(Conv(64, name="branch3x3dbl_1")(x))
        wide = Conv(96, (3, 3), name="branch3x3dbl_3")(wide)
        return jnp.concatenate([narrow, middle, wide, Conv(self.pool_features, name="branch_pool")(mean3x3(x))], axis=-1)


class BlockB(nn.Module):
    """35x35 to 17x17."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        """The features of all branches."""
        narrow = Conv(384, (3, 3), 2, same=False, name="branch3x3")(x)
        wide = Conv(96, (3, 3), name="branch3x3dbl_2")(Conv(64, name="branch3x3dbl_1")(x))
        wide = Conv(96, (3, 3), 2, same=False, name="branch3x3dbl_3")(wide)
        return jnp.concatenate([narrow, wide, halve(x)], axis=-1)


class BlockC(nn.Module):
    """17x17: branches of 1x1, 7x7 and twice 7x7, these in one dimension after the other, and an average pool."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B H W F"], Float[Array, "B H W 192"]]:
        """The features of all branches, and those of the first."""
        row, column, channels = (1, 7), (7, 1), self.channels
        narrow = Conv(192, name="branch1x1")(x)
        middle = Conv(channels, row, name="branch7x7_2")(Conv(channels, name="branch7x7_1")(x))
        middle = Conv(192, column, name="branch7x7_3")(middle)
        wide = Conv(channels, column, name="branch7x7dbl_2")(Conv(channels, name="branch7x7dbl_1")(x))
        wide = Conv(channels, column, name="branch7x7dbl_4")(Conv(channels, row, name="branch7x7dbl_3")(wide))
        wide = Conv(192, row, name="branch7x7dbl_5")(wide)
        return jnp.concatenate([narrow, middle, wide, Conv(192, name="branch_pool")(mean3x3(x))], axis=-1), narrow


class BlockD(nn.Module):
    """17x17 to 8x8."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        """The features of all branches."""
        narrow = Conv(320, (3, 3), 2, same=False, name="branch3x3_2")(Conv(192, name="branch3x3_1")(x))
        wide = Conv(192, (1, 7), name="branch7x7x3_2")(Conv(192, name="branch7x7x3_1")(x))
        wide = Conv(192, (7, 1), name="branch7x7x3_3")(wide)
        wide = Conv(192, (3, 3), 2, same=False, name="branch7x7x3_4")(wide)
        return jnp.concatenate([narrow, wide, halve(x)], axis=-1)


class BlockE(nn.Module):
    """8x8: branches that end in a row beside a column, and a pool, which is an average or a maximum."""

    max_pool: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W F"]:
        """The features of all branches."""
        row, column = (1, 3), (3, 1)
        narrow = Conv(320, name="branch1x1")(x)
        middle = Conv(384, name="branch3x3_1")(x)
        wide = Conv(384, (3, 3), name="branch3x3dbl_2")(Conv(448, name="branch3x3dbl_1")(x))
        ends = [
            Conv(384, row, name="branch3x3_2a")(middle),
            Conv(384, column, name="branch3x3_2b")(middle),
            Conv(384, row, name="branch3x3dbl_3a")(wide),
            Conv(384, column, name="branch3x3dbl_3b")(wide),
        ]
        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.max_pool else mean3x3(x)
        return jnp.concatenate([narrow, *ends, Conv(192, name="branch_pool")(pooled)], axis=-1)


class InceptionV3(nn.Module):
    """A network images [B, 299, 299, 3] in [-1, 1] -> the outputs that metrics are made from."""

    @nn.compact
    def __call__(self, images: Float[Array, "B 299 299 3"]) -> InceptionOutputs:
        """Pooled and spatial features, and logits."""
        h = Conv(32, (3, 3), 2, same=False, name="Conv2d_1a_3x3")(images)
        h = Conv(32, (3, 3), same=False, name="Conv2d_2a_3x3")(h)
        h = halve(Conv(64, (3, 3), name="Conv2d_2b_3x3")(h))
        h = Conv(80, name="Conv2d_3b_1x1")(h)
        h = halve(Conv(192, (3, 3), same=False, name="Conv2d_4a_3x3")(h))
        h = BlockA(32, name="Mixed_5b")(h)
        h = BlockA(64, name="Mixed_5c")(h)
        h = BlockA(64, name="Mixed_5d")(h)
        h = BlockB(name="Mixed_6a")(h)
        h, _ = BlockC(128, name="Mixed_6b")(h)
        h, _ = BlockC(160, name="Mixed_6c")(h)
        h, inner = BlockC(160, name="Mixed_6d")(h)  # "mixed_6" in TensorFlow's count from 0
        h, _ = BlockC(192, name="Mixed_6e")(h)
        h = BlockD(name="Mixed_7a")(h)
        h = BlockE(max_pool=False, name="Mixed_7b")(h)
        h = BlockE(max_pool=True, name="Mixed_7c")(h)
        pool = h.mean(axis=(1, 2))
        spatial = inner[..., :SPATIAL_CHANNELS].reshape(len(inner), -1)
        return InceptionOutputs(pool, spatial, nn.Dense(1008, use_bias=False, name="fc")(pool))


def mean3x3(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """The mean over 3x3 pixels, of those that are in the image."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def halve(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """The largest of 3x3 pixels, two apart."""
    return nn.max_pool(x, (3, 3), (2, 2))
