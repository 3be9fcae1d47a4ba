"""The packed store: a folder with every image of a data set at one size, ready to be mapped into memory.

=========================  ===========================================================================================
``meta.json``              format, image size, counts, class names, colour components, checksums, where it came from
``train_images.npy``       uint8 ``[count, size, size, 3]``, RGB; also ``val_images.npy``
``train_labels.npy``       int64 ``[count]``; also ``val_labels.npy``
``train_checksums.npy``    uint64, one for each ``CHUNK`` images; also ``val_checksums.npy``
``mean_image.npy``         float32 ``[size, size, 3]``, the training images' mean in gray levels 0..255
``skipped.txt``            files that were left out, each with the reason
=========================  ===========================================================================================

``meta.json`` is written last: a folder without it is not finished.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import DataError
from ..common.progress import Progress
from ..doors.store import CHUNK, META, SPLITS, mapped_images, read_array, read_meta
from .images import ColourComponents, ImageData, Split

#: A store up to this size is checked whole when it is opened; of a larger one a few chunks are.
CHECKED_WHOLE = 256 * 2**20
_SAMPLED_CHUNKS = 16


def checksum(images: NDArray[np.uint8]) -> int:
    """The first 64 bits of the SHA-256 of the images' bytes."""
    content = np.ascontiguousarray(images).data
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def small_files() -> tuple[str, ...]:
    """The files whose checksums stand in ``meta.json``."""
    return ("mean_image.npy", *(f"{split}_{part}.npy" for split in SPLITS for part in ("labels", "checksums")))


def is_store(path: Path) -> bool:
    """Whether ``path`` is a finished store."""
    return (path / META).is_file()


def open_store(path: Path, *, whole: bool = False) -> ImageData:
    """Map a store into memory.

    Args:
        path: the folder.
        whole: compare every chunk of images with its checksum. Without it a small store is compared whole, and of a
            large one a few chunks spread over each split.

    Raises:
        DataError: something is missing or not as ``meta.json`` says.
    """
    meta = read_meta(path)
    size, classes = meta["image_size"], tuple(meta["classes"])

    def array(name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
        return read_array(path / name, dtype, shape, meta["sha256"].get(name))

    splits = {}
    for split in SPLITS:
        count = meta["counts"][split]
        images = mapped_images(path / f"{split}_images.npy", (count, size, size, 3))
        checksums = array(f"{split}_checksums.npy", np.uint64, (-(-count // CHUNK),))
        labels = array(f"{split}_labels.npy", np.int64, (count,))
        if labels.min() < 0 or labels.max() >= len(classes):
            wrong = int(np.flatnonzero((labels < 0) | (labels >= len(classes)))[0])
            raise DataError(
                f"{path / f'{split}_labels.npy'}: image {wrong} has the label {labels[wrong]}; there are "
                f"{len(classes)} classes"
            )
        chunks: Sequence[int] = range(len(checksums))
        if not whole and images.nbytes > CHECKED_WHOLE:
            chunks = sorted({round(chunk) for chunk in np.linspace(0, len(checksums) - 1, _SAMPLED_CHUNKS)})
        with Progress(f"{split} images checked", len(chunks) * CHUNK) as progress:
            for chunk in chunks:
                rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
                if checksum(images[rows]) != checksums[chunk]:
                    raise DataError(
                        f"{path / f'{split}_images.npy'} is damaged: the checksum of images {rows.start} to "
                        f"{min(rows.stop, len(images)) - 1} is wrong; prepare the images again"
                    )
                progress.update(CHUNK)
        splits[split] = Split(images, labels)
    colour = ColourComponents(np.array(meta["colour"]["values"], float), np.array(meta["colour"]["vectors"], float))
    mean = array("mean_image.npy", np.float32, (size, size, 3))
    if not ((mean >= 0) & (mean <= 255)).all():
        raise DataError(f"{path / 'mean_image.npy'} holds values that are not in 0..255; prepare the images again")
    return ImageData(os.path.abspath(path), splits["train"], splits["val"], classes, mean, colour)
