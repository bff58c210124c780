"""A small convolutional classifier: the yardstick of samples, by its answers and by the features behind them."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpm_jax.models.layers import GroupNorm, conv3x3, dense


class Classifier(nn.Module):
    """A network images [B, H, W, C] -> (logits [B, num_classes], features [B, num_features]).

    Every level halves the resolution, rounded up, and has two 3x3 convolutions; level i has 2^i times the channels
    of the first. The features are the last hidden layer, made from the mean over all positions; the logits are linear in them.
    """

    num_classes: int
    """Number of classes."""
    channels: int = 32
    """Channels of the first level."""
    num_levels: int = 3
    """Levels."""
    num_features: int = 64
    """Width of the last hidden layer."""
    num_groups: int = 8
    """Groups of GroupNorm."""

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> tuple[Float[Array, "B K"], Float[Array, "B F"]]:
        """Logits and features of images in [-1, 1]."""
        h, dtype = images, jnp.float32
        for level in range(self.num_levels):
            width = self.channels * 2**level
            h = conv3x3(width, dtype, stride=2, name=f"level{level}_down")(h)
            h = GroupNorm(self.num_groups, dtype, name=f"level{level}_norm0")(h)
            h = conv3x3(width, dtype, name=f"level{level}_conv")(h)
            h = GroupNorm(self.num_groups, dtype, name=f"level{level}_norm1")(h)
        features = nn.silu(dense(self.num_features, dtype, name="features")(h.mean(axis=(1, 2))))
        return dense(self.num_classes, dtype, name="logits")(features), features
