"""Image files: raster formats only, and nothing of their metadata but the orientation."""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..common.errors import DataError
from .files import opened

#: What is decoded here, in this process. Pillow knows others: for EPS it starts Ghostscript, for which a file need only
#: begin as one, whatever it is called.
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
#: A camera's raw scan takes less.
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
    """A file that holds no image that can be used; the text says why."""


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of the formats that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _RASTER if name in Image.OPEN)


@contextlib.contextmanager
def opened_image(path: Path, size: int) -> Iterator[Image.Image]:
    """Open an image and turn it as its orientation says; a JPEG much larger than ``size`` is decoded at a fraction.

    Memory that is not enough is no fault of the file, and passes.

    Raises:
        UnreadableImageError: the file is damaged, empty or no image; also for what is raised inside the block.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with opened(path, "image", _LIMIT) as file, Image.open(file, formats=_formats()) as image:
                image.draft(None, (size, size))
                image.load()
                yield turned(image)
    except (UnreadableImageError, MemoryError):
        raise
    except DataError as error:
        raise UnreadableImageError(str(error).removeprefix(f"image {path} ")) from None
    except UnidentifiedImageError:
        raise UnreadableImageError("no image in a raster format that is known here") from None
    except Exception as error:
        # On damaged files Pillow's decoders raise nearly everything: struct.error, RuntimeError, AttributeError, ...
        raise UnreadableImageError(" ".join(str(error).split()) or type(error).__name__) from None


def turned(image: Image.Image) -> Image.Image:
    """``image`` turned as its metadata say; as it is stored where they cannot be read."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # Whatever a damaged tag makes Pillow raise, the pixels are whole.
        return image
    if turn is None:
        return image
    result = image.transpose(turn)
    result.format = image.format
    return result
