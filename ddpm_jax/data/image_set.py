"""What every source of images gives: images, and their classes where they have any."""

import abc
import dataclasses

import numpy as np
from jaxtyping import Float, Int, UInt8


class StoredImages(abc.ABC):
    """Images that are read and decoded when they are asked for; indexed along the first axis like an array [N, H, W, C]."""

    dtype = np.dtype(np.uint8)

    def __init__(self, num_images: int, image_shape: tuple[int, int, int]) -> None:
        self.shape = (num_images, *image_shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all images once decoded."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | Int[np.ndarray, "B"]) -> UInt8[np.ndarray, "B H W C"]:
        return self.read(np.arange(len(self))[index])

    @abc.abstractmethod
    def read(
        self, indices: Int[np.ndarray, "B"], draws: Float[np.ndarray, "B 3"] | None = None
    ) -> UInt8[np.ndarray, "B H W C"]:
        """The images at these places in the set.

        Args:
            indices: in 0 ... N-1, repeated or not.
            draws: numbers in [0, 1) that decide a random crop of each image: its size, top and left edge. None: the crop
                in the middle. Without effect where data.framing is not "random".

        Raises:
            InputError: an image that could be read when the set was opened no longer can.
        """


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images in memory, memory-mapped, or decoded when they are asked for."""

    images: np.ndarray | StoredImages
    """uint8 [N, H, W, C] in [0, 255], or float32 [N, H, W, C] in [-1, 1]."""
    labels: np.ndarray | None = None
    """int32 [N], or None."""
    class_names: tuple[str, ...] = ()
    """Names of the classes where they are known."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        _, height, width, channels = self.images.shape
        return height, width, channels
