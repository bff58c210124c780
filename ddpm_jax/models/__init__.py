"""Networks in Flax Linen; the only room that imports it."""

from ddpm_jax.models.parts import count_parts
from ddpm_jax.models.unet import UNet, bind, init_params, make_unet, num_params

__all__ = ["UNet", "bind", "count_parts", "init_params", "make_unet", "num_params"]
