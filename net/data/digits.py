"""The embedded data set: 1,797 real handwritten digits (UCI optical recognition set, see digits.LICENSE)."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .images import ImageData, Split, statistics

SIZE = 32
#: Every fifth image of a class is for validation.
VALIDATION_STEP = 5


def _resized(gray: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(gray).resize((columns, rows), Image.Resampling.BICUBIC))


def load() -> ImageData:
    """The digits enlarged to 32x32 RGB: 1,442 for training and 355 for validation, stratified by class."""
    with np.load(Path(__file__).with_name("digits.npz")) as archive:
        small, labels = archive["images"], archive["labels"].astype(np.int64)
    gray = np.minimum(small.astype(np.uint16) * 16, 255).astype(np.uint8)
    # Resize all digits at once: stacked vertically to interpolate columns, then horizontally to interpolate rows.
    count, rows, columns = gray.shape
    wide = _resized(gray.reshape(count * rows, columns), count * rows, SIZE).reshape(count, rows, SIZE)
    large = _resized(wide.transpose(1, 0, 2).reshape(rows, count * SIZE), SIZE, count * SIZE)
    images = np.repeat(large.reshape(SIZE, count, SIZE).transpose(1, 0, 2)[..., None], 3, axis=3)
    validation = np.zeros(len(labels), bool)
    for label in range(10):
        validation[np.flatnonzero(labels == label)[VALIDATION_STEP - 1 :: VALIDATION_STEP]] = True
    train = Split(images[~validation], labels[~validation])
    val = Split(images[validation], labels[validation])
    mean, colour = statistics(images[~validation])
    return ImageData(None, train, val, tuple("0123456789"), mean, colour)
