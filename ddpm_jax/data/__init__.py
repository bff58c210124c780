"""Data: where images come from, and the order in which training sees them."""

from ddpm_jax.data.image_set import ImageSet, StoredImages
from ddpm_jax.data.pipeline import batches
from ddpm_jax.data.sources import load_images

__all__ = ["ImageSet", "StoredImages", "batches", "load_images"]
