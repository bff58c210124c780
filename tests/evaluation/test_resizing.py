"""The two ways to a network's size, against their definitions pixel by pixel and against Pillow."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.evaluation.resizing import resize_bicubic, resize_bilinear_tf1


@pytest.mark.parametrize("shape", [(5, 7, 1), (32, 32, 3), (40, 31, 3), (1, 1, 1), (13, 13, 2)])
def test_bilinear_of_tensorflow_1(shape):
    """Output pixel i is a mixture of the input pixels on both sides of i H / S, the last one standing for what is beyond."""
    image, size = np.random.default_rng(0).uniform(0, 255, shape), 13
    expected = np.zeros((size, size, shape[2]))
    for i in range(size):
        for j in range(size):
            y, x = i * shape[0] / size, j * shape[1] / size
            for row, row_share in ((int(y), 1 - y % 1), (int(y) + 1, y % 1)):
                for column, column_share in ((int(x), 1 - x % 1), (int(x) + 1, x % 1)):
                    pixel = image[min(row, shape[0] - 1), min(column, shape[1] - 1)]
                    expected[i, j] += row_share * column_share * pixel
    found = resize_bilinear_tf1(jnp.asarray(image[None], jnp.float32), size)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-4)  # pixels up to 255, shares of float32 places


def test_images_that_have_the_size_are_left_alone():
    images = np.random.default_rng(1).integers(0, 256, (2, 9, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_bilinear_tf1(jnp.asarray(images, jnp.float32), 9), images)
    np.testing.assert_array_equal(resize_bicubic(images, 9), images)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_bicubic_is_pillows_up_and_down(channels, mode):
    images = np.random.default_rng(2).integers(0, 256, (3, 20, 30, channels), dtype=np.uint8)
    found = resize_bicubic(images, 24)
    assert found.shape == (3, 24, 24, channels) and found.dtype == np.uint8
    for image, resized in zip(images, found, strict=True):
        picture = Image.frombytes(mode, (30, 20), image.tobytes()).resize((24, 24), Image.Resampling.BICUBIC)
        assert resized.tobytes() == picture.tobytes()
