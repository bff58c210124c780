"""How an image of any size becomes one of the size that the network sees, without distortion."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from ddpm_jax.config import DataConfig, Framing

SMALLEST_CROP = 0.8  # a random crop's size, as a share of the largest that fits; of ADM's random crops


@dataclasses.dataclass(frozen=True)
class Frame:
    """The wanted height, width and channels (1 grey, 3 RGB), and the way there."""

    height: int
    width: int
    channels: int
    framing: Framing = "center"

    @classmethod
    def of(cls, config: DataConfig) -> "Frame":
        """The frame that a config asks for; its image_shape is set."""
        assert config.image_shape is not None
        return cls(*config.image_shape, config.framing)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.height, self.width, self.channels

    @property
    def mode(self) -> str:
        """Pillow's mode of images with these channels."""
        return "L" if self.channels == 1 else "RGB"

    def fit(self, image: Image.Image, draw: Float[np.ndarray, "3"] | None = None) -> UInt8[np.ndarray, "H W C"]:
        """The image cropped or padded to the frame's shape and resized: by area down, bicubic up.

        Down by whole numbers each pixel is the mean of those that it covers. Pillow's box filter counts pixels whole or not
        at all, which for other factors moves edges by up to half a pixel; there its Hamming filter stands in for the mean.

        Args:
            image: of this frame's mode, any size.
            draw: size, top and left edge of a random crop, each in [0, 1); None: the crop in the middle.
        """
        if self.framing == "pad":
            image = self._padded(image)
        elif image.size != (self.width, self.height) or (self.framing == "random" and draw is not None):
            image = self._resized(image, self._box(image.size, draw))
        return np.asarray(image).reshape(self.image_shape)

    def _box(self, size: tuple[int, int], draw: Float[np.ndarray, "3"] | None) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the crop, in pixels of the image."""
        scale = min(size[0] / self.width, size[1] / self.height)
        size_draw, top_draw, left_draw = (1.0, 0.5, 0.5) if self.framing != "random" or draw is None else map(float, draw)
        scale *= SMALLEST_CROP + (1 - SMALLEST_CROP) * size_draw
        width, height = self.width * scale, self.height * scale
        left, top = left_draw * (size[0] - width), top_draw * (size[1] - height)
        if draw is None:  # at whole pixels, so that a crop by a whole factor is the exact mean
            left, top = float(math.floor(left)), float(math.floor(top))
        return left, top, min(left + width, float(size[0])), min(top + height, float(size[1]))

    def _resized(self, image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
        return image.resize((self.width, self.height), _filter(box, (self.width, self.height)), box=box)

    def _padded(self, image: Image.Image) -> Image.Image:
        """The whole image, as large as it fits, in the middle of a white one."""
        scale = min(self.width / image.width, self.height / image.height)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        resized = (
            image
            if size == image.size
            else image.resize(size, _filter((0.0, 0.0, float(image.width), float(image.height)), size))
        )
        canvas = Image.new(self.mode, (self.width, self.height), "white")
        canvas.paste(resized, ((self.width - size[0]) // 2, (self.height - size[1]) // 2))
        return canvas


def _filter(box: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Resampling:
    """The filter that brings a box of an image, (left, top, right, bottom), to a width and height."""
    factors = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]
    if min(factors) < 1:
        return Image.Resampling.BICUBIC
    whole = all(abs(value - round(value)) < 1e-6 for value in (*factors, *box[:2]))
    return Image.Resampling.BOX if whole else Image.Resampling.HAMMING
