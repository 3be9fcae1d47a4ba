"""The embedded data set: 1,797 real handwritten digits (UCI optical recognition set, see digits.LICENSE)."""

from pathlib import Path

import numpy as np
from PIL import Image

from .images import ImageData, Split, statistics

SIZE = 32
#: Every fifth image of a class is for validation.
VALIDATION_STEP = 5


def load() -> ImageData:
    """The digits enlarged to 32x32 RGB: 1,442 for training and 355 for validation, stratified by class."""
    with np.load(Path(__file__).with_name("digits.npz")) as archive:
        small, labels = archive["images"], archive["labels"].astype(np.int64)
    images = np.empty((len(small), SIZE, SIZE, 3), np.uint8)
    for target, digit in zip(images, small, strict=True):
        gray = Image.fromarray(np.minimum(digit.astype(np.uint16) * 16, 255).astype(np.uint8))
        target[:] = np.asarray(gray.resize((SIZE, SIZE), Image.Resampling.BICUBIC))[:, :, None]
    validation = np.zeros(len(labels), bool)
    for label in range(10):
        validation[np.flatnonzero(labels == label)[VALIDATION_STEP - 1 :: VALIDATION_STEP]] = True
    train = Split(images[~validation], labels[~validation])
    val = Split(images[validation], labels[validation])
    mean, colour = statistics(images[~validation])
    return ImageData(None, train, val, tuple("0123456789"), mean, colour)
