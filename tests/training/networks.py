"""Networks that compile in no time, for tests of what happens around the network. They pass for the UNet."""

import flax.linen as nn
import jax.numpy as jnp

from ddpm_jax.models import UNet
from ddpm_jax.models.layers import Dropout


class OnePicture(UNet):
    """One learnt picture, whatever the input, under dropout: with prediction "x0", loss and gradient are known by hand.

    loss = mean_i mean_p (x0_ip - c_p)^2,   d loss / d c_p = 2 (c_p - mean_i x0_ip) / P,   p = 1 ... P pixels
    """

    @nn.compact
    def __call__(self, xt, t, labels=None, train=False, rows=None):
        picture = self.param("picture", nn.initializers.zeros, (*xt.shape[1:-1], self.out_channels))
        output = jnp.broadcast_to(1.0 * picture, (len(xt), *picture.shape))
        return Dropout(self.dropout)(output, not train, rows)


class PixelNet(UNet):
    """A small network for each pixel alone, that hears of the time and the class."""

    @nn.compact
    def __call__(self, xt, t, labels=None, train=False, rows=None):
        h = nn.Dense(16)(xt) + nn.Dense(16)(t[:, None].astype(jnp.float32) / 25 - 1)[:, None, None]
        if self.num_classes is not None:
            classes = nn.Embed(self.num_classes + 1, 16)(jnp.zeros_like(t) if labels is None else labels)
            h = h if labels is None else h + classes[:, None, None]
        h = Dropout(self.dropout)(nn.tanh(h), not train, rows)
        return nn.Dense(self.out_channels)(h)


class WideNet(PixelNet):
    """A PixelNet with two layers that are large enough to be split among devices."""

    @nn.compact
    def __call__(self, xt, t, labels=None, train=False, rows=None):
        h = nn.Dense(64)(xt) + nn.Dense(64)(t[:, None].astype(jnp.float32) / 25 - 1)[:, None, None]
        if labels is not None:
            h = h + nn.Embed(self.num_classes + 1, 64)(labels)[:, None, None]
        h = Dropout(self.dropout)(nn.tanh(nn.Dense(64, name="wide1")(nn.tanh(h))), not train, rows)
        return nn.Dense(self.out_channels)(nn.tanh(nn.Dense(64, name="wide2")(h)))


def make_pixel_net(config, channels, learn_variance=False, num_steps=1000):
    """In the place of make_unet."""
    return PixelNet(out_channels=channels * (1 + learn_variance), dropout=config.dropout, num_classes=config.num_classes)
