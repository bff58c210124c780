"""Images that a library keeps as PNG, JPEG or the like: found by it, decoded and framed here."""

import dataclasses
import io
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data.decoding import UnusableImage, decode
from ddpm_jax.data.framing import Frame
from ddpm_jax.data.image_set import StoredImages
from ddpm_jax.errors import InputError

LOOKED_AT = 100  # images whose size is looked at where neither the config nor the set tells it
GREY_MODES = ("1", "L", "I;16", "I;16B")

Fetch = Callable[[Sequence[int]], list[bytes]]


class EncodedImages(StoredImages):
    """N images of which `fetch` gives the encoded bytes; it is called from several threads."""

    def __init__(self, source: str, num_images: int, fetch: Fetch, frame: Frame) -> None:
        super().__init__(num_images, frame.image_shape)
        self._source, self._fetch, self._frame = source, fetch, frame

    def read(
        self, indices: Int[np.ndarray, "B"], draws: Float[np.ndarray, "B 3"] | None = None
    ) -> UInt8[np.ndarray, "B H W C"]:
        """See StoredImages.read."""
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        places = [int(index) for index in indices]
        for number, (place, data) in enumerate(zip(places, self._fetch(places), strict=True)):
            try:
                image = decode(data, self._frame.mode, target=self._frame.cover)
            except UnusableImage as error:
                raise _unusable(self._source, place, error) from error
            images[number] = self._frame.fit(image, None if draws is None else draws[number])
        return images


def find_frame(config: DataConfig, num_images: int, fetch: Fetch) -> Frame:
    """The frame that a config asks for; where it names no shape, that of the images, if they are all of one size.

    Raises:
        InputError: images of several sizes, or a number of channels that images can't be decoded to.
    """
    if config.image_shape is not None:
        return Frame.of(config)
    places = np.unique(np.linspace(0, num_images - 1, LOOKED_AT).astype(int)).tolist()
    images = [_look_at(config.source, place, data) for place, data in zip(places, fetch(places), strict=True)]
    sizes = {(height, width) for height, width, _ in images}
    if len(sizes) > 1:
        small, large = min(sizes), max(sizes)
        found = f"images of several sizes (height {small[0]} width {small[1]}, height {large[0]} width {large[1]}, ...)"
        raise InputError(f"{config.source} holds {found}: give the one they get, such as --data.image-shape 64 64 3")
    channels = 1 if all(grey for *_, grey in images) else 3
    return Frame.of(dataclasses.replace(config, image_shape=(*sizes.pop(), channels)))


def _look_at(source: str, place: int, data: bytes) -> tuple[int, int, bool]:
    """An image's height, width, and whether it is grey."""
    try:
        width, height = decode(data, "RGB").size
    except UnusableImage as error:
        raise _unusable(source, place, error) from error
    with Image.open(io.BytesIO(data)) as image:
        return height, width, image.mode in GREY_MODES


def _unusable(source: str, place: int, error: UnusableImage) -> InputError:
    return InputError(f"{source}: image {place} can't be used: {error}")


def class_labels(labels: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"] | None:
    """Labels as int32; None where -1, the mark of an image without a class, is among them."""
    return labels.astype(np.int32) if labels.min() >= 0 else None
