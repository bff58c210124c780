"""Networks in Flax Linen; the only room that imports it."""

from ddpm_jax.models.unet import UNet, bind, make_unet

__all__ = ["UNet", "bind", "make_unet"]
