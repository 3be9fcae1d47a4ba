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
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, UsageError
from ..fields import typed
from ..progress import Progress
from .folder import SPLITS
from .images import ColourComponents, ImageData, Split

FORMAT = 1
META = "meta.json"
#: Images that share a checksum.
CHUNK = 64
#: A store up to this size is checked whole when it is opened; of a larger one a few chunks are.
CHECKED_WHOLE = 256 * 2**20
_SAMPLED_CHUNKS = 16


def checksum(images: NDArray[np.uint8]) -> int:
    """The first 64 bits of the SHA-256 of the images' bytes."""
    content = np.ascontiguousarray(images).data
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def file_checksum(path: Path) -> str:
    """SHA-256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def small_files() -> tuple[str, ...]:
    """The files whose checksums stand in ``meta.json``."""
    return ("mean_image.npy", *(f"{split}_{part}.npy" for split in SPLITS for part in ("labels", "checksums")))


def is_store(path: Path) -> bool:
    """Whether ``path`` is a finished store."""
    return (path / META).is_file()


def read_meta(path: Path) -> dict[str, Any]:
    """What ``meta.json`` of the store says.

    Raises:
        DataError: it is missing, damaged, or of another format.
    """
    try:
        meta: dict[str, Any] = json.loads((path / META).read_text())
        if meta["format"] != FORMAT:
            raise DataError(f"{path / META}: format {meta['format']} is not {FORMAT}; prepare the images again")
        typed("image_size", meta["image_size"], int)
        for split in SPLITS:
            typed(f"counts of {split}", meta["counts"][split], int)
        typed("classes", meta["classes"], tuple[str, ...])
        if np.shape(meta["colour"]["values"]) != (3,) or np.shape(meta["colour"]["vectors"]) != (3, 3):
            raise ValueError("colour must hold 3 values and 3x3 vectors")
        for table in ("sha256", "source"):
            typed(table, meta[table], dict)
        typed("source's sha256", meta["source"]["sha256"], str)
    except FileNotFoundError:
        raise DataError(f"{path} is no finished store: it has no {META}; run python -m net.prepare again") from None
    except (ValueError, KeyError, TypeError, UsageError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DataError(f"{path / META} is damaged: {what}") from None
    return meta


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
    for name in small_files():
        if not (path / name).is_file():
            raise DataError(f"{path / name} is missing; prepare the images again")
        if file_checksum(path / name) != meta["sha256"].get(name):
            raise DataError(f"{path / name} is damaged: its checksum is not the one in {META}")
    size = meta["image_size"]
    splits = {}
    for split in SPLITS:
        images = _mapped(path / f"{split}_images.npy", (meta["counts"][split], size, size, 3))
        checksums = np.load(path / f"{split}_checksums.npy")
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
        splits[split] = Split(images, np.load(path / f"{split}_labels.npy"))
    colour = ColourComponents(np.array(meta["colour"]["values"]), np.array(meta["colour"]["vectors"]))
    mean = np.load(path / "mean_image.npy")
    return ImageData(os.path.abspath(path), splits["train"], splits["val"], tuple(meta["classes"]), mean, colour)


def _mapped(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    try:
        images: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be mapped: {error}") from None
    if images.dtype != np.uint8 or images.shape != shape:
        raise DataError(f"{path} holds {images.dtype} {images.shape}; {META} says uint8 {shape}")
    return images
