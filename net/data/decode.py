"""From an image file to a square of RGB pixels, prepared as in section 2 of the paper."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..readers.image import UnreadableImageError, opened_image, turned

#: Formats whose 16-bit pixels Pillow reads as 32-bit integers.
_SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")
_BITS_PER_SAMPLE = 258


def _rgb(image: Image.Image, bits: int) -> Image.Image:
    """Convert any mode to 8-bit RGB; transparent pixels become white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        if image.mode == "I" and image.format not in _SIXTEEN_BITS:
            raise UnreadableImageError("32-bit and signed pixels have no agreed range")
        pixels = np.asarray(image)
        if 0 < pixels.max() < 256:
            raise UnreadableImageError("16-bit pixels of which none is above 255 would all be black; save 8 bits")
        return Image.fromarray((np.clip(pixels, 0, 2**bits - 1) >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadableImageError("floating-point pixels have no agreed range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _bits(image: Image.Image) -> int:
    """Bits per gray level of pixels that Pillow reads as 16-bit; scanners write 12-bit TIFFs."""
    tags = getattr(image, "tag_v2", {})
    return 12 if tags.get(_BITS_PER_SAMPLE) == (12,) else 16


def square(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The central square of uint8 ``[H, W, 3]``, its side scaled to ``size``: uint8 ``[size, size, 3]``."""
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    pixels = pixels[top : top + side, left : left + side]
    if side == size:
        return pixels
    # Images that have their size already are packed without PyTorch, which takes seconds to import.
    import torch

    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(planes, size=(size, size), mode="bicubic", antialias=True)[0]
    return scaled.permute(1, 2, 0).contiguous().numpy()


def upright(image: Image.Image) -> NDArray[np.uint8]:
    """An opened image's pixels, uint8 ``[H, W, 3]`` in RGB, rotated according to its orientation tag.

    Raises:
        UnreadableImageError: the range of the pixels is undefined.
    """
    return np.array(_rgb(turned(image), _bits(image)))


def read_pixels(source: Path | str | bytes, size: int) -> NDArray[np.uint8]:
    """The pixels of an image, uint8 ``[H, W, 3]`` in RGB, rotated according to its orientation tag.

    Args:
        source: the file, or its content.
        size: a JPEG image may be decoded at a fraction of its size, but no smaller than this.

    Raises:
        UnreadableImageError: the file is damaged, empty or not an image.
    """
    with opened_image(source, size) as image:
        return np.array(_rgb(image, _bits(image)))


def decode(source: Path | str | bytes, size: int) -> NDArray[np.uint8]:
    """Scale the shorter side to ``size`` and cut out the central ``size`` x ``size``: uint8 ``[size, size, 3]``.

    Orientation tags are applied. The scaling is antialiased and bicubic; PyTorch's takes a third of Pillow's time.

    Raises:
        UnreadableImageError: the file is damaged, empty or not an image.
    """
    return square(read_pixels(source, size), size)
