"""Random images of any size, to measure speed without a data set; they contain nothing to learn."""

import numpy as np

from ..common import seeds
from ..common.errors import UsageError
from ..readers.files import free_host_memory
from .config import SYNTHETIC
from .images import ColourComponents, ImageData, Split

DEFAULT_COUNT = 1024


def parse(path: str) -> int | None:
    """The number of images that ``synthetic`` or ``synthetic:COUNT`` asks for; None if ``path`` is neither."""
    if path == SYNTHETIC:
        return DEFAULT_COUNT
    if not path.startswith(SYNTHETIC + ":"):
        return None
    count = path.removeprefix(SYNTHETIC + ":")
    # ASCII, because int() rejects some other digits; and no more digits than int() converts.
    if not (count.isascii() and count.isdigit() and len(count) < 16) or int(count) < 1:
        raise UsageError(f"--data-path {path}: after '{SYNTHETIC}:' comes a positive number of images")
    return int(count)


def load(count: int, size: int, classes: int) -> ImageData:
    """``count`` training images of uniform noise, and an eighth as many for validation.

    Raises:
        UsageError: they do not fit into memory.
    """
    needed, free = count * 9 // 8 * size * size * 3, free_host_memory()
    if needed > 0.8 * free:
        raise UsageError(
            f"--data-path {SYNTHETIC}:{count}: the images take {needed / 2**30:,.1f} GiB of memory and "
            f"{free / 2**30:,.1f} GiB are free; ask for fewer"
        )
    generator = seeds.noise()

    def split(length: int) -> Split:
        images = np.frombuffer(generator.bytes(length * size * size * 3), np.uint8)
        return Split(images.reshape(length, size, size, 3), np.arange(length, dtype=np.int64) % classes)

    # The moments of uniform bytes: mean 127.5, variance (256^2 - 1) / 12, no correlation.
    mean = np.full((size, size, 3), 127.5, np.float32)
    colour = ColourComponents(np.full(3, (256**2 - 1) / 12), np.eye(3))
    names = tuple(str(label) for label in range(classes))
    return ImageData(f"{SYNTHETIC}:{count}", split(count), split(max(1, count // 8)), names, mean, colour)
