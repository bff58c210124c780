"""Image files that may come from anywhere, decoded to Pillow images of one mode.

What a file is follows from its first bytes, not from its name: PNG, JPEG, WebP or BMP. Colour profiles (ICC) are ignored.
"""

import contextlib
import io
import struct
import threading
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ddpm_jax.errors import first_line
from ddpm_jax.images import on_ground

MAX_PIXELS = 1 << 26  # 8192 x 8192: more than cameras have, and at most 256 MB decoded
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
MAX_SCANS = 100  # of a JPEG, each as large as the image whatever it weighs in the file; encoders write about ten
ORIENTATION_TAG = 0x0112
TURNS = {  # EXIF's orientation: what brings the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_one_at_a_time = threading.Lock()  # catch_warnings belongs to the process


class UnusableImage(ValueError):
    """A file that isn't an image to learn from; the message is the short reason."""


class _Jpeg(JpegImageFile):
    """A JPEG whose EXIF data Pillow leaves alone: it would warn of damaged data, and only the orientation matters."""

    def getexif(self) -> Image.Exif:
        return Image.Exif()


def decode(data: bytes, mode: str, target: tuple[int, int] | None = None) -> Image.Image:
    """The image in a file's bytes: upright by EXIF, alpha over white, 16 bits as 8, of an animation the first picture.

    Args:
        data: the whole file.
        mode: "L" or "RGB".
        target: width and height that the caller will shrink the image to, covering them: a JPEG may come at a half, a
            quarter or an eighth of its size where that is still as large, which is several times as fast.

    Raises:
        UnusableImage: no image of a known kind, damaged, cut short, or of more than 2^26 pixels.
    """
    with _guarded(data), _open(data) as image:
        orientation = _orientation(image.info.get("exif"))
        if target is not None and isinstance(image, _Jpeg):
            lies = orientation >= 5  # on its side
            image.draft("L" if mode == "L" else None, target[::-1] if lies else target)
        image.load()
        flat = _flat(image, mode)
        return flat.transpose(TURNS[orientation]) if orientation in TURNS else flat


def check(data: bytes) -> tuple[int, int]:
    """Width and height, upright, of an image that has been decoded to its end, JPEGs at an eighth of the size.

    Raises:
        UnusableImage: as decode.
    """
    with _guarded(data), _open(data) as image:
        width, height = image.size
        if isinstance(image, _Jpeg):
            image.draft(None, (1, 1))
        image.load()
        return (height, width) if _orientation(image.info.get("exif")) in (5, 6, 7, 8) else (width, height)


@contextlib.contextmanager
def _guarded(data: bytes) -> Iterator[None]:
    """Whatever goes wrong is an UnusableImage."""
    try:
        animated = data.startswith(PNG_MAGIC) and b"acTL" in data
        with _quiet() if animated else contextlib.nullcontext():  # Pillow warns of damaged ones
            yield
    except UnusableImage:
        raise
    except Exception as error:  # the kinds that Pillow raises on damaged files are too many to list
        raise UnusableImage(f"can't be decoded: {first_line(error)[:80]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(data: bytes) -> ImageFile:
    """The image with its header read and its pixels not, of a size that may be decoded.

    Image.open would warn of large images, and a warning can't be hidden from one thread alone.
    """
    if not data:
        raise UnusableImage("empty file")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        _check_size(*_webp_size(data))  # opening it already takes memory for all its pixels
        return WebPImageFile(io.BytesIO(data))
    image: ImageFile
    if data.startswith(PNG_MAGIC):
        image = PngImageFile(io.BytesIO(data))
    elif data.startswith(b"\xff\xd8\xff"):
        if _num_scans(data) > MAX_SCANS:
            raise UnusableImage(f"a JPEG of more than {MAX_SCANS} scans")
        image = _Jpeg(io.BytesIO(data))
    elif data.startswith(b"BM"):
        image = BmpImageFile(io.BytesIO(data))
    else:
        raise UnusableImage("neither PNG, JPEG, WebP nor BMP")
    _check_size(*image.size)
    return image


def _num_scans(data: bytes) -> int:
    """How often a JPEG's mark of a scan occurs; several times as fast as bytes.count."""
    values = np.frombuffer(data, np.uint8)
    return int(np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == 0xDA)))


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise UnusableImage(f"an image of {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise UnusableImage(f"{width}x{height} = {width * height} pixels, more than {MAX_PIXELS}")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height in the header of a WebP file, by its first chunk (RFC 9649, section 2)."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _orientation(exif: bytes | None) -> int:
    """The orientation 1 ... 8 in EXIF data (TIFF 6.0, section 2); 1, upright, where there is none or it is damaged."""
    tiff = (exif or b"").removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, place)
            if tag == ORIENTATION_TAG:
                return int(value)
    except struct.error:
        pass
    return 1


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """A decoded image in the mode, transparent parts over white."""
    if image.mode.startswith(("I", "F")):
        return _from_16_bits(image).convert(mode)
    if image.has_transparency_data:
        return on_ground(image, "white").convert(mode)
    return image.copy() if image.mode == mode else image.convert(mode)


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey values 0 ... 65535 as 0 ... 255, rounded; a value that a PNG declares transparent as white."""
    grey = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
    small = (grey + 128) // 257
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        small[grey == transparent] = 255
    return Image.fromarray(small.astype(np.uint8))
