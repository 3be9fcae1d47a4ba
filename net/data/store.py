"""The packed store: a folder with every image of a data set at one size, ready to be read in any order.

=========================  ===========================================================================================
``meta.json``              format, image size, counts, class names, colour components, checksums, origin
``train_images.npy``       uint8 ``[count, size, size, 3]``, RGB; also ``val_images.npy``
``train_labels.npy``       int64 ``[count]``; also ``val_labels.npy``
``train_checksums.npy``    uint64, one per ``CHUNK`` images; also ``val_checksums.npy``
``mean_image.npy``         float32 ``[size, size, 3]``, the training images' mean in gray levels 0..255
``skipped.txt``            skipped files, each with the reason
=========================  ===========================================================================================

A store of JPEG images has these files instead of ``train_images.npy`` and ``val_images.npy``; ``meta.json`` records the
encoder's quality and library. Image numbers, mean and colour components are those of a pixel store of the same images.

=========================  ===========================================================================================
``train_images.jpegs``     JPEG files one after the other, ``size`` x ``size`` in 4:4:4; also ``val_images.jpegs``
``train_index.npy``        int64 ``[count, 2]``: where each begins, and its length; also ``val_index.npy``
=========================  ===========================================================================================

``meta.json`` is written last, so a folder without it is incomplete.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import DataError
from ..common.printing import printable
from ..common.progress import Progress
from ..readers.image import decoder
from ..readers.store import CHUNK, FORMATS, META, SPLITS, PackedFiles, mapped_images, read_array, read_meta
from .images import ColourComponents, ImageData, Split
from .jpeg import JpegImages

#: A store up to this size is checked completely when opened; only a few chunks of a larger one are.
CHECKED_WHOLE = 256 * 2**20
_SAMPLED_CHUNKS = 16


def checksum(images: Iterable[NDArray[np.uint8] | bytes]) -> int:
    """The first 64 bits of the SHA-256 of contiguous images."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(image if isinstance(image, bytes) else image.data)
    return int.from_bytes(digest.digest()[:8], "little")


def images_file(split: str, kind: str) -> str:
    """The name of the file with a split's images; ``kind`` is ``pixels`` or ``jpeg``."""
    return f"{split}_images.{'jpegs' if kind == 'jpeg' else 'npy'}"


def small_files(kind: str) -> tuple[str, ...]:
    """The files whose checksums are in ``meta.json``."""
    parts = ("labels", "checksums", *(("index",) if kind == "jpeg" else ()))
    return ("mean_image.npy", *(f"{split}_{part}.npy" for split in SPLITS for part in parts))


def kind_of(meta: dict[str, Any]) -> str:
    """``pixels`` or ``jpeg``."""
    return next(kind for kind, number in FORMATS.items() if number == meta["format"])


def largest_jpeg(size: int) -> int:
    """An upper bound in bytes: larger than a JPEG image of noise at the highest quality."""
    return 12 * size * size + 2**16


def is_store(path: Path) -> bool:
    """Whether ``path`` is a finished store."""
    return (path / META).is_file()


def open_store(path: Path, *, whole: bool = False, note: bool = True) -> ImageData:
    """Map a store into memory, or open its JPEG images. Prints a note if another decoder packed them.

    Args:
        path: the folder.
        note: whether to print it.
        whole: compare every chunk of images with its checksum. Otherwise a small store is compared completely, and a
            large one in a few chunks spread over each split.

    Raises:
        DataError: something is missing or does not match ``meta.json``, or JPEG cannot be decoded here.
    """
    meta = read_meta(path)
    size, classes, kind = meta["image_size"], tuple(meta["classes"]), kind_of(meta)
    decodes = None
    if kind == "jpeg":
        here, packed_by = decoder(), meta["jpeg"]["decoder"]
        decodes = f"{here}, quality {meta['jpeg']['quality']}"
        if note and here != packed_by:
            print(
                f"note: {path} was packed with {printable(packed_by)} and is decoded by {here}: pixels may differ by "
                "a few gray levels from those that other runs on it have seen"
            )

    def array(name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
        return read_array(path / name, dtype, shape, meta["sha256"].get(name))

    splits = {}
    for split in SPLITS:
        count = meta["counts"][split]
        place = path / images_file(split, kind)
        images: NDArray[np.uint8] | JpegImages
        content: NDArray[np.uint8] | PackedFiles
        if kind == "jpeg":
            content = PackedFiles(place, array(f"{split}_index.npy", np.int64, (count, 2)), largest_jpeg(size))
            images, stored = JpegImages(content, size), int(content.index[:, 1].sum())
        else:
            images = content = mapped_images(place, (count, size, size, 3))
            stored = images.nbytes
        checksums = array(f"{split}_checksums.npy", np.uint64, (-(-count // CHUNK),))
        labels = array(f"{split}_labels.npy", np.int64, (count,))
        if labels.min() < 0 or labels.max() >= len(classes):
            wrong = int(np.flatnonzero((labels < 0) | (labels >= len(classes)))[0])
            raise DataError(
                f"{path / f'{split}_labels.npy'}: image {wrong} has the label {labels[wrong]}; there are "
                f"{len(classes)} classes"
            )
        chunks: Sequence[int] = range(len(checksums))
        if not whole and stored > CHECKED_WHOLE:
            chunks = sorted({round(chunk) for chunk in np.linspace(0, len(checksums) - 1, _SAMPLED_CHUNKS)})
        with Progress(f"{split} images checked", len(chunks) * CHUNK) as progress:
            for chunk in chunks:
                first, stop = chunk * CHUNK, min((chunk + 1) * CHUNK, count)
                if checksum(content[number] for number in range(first, stop)) != checksums[chunk]:
                    raise DataError(
                        f"{place} is damaged: the checksum of images {first} to {stop - 1} is wrong; prepare the "
                        "images again"
                    )
                progress.update(CHUNK)
        splits[split] = Split(images, labels)
    colour = ColourComponents(np.array(meta["colour"]["values"], float), np.array(meta["colour"]["vectors"], float))
    mean = array("mean_image.npy", np.float32, (size, size, 3))
    if not ((mean >= 0) & (mean <= 255)).all():
        raise DataError(f"{path / 'mean_image.npy'} holds values that are not in 0..255; prepare the images again")
    return ImageData(os.path.abspath(path), splits["train"], splits["val"], classes, mean, colour, decodes)
