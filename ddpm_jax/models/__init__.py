"""Networks in Flax Linen; the only room that imports it."""

from ddpm_jax.models.unet import UNet, make_unet

__all__ = ["UNet", "make_unet"]
