"""Image files: raster formats only; of the metadata, only the orientation is used."""

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features
from PIL.JpegImagePlugin import JpegImageFile

from ..common.errors import DataError
from .files import opened, reason

#: The formats that are decoded, all in this process. Pillow knows others: for EPS it starts Ghostscript, for any file
#: that begins like one, regardless of its name.
_RASTER: tuple[str, ...] = (
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "ICO",
    "JPEG",
    "JPEG2000",
    "MPO",
    "PCX",
    "PNG",
    "PPM",
    "PSD",
    "QOI",
    "SGI",
    "TGA",
)
_RASTER += ("TIFF", "WEBP")
#: More than a camera's raw image takes.
_LIMIT = 2**30
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(DataError):
    """A file without a usable image; the message says why."""


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _RASTER if name in Image.OPEN)


@contextlib.contextmanager
def opened_image(source: Path | str | bytes, size: int) -> Iterator[Image.Image]:
    """Open an image and rotate it according to its orientation; decode a JPEG much larger than ``size`` at a fraction.

    A MemoryError is passed on, since the file is not at fault.

    Args:
        source: the file, or its content.
        size: rows and columns needed.

    Raises:
        UnreadableImageError: the file is damaged, empty or not an image; also replaces errors raised inside the block.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = io.BytesIO(source) if isinstance(source, bytes) else opened(source, "image", _LIMIT)
            with given as file, Image.open(file, formats=_formats()) as image:
                image.draft(None, (size, size))
                image.load()
                yield turned(image)
    except (UnreadableImageError, MemoryError):
        raise
    except DataError as error:
        raise UnreadableImageError(str(error).removeprefix(f"image {source!s} ")) from None
    except UnidentifiedImageError:
        raise UnreadableImageError("no image in a raster format that is known here") from None
    except Exception as error:
        # On damaged files, Pillow's decoders raise almost anything: struct.error, RuntimeError, AttributeError, ...
        raise UnreadableImageError(reason(error)) from None


def turned(image: Image.Image) -> Image.Image:
    """``image`` rotated according to its metadata; unchanged if they cannot be read."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:
        # Whatever error a damaged tag causes in Pillow, the pixels are intact.
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return image
    result = image.transpose(turn)
    result.format = image.format
    return result


@functools.cache
def pillow() -> str:
    """The version of Pillow and that of its JPEG library, if it was built with one; pixel values may depend on both."""
    if not features.check("jpg"):
        return f"Pillow {features.version_module('pil')} without JPEG"
    turbo = features.version_feature("libjpeg_turbo")
    library = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version_codec('jpg')}"
    return f"Pillow {features.version_module('pil')}, {library}"


@functools.cache
def decoder() -> str:
    """:func:`pillow`, the JPEG decoder in use.

    Raises:
        DataError: Pillow was built without one.
    """
    if not features.check("jpg"):
        raise DataError("this Pillow was built without JPEG support; pip's has it")
    return pillow()


def decode_jpeg(content: bytes, pixels: NDArray[np.uint8]) -> None:
    """Decode a JPEG image into uint8 ``[rows, columns, 3]`` in RGB, of exactly this size.

    Raises:
        UnreadableImageError: it is damaged or, according to its header, of another size or kind.
    """
    rows, columns, _ = pixels.shape
    try:
        # Not through Image.open, which also tries other formats, and warns about large images; that warning cannot
        # be disabled per thread.
        with JpegImageFile(io.BytesIO(content)) as image:
            if image.size != (columns, rows) or image.mode != "RGB":
                width, height = image.size
                raise ValueError(f"it is {height}x{width} {image.mode} and must be {rows}x{columns} RGB")
            pixels[:] = np.asarray(image)
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImageError(reason(error)) from None


def encode_jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """uint8 ``[rows, columns, 3]`` in RGB as a JPEG image, its colours at full resolution (4:4:4).

    Args:
        pixels: the image.
        quality: 1 to 100, as libjpeg counts it.
    """
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=quality, subsampling=0)
    return content.getvalue()
