"""Bytes of image files to pixels: every mode, upright, over white, and nothing but UnusableImage for what is none."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from ddpm_jax.data.decoding import MAX_PIXELS, UnusableImage, check, decode

RANDOM = np.random.default_rng(5)
RGBA = RANDOM.integers(0, 256, (24, 16, 4), np.uint8)
RGB, GREY = RGBA[..., :3].copy(), RGBA[..., 0].copy()


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits, colour, rows=b"", *chunks):
    """A PNG file written by hand, by the specification."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def over_white(rgba):
    """c a + 255 (1 - a) in float64."""
    alpha = rgba[..., 3:].astype(np.float64) / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def luma(rgb):
    """ITU-R BT.601, as Pillow's documentation gives it for mode L."""
    return np.asarray(rgb, np.float64) @ [0.299, 0.587, 0.114]


def assert_near(image, expected, levels=1):
    """Equal but for the rounding of whole numbers in between: one level for each step."""
    got = np.asarray(image).astype(np.float64)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= levels, np.abs(got - expected).max()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_lies_over_white(kind):
    data = encoded(Image.fromarray(RGBA), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    assert_near(decode(data, "RGB"), over_white(RGBA))
    assert_near(decode(data, "L"), luma(over_white(RGBA)), levels=2)


def test_grey_with_alpha_lies_over_white():
    data = encoded(Image.fromarray(RGBA[..., [0, 3]].copy(), "LA"))
    expected = over_white(RGBA[..., [0, 0, 0, 3]])
    assert_near(decode(data, "RGB"), expected)
    assert_near(decode(data, "L"), expected[..., 0], levels=2)


def test_palette_with_transparency_lies_over_white():
    palette, alpha = RANDOM.integers(0, 256, (256, 3), np.uint8), RANDOM.integers(0, 256, 256, np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in GREY)
    data = png(16, 24, 8, 3, rows, chunk(b"PLTE", palette.tobytes()), chunk(b"tRNS", alpha.tobytes()))
    assert_near(decode(data, "RGB"), over_white(np.concatenate([palette, alpha[:, None]], axis=1)[GREY]))
    opaque = png(16, 24, 8, 3, rows, chunk(b"PLTE", palette.tobytes()))
    np.testing.assert_array_equal(np.asarray(decode(opaque, "RGB")), palette[GREY])


@pytest.mark.parametrize(("pixels", "bits", "colour", "transparent"), [
    (GREY, 8, 0, int(GREY[3, 4])), (RGB, 8, 2, RGB[3, 4].tolist()),
    (RANDOM.integers(0, 65536, (24, 16), np.uint16), 16, 0, None),
])  # fmt: skip
def test_a_transparent_colour_becomes_white(pixels, bits, colour, transparent):
    if transparent is None:
        transparent = int(pixels[3, 4])
    rows = b"".join(b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in pixels)
    data = png(
        16, 24, bits, colour, rows, chunk(b"tRNS", struct.pack(f">{np.size(transparent)}H", *np.atleast_1d(transparent)))
    )
    image = np.asarray(decode(data, "RGB"))
    hit = (pixels == transparent).reshape(24, 16, -1).all(-1)
    assert hit[3, 4] and (image[hit] == 255).all()
    np.testing.assert_array_equal(image[~hit], np.broadcast_to((pixels / (257 if bits == 16 else 1)).round().reshape(
        24, 16, -1), (24, 16, 3))[~hit])  # fmt: skip


def test_sixteen_bits_are_scaled_by_257():
    pixels = np.linspace(0, 65535, 384).astype(np.uint16).reshape(24, 16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    expected = np.round(pixels / 257)
    np.testing.assert_array_equal(np.asarray(decode(png(16, 24, 16, 0, rows), "L")), expected)
    np.testing.assert_array_equal(np.asarray(decode(png(16, 24, 16, 0, rows), "RGB")), np.repeat(expected[..., None], 3, -1))
    colour = np.stack([pixels, pixels[::-1], pixels], -1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    assert_near(decode(png(16, 24, 16, 2, rows), "RGB"), colour / 257)  # Pillow keeps the high byte


def test_black_and_white_of_one_bit():
    bits = GREY > 127
    for kind in ("PNG", "BMP"):
        np.testing.assert_array_equal(np.asarray(decode(encoded(Image.fromarray(bits), kind), "L")), 255 * bits)


def test_cmyk_jpegs_have_their_colours():
    """Stored inverted, as Adobe's and Pillow's own are: r = 255 - min(255, c + k) for plain inks."""
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[..., 0], inks[..., 3] = 200, 30
    data = encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data
    expected = np.broadcast_to((1 - inks[..., :3] / 255.0) * (1 - inks[..., 3:] / 255.0) * 255, (16, 16, 3))
    assert_near(decode(data, "RGB"), expected, levels=6)  # a JPEG's own error, and two ways to mix black in


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_upright_by_exif(kind, order):
    """The corners of each orientation by EXIF 2.3, table 6: which sides of the scene are row 0 and column 0."""
    scene = np.zeros((32, 48), np.uint8)
    scene[:16, :24], scene[:16, 24:], scene[16:, :24] = 255, 170, 85
    stored = {1: scene, 2: scene[:, ::-1], 3: scene[::-1, ::-1], 4: scene[::-1], 5: scene.T, 6: scene.T[::-1],
              7: scene.T[::-1, ::-1], 8: scene.T[:, ::-1]}  # fmt: skip
    for orientation, pixels in stored.items():
        magic = b"II*\0" if order == "<" else b"MM\0*"
        exif = magic + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
        options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
        data = encoded(Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB"), kind, exif=b"Exif\0\0" + exif, **options)
        assert_near(decode(data, "L"), scene.astype(float), levels=3)
        assert check(data) == (48, 32)


def test_damaged_exif_is_no_reason_to_refuse():
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"nonsense"):
        assert decode(encoded(Image.fromarray(RGB), "JPEG", exif=exif), "RGB").size == (16, 24)


def test_first_picture_of_an_animation():
    pictures = [Image.fromarray(np.full((24, 16, 3), value, np.uint8)) for value in (10, 100, 200)]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(pictures[0], kind, save_all=True, append_images=pictures[1:], **options)
        assert (np.asarray(decode(data, "RGB")) == 10).all()


def test_large_jpegs_come_at_a_fraction():
    smooth = np.add.outer(np.arange(400), np.arange(300)).astype(np.float64) / 700 * 255
    data = encoded(Image.fromarray(smooth.astype(np.uint8)), "JPEG", quality=95)
    sizes = {(300, 400): (300, 400), (150, 200): (150, 200), (75, 101): (150, 200), (30, 30): (38, 50), (500, 9): (300, 400)}
    assert {target: decode(data, "L", target).size for target in sizes} == sizes
    means = smooth[:, :296].reshape(50, 8, 37, 8).mean((1, 3))
    assert_near(decode(data, "L", (30, 30)).crop((0, 0, 37, 50)), means, levels=3)  # a JPEG's own error


@pytest.mark.parametrize("data", [
    b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"BM", b"GIF89a" + bytes(40), bytes(1000),
])  # fmt: skip
def test_what_is_no_image(data):
    for function in (check, lambda data: decode(data, "RGB")):
        with pytest.raises(UnusableImage) as caught:
            function(data)
        assert 0 < len(str(caught.value)) < 120 and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_files_cut_short(kind):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    data = encoded(Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), np.uint8)), kind)
    decode(data, "RGB")
    for share in (0.1, 0.5, 0.9):
        for function in (check, lambda data: decode(data, "RGB", (8, 8))):
            with pytest.raises(UnusableImage):
                function(data[: int(share * len(data))])


def bombs():
    side = 60_000
    bmp = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 54, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    small = encoded(Image.fromarray(RGB), "JPEG")
    place = small.index(b"\xff\xc0") + 5
    jpeg = small[:place] + struct.pack(">HH", side, side) + small[place + 4 :]
    canvas = (16_000 - 1).to_bytes(3, "little")
    webp = b"RIFF\x40\0\0\0WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + canvas + bytes(20)
    return {"png": png(side, side, 8, 2, bytes(10**6)), "bmp": bmp, "jpeg": jpeg, "webp": webp}


@pytest.mark.parametrize("kind", ["png", "bmp", "jpeg", "webp"])
def test_bombs_are_refused_by_their_header(kind):
    with pytest.raises(UnusableImage, match=f"00 = [0-9]+ pixels, more than {MAX_PIXELS}"):
        decode(bombs()[kind], "RGB")


def test_jpegs_of_endless_scans_are_refused():
    data = encoded(Image.fromarray(RGB), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    with pytest.raises(UnusableImage, match="scans"):
        decode(data[:-2] + data[start:-2] * 200 + data[-2:], "RGB")
