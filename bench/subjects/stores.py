"""Stores of images for the loader, written at once: without a folder, checksums or a mean image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from net.data.images import Split
from net.data.jpeg import JpegImages
from net.readers.store import PackedFiles


def pixels(path: Path, count: int, size: int) -> Split:
    """Mapped images ``[count, size, size, 3]`` in uint8, each of a single value, in the page cache.

    Args:
        path: the ``.npy`` file to write.
        count: images; labels are their numbers.
        size: rows and columns.
    """
    written = np.lib.format.open_memmap(path, "w+", np.uint8, (count, size, size, 3))
    written[:] = np.arange(count, dtype=np.uint8)[:, None, None, None]
    del written
    return Split(np.load(path, mmap_mode="r"), np.arange(count, dtype=np.int64))


def jpegs(path: Path, files: Sequence[bytes], size: int) -> JpegImages:
    """Images that are decoded from JPEG files, one after the other in a file.

    Args:
        path: the file to write.
        files: the content of each JPEG file.
        size: rows and columns of the images.
    """
    path.write_bytes(b"".join(files))
    lengths = np.array([len(file) for file in files])
    index = np.stack([lengths.cumsum() - lengths, lengths], 1)
    return JpegImages(PackedFiles(path, index, int(lengths.max())), size)
