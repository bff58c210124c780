"""How many images of a batch a CPU learns from at a time.

The gradient of a batch is the sum of those of its parts. Of a few images at a time, what one layer writes is still in the
processor's cache when the next one reads it, and the memory for the backward pass is that of a part. But every part reads all
weights once more and adds up a gradient as large, which must not outweigh the work on its images.
"""

import math

import jax.numpy as jnp
from jaxtyping import PyTree

from ddpm_jax.config import ModelConfig
from ddpm_jax.models.layers import on_cpu
from ddpm_jax.models.unet import num_params

LEAST_BYTES = 2**20
"""What a part's feature maps of the first level take at least: with less, there is too little work for several cores."""
WEIGHT_SHARE = 1 / 40
"""What they take at least of what the weights take; all that is kept for the backward pass takes a hundred times as much."""


def count_parts(config: ModelConfig, params: PyTree, image_shape: tuple[int, ...], batch_size: int) -> int:
    """Into how many equal parts to divide a device's batch: as many as these bounds allow on a CPU, elsewhere 1.

    Args:
        config: the network.
        params: its weights, float32; shapes are enough.
        image_shape: [H, W, C] of an image.
        batch_size: images that the device has.
    """
    if not on_cpu():
        return 1
    positions = math.prod(image_shape[:2]) // config.space_to_depth**2
    image_bytes = positions * config.channels * jnp.dtype(config.dtype).itemsize
    weight_bytes = 4 * num_params(params)
    enough = max(LEAST_BYTES, WEIGHT_SHARE * weight_bytes)
    fitting = (parts for parts in range(batch_size, 1, -1) if batch_size % parts == 0)
    return next((parts for parts in fitting if batch_size // parts * image_bytes >= enough), 1)
