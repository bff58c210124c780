"""Data: where images come from, and the order in which training sees them."""

from ddpm_jax.data.pipeline import batches
from ddpm_jax.data.sources import ImageSet, load_images

__all__ = ["ImageSet", "batches", "load_images"]
