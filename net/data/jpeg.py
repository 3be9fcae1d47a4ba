"""Images that stay JPEG in memory or in a store, and are decoded on access."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..common.errors import DataError
from ..readers.image import UnreadableImageError, decode_jpeg
from ..readers.store import PackedFiles


class JpegImages:
    """Acts like a uint8 array ``[count, size, size, 3]``, decoding images on access in the reading thread.

    Args:
        files: the JPEG files.
        size: rows and columns of each.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, files: PackedFiles, size: int) -> None:
        self.files = files
        self.shape = (len(files), size, size, 3)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded images."""
        return int(np.prod(self.shape, dtype=object))

    def take(
        self, samples: Sequence[int] | NDArray[np.int64], axis: int, out: NDArray[np.uint8], mode: str
    ) -> NDArray[np.uint8]:
        """Decode the images ``samples`` into ``out``, like ``numpy.ndarray.take`` with these arguments.

        Raises:
            DataError: an image is damaged.
        """
        for sample, pixels in zip(samples, out, strict=True):
            try:
                decode_jpeg(self.files[int(sample)], pixels)
            except UnreadableImageError as error:
                raise DataError(
                    f"{self.files.path}: image {sample} cannot be decoded: {error}; net.prepare --verify checks all"
                ) from None
        return out

    def __getitem__(self, rows: int | slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        samples: Sequence[int] | NDArray[np.int64]
        if isinstance(rows, (int, np.integer)):
            samples = [int(rows)]
        elif isinstance(rows, slice):
            samples = range(len(self))[rows]
        else:
            samples = np.arange(len(self))[rows]
        found = self.take(samples, 0, np.empty((len(samples), *self.shape[1:]), np.uint8), "clip")
        return found[0] if isinstance(rows, (int, np.integer)) else found
