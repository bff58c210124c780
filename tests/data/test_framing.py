"""Images of any size to one shape: area averages, no distortion, random crops that stay inside and are uniform."""

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from ddpm_jax.data.framing import SMALLEST_CROP, Frame

RANDOM = np.random.default_rng(6)


def area_means(pixels, height, width):
    """float64: each pixel of the result is the integral of the piecewise constant image over its area."""

    def shares(size, new):
        edges = np.arange(new + 1) * size / new
        places = np.arange(size)
        overlap = np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places)
        return np.clip(overlap, 0, None) * new / size

    return np.einsum("hy,yxc,wx->hwc", shares(pixels.shape[0], height), np.float64(pixels), shares(pixels.shape[1], width))


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
@pytest.mark.parametrize("framing", ["center", "pad"])
def test_by_whole_factors_it_is_the_mean(factor, framing):
    pixels = RANDOM.integers(0, 256, (10 * factor, 12 * factor, 3), np.uint8)
    got = Frame(10, 12, 3, framing).fit(Image.fromarray(pixels))
    expected = area_means(pixels, 10, 12)
    assert got.dtype == np.uint8 and np.abs(got - expected).max() <= 1.01  # two roundings, down the rows and the columns


def test_the_crop_in_the_middle_is_the_mean_too():
    pixels = RANDOM.integers(0, 256, (40, 61, 3), np.uint8)
    got = Frame(10, 10, 3).fit(Image.fromarray(pixels))
    assert np.abs(got - area_means(pixels[:, 10:50], 10, 10)).max() <= 1.01


@pytest.mark.parametrize("size", [(48, 48), (100, 100), (43, 43), (321, 321)])
def test_by_other_factors_it_is_near_the_mean(size):
    """Of a smooth image, where every even filter agrees but for its curvature: within 2 levels of 255 away from the border."""
    y, x = np.mgrid[: size[0], : size[1]] / size[0]
    pixels = (127 + 60 * np.sin(4 * x + 1) + 60 * np.cos(3 * y)).round().astype(np.uint8)[..., None]
    got = Frame(32, 32, 1).fit(Image.fromarray(pixels[..., 0]))
    assert np.abs(got - area_means(pixels, 32, 32))[1:-1, 1:-1].max() <= 2


@pytest.mark.parametrize(
    ("framing", "size"), [("center", (300, 190)), ("pad", (190, 300)), ("center", (40, 62)), ("random", (90, 200))]
)
def test_a_circle_stays_a_circle(framing, size):
    """Second moments of a disc: equal along both axes and 0 between them, whatever the shape of the image around it."""
    y, x = np.mgrid[: size[1], : size[0]]
    radius = 0.3 * min(size)
    disc = (x + 0.5 - size[0] / 2) ** 2 + (y + 0.5 - size[1] / 2) ** 2 < radius**2
    image = Image.fromarray(np.where(disc, 0, 255).astype(np.uint8))
    draw = np.array([0.9, 0.5, 0.5]) if framing == "random" else None
    weight = 255.0 - Frame(64, 64, 1, framing).fit(image, draw)[..., 0]
    y, x = np.mgrid[:64, :64]
    centre = np.array([(weight * y).sum(), (weight * x).sum()]) / weight.sum()
    y, x = y - centre[0], x - centre[1]
    across, down, mixed = ((weight * m).sum() / weight.sum() for m in (x * x, y * y, x * y))
    assert abs(across / down - 1) < 0.03 and abs(mixed / down) < 0.03  # pixels of the source are 1/6 of the radius at most
    assert np.abs(centre - 31.5).max() < 1.7  # half a pixel of the source, enlarged up to 3.2 times


def test_random_crops_stay_inside_and_are_uniform():
    frame, size = Frame(32, 32, 3, "random"), (80, 50)
    boxes = np.array([frame._box(size, draw) for draw in RANDOM.random((2000, 3))])
    left, top, right, bottom = boxes.T
    assert (boxes[:, :2] >= 0).all() and (right <= 80).all() and (bottom <= 50).all()
    np.testing.assert_allclose(right - left, bottom - top, rtol=1e-9)  # no distortion
    side = right - left
    for share in ((side / 50 - SMALLEST_CROP) / (1 - SMALLEST_CROP), left / (80 - side), top / (50 - side)):
        assert scipy.stats.kstest(share, "uniform").pvalue > 1e-3


def test_a_random_crop_shows_what_its_draw_says():
    ramp = np.add.outer(np.zeros(100), np.arange(200)).astype(np.uint8)
    frame = Frame(50, 50, 1, "random")
    for size, left in ((0.0, 0.0), (0.0, 0.999), (0.99, 0.5)):
        side = 100 * (SMALLEST_CROP + (1 - SMALLEST_CROP) * size)
        got = frame.fit(Image.fromarray(ramp), np.array([size, 0.3, left]))[25, :, 0]
        expected = left * (200 - side) + (np.arange(50) + 0.5) * side / 50 - 0.5  # pixel x has its middle at x + 0.5
        assert np.abs(got[2:-2] - expected[2:-2]).max() <= 1  # rounding of two passes
    np.testing.assert_array_equal(frame.fit(Image.fromarray(ramp)), Frame(50, 50, 1).fit(Image.fromarray(ramp)))


@pytest.mark.parametrize("framing", ["center", "random", "pad"])
@pytest.mark.parametrize("size", [(1, 100), (100, 1), (1, 1), (3, 5000)])
def test_slivers(framing, size):
    for draw in (None, np.array([0.0, 0.999, 0.999])):
        got = Frame(16, 16, 3, framing).fit(Image.new("RGB", size, (9, 9, 9)), draw)
        assert got.shape == (16, 16, 3) and set(np.unique(got)) <= ({9, 255} if framing == "pad" else {9})
        assert (got == 9).any()


def test_padding_is_white_and_even():
    got = Frame(16, 32, 3, "pad").fit(Image.new("RGB", (100, 100)))
    np.testing.assert_array_equal(got[:, 8:24], 0)
    np.testing.assert_array_equal(np.delete(got, slice(8, 24), axis=1), 255)
