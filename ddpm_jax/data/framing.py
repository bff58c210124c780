"""How an image of any size becomes one of the size that the network sees, without distortion."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from ddpm_jax.config import DataConfig, Framing
from ddpm_jax.data.image_set import ImageSet, StoredImages
from ddpm_jax.errors import InputError
from ddpm_jax.images import to_pil

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
        """The frame that a config asks for; its image_shape is set. Raises InputError for other than 1 or 3 channels."""
        assert config.image_shape is not None
        if config.image_shape[2] not in (1, 3):
            raise InputError(f"data.image_shape = {config.image_shape}: images have 1 channel (grey) or 3 (RGB)")
        return cls(*config.image_shape, config.framing)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.height, self.width, self.channels

    @property
    def mode(self) -> str:
        """Pillow's mode of images with these channels."""
        return "L" if self.channels == 1 else "RGB"

    @property
    def cover(self) -> tuple[int, int]:
        """Width and height that an image may be decoded down to: the smallest random crop is still as large as the frame."""
        share = SMALLEST_CROP if self.framing == "random" else 1.0
        return math.ceil(self.width / share), math.ceil(self.height / share)

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
            image = _resized(image, self._box(image.size, draw), (self.width, self.height))
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

    def _padded(self, image: Image.Image) -> Image.Image:
        """The whole image, as large as it fits, in the middle of a white one."""
        scale = min(self.width / image.width, self.height / image.height)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        whole = 0.0, 0.0, float(image.width), float(image.height)
        resized = image if size == image.size else _resized(image, whole, size)
        canvas = Image.new(self.mode, (self.width, self.height), "white")
        canvas.paste(resized, ((self.width - size[0]) // 2, (self.height - size[1]) // 2))
        return canvas


class FramedImages(StoredImages):
    """uint8 images that are kept as pixels, brought to a frame when they are read."""

    def __init__(self, images: np.ndarray | StoredImages, frame: Frame) -> None:
        super().__init__(len(images), frame.image_shape)
        self._images, self._frame = images, frame

    def read(
        self, indices: Int[np.ndarray, "B"], draws: Float[np.ndarray, "B 3"] | None = None
    ) -> UInt8[np.ndarray, "B H W C"]:
        """See StoredImages.read."""
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        for place, pixels in enumerate(self._images[indices]):
            picture = to_pil(pixels).convert(self._frame.mode)
            images[place] = self._frame.fit(picture, None if draws is None else draws[place])
        return images


def framed(image_set: ImageSet, config: DataConfig) -> ImageSet:
    """A set of pixels brought to data.image_shape, or ready for random crops, where the config asks for either.

    Images of one channel and of three become each other by Pillow's rule: grey is 0.299 R + 0.587 G + 0.114 B.

    Raises:
        InputError: float images, or other numbers of channels, which can't be framed.
    """
    images, shape = image_set.images, config.image_shape or image_set.image_shape
    if shape == image_set.image_shape and config.framing != "random":
        return image_set
    asked = f"data.image_shape = {shape} and data.framing = {config.framing}"
    if images.dtype != np.uint8:
        raise InputError(f"{config.source}: {asked} need uint8 images, not {images.dtype}: save them as uint8")
    if not {image_set.image_shape[2], shape[2]} <= {1, 3}:
        here = f"images {image_set.image_shape} can't be framed to {asked}"
        raise InputError(f"{config.source}: {here}: only 1 (grey) and 3 channels (RGB) can; save the images without others")
    return dataclasses.replace(image_set, images=FramedImages(images, Frame(*shape, config.framing)))


def _resized(image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    """A box of an image, (left, top, right, bottom), brought to a width and height."""
    factors = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]
    whole = all(abs(value - round(value)) < 1e-6 for value in (*factors, *box[:2]))
    down = Image.Resampling.BOX if whole else Image.Resampling.HAMMING
    return image.resize(size, Image.Resampling.BICUBIC if min(factors) < 1 else down, box=box)
