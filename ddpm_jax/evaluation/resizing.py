"""How images reach the size that a feature network sees; part of every protocol, as scores depend on it."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from ddpm_jax.images import to_pil


def resize_bilinear_tf1(images: Float[Array, "B H W C"], size: int) -> Float[Array, "B S S C"]:
    """Bilinear as in TensorFlow 1, whose pixels have their corner, not their centre, at whole numbers; not antialiased.

    Pixel i of the output lies at i H / S of the input. This is FID's way from any size to 299.
    """
    for axis in (1, 2):
        length = images.shape[axis]
        places = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = np.minimum(places.astype(np.int32), length - 1)
        shape = (1, size, 1, 1) if axis == 1 else (1, 1, size, 1)
        share = jnp.asarray(places - low).reshape(shape)
        below = jnp.take(images, low, axis=axis)
        images = below + (jnp.take(images, np.minimum(low + 1, length - 1), axis=axis) - below) * share
    return images


def resize_bicubic(images: UInt8[np.ndarray, "N H W C"], size: int) -> UInt8[np.ndarray, "N S S C"]:
    """Pillow's bicubic, antialiased where it shrinks, rounded to uint8; images of 1 or 3 channels."""
    shape = (size, size, images.shape[-1])
    resized = [np.asarray(to_pil(image).resize((size, size), Image.Resampling.BICUBIC)).reshape(shape) for image in images]
    return np.stack(resized)
