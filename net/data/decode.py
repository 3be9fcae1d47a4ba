"""One image file to one square of RGB pixels, as section 2 of the paper prepares it."""

import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps


class UnreadableImageError(ValueError):
    """A file that holds no image that can be used; the text says why."""


def _rgb(image: Image.Image) -> Image.Image:
    """RGB in 8 bits from any mode; transparent pixels show a white background."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # 16-bit gray, whatever integer type it was read into: the upper byte.
        return Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadableImageError("floating-point pixels have no agreed range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def square(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The central square of uint8 ``[H, W, 3]``, its side scaled to ``size``: uint8 ``[size, size, 3]``."""
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    found = torch.from_numpy(pixels[top : top + side, left : left + side]).permute(2, 0, 1)
    if side != size:
        found = F.interpolate(found[None], size=(size, size), mode="bicubic", antialias=True)[0]
    return found.permute(1, 2, 0).contiguous().numpy()


def upright(image: Image.Image) -> NDArray[np.uint8]:
    """An opened image's pixels, uint8 ``[H, W, 3]`` in RGB, its orientation tag obeyed.

    Raises:
        UnreadableImageError: floating-point pixels.
    """
    return np.array(_rgb(ImageOps.exif_transpose(image)))


def decode(path: Path, size: int) -> NDArray[np.uint8]:
    """Scale the shorter side to ``size`` and cut out the central ``size`` x ``size``: uint8 ``[size, size, 3]``.

    Orientation tags are obeyed. The scaling is antialiased and bicubic; PyTorch's runs in a third of Pillow's time.

    Raises:
        UnreadableImageError: the file is damaged, empty or no image.
    """
    if not path.is_file():
        # A pipe, say, on which reading would wait forever.
        raise UnreadableImageError("no regular file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                # A JPEG much larger than needed is decoded at a half, a quarter or an eighth of its size.
                image.draft(None, (size, size))
                ImageOps.exif_transpose(image, in_place=True)
                pixels = np.array(_rgb(image))
        return square(pixels, size)
    except UnreadableImageError:
        raise
    except Exception as error:
        # On damaged files Pillow's decoders raise nearly everything: struct.error, RuntimeError, AttributeError, ...
        raise UnreadableImageError(" ".join(str(error).split()) or type(error).__name__) from None
