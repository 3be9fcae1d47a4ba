"""What every data source provides: labelled images of one size, and the statistics of the training pixels."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..common import seeds
from ..common.printing import printable
from .config import SHAPES, SYNTHETIC
from .jpeg import JpegImages


@dataclass(frozen=True)
class Split:
    """``images`` is uint8 ``[count, size, size, 3]`` in RGB, in memory, mapped from a file, or decoded as it is read;
    ``labels`` int64."""

    images: NDArray[np.uint8] | JpegImages
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            raise ValueError(
                f"images must be uint8 [count, rows, columns, 3]; got {self.images.dtype} {self.images.shape}"
            )
        if len(self.images) != len(self.labels):
            raise ValueError(f"there are {len(self.images)} images and {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ColourComponents:
    """Principal components of the training images' RGB pixels, in gray levels 0..255 (section 4.1).

    ``values`` holds the covariance's eigenvalues, largest first, ``vectors[:, i]`` the unit eigenvector of
    ``values[i]``.
    """

    values: NDArray[np.float64]
    vectors: NDArray[np.float64]


def hold_out(labels: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the images of a split in two, stratified by class as far as whole images allow.

    Args:
        labels: of the split, int64 ``[images]``.
        count: images in the second part.

    Returns:
        Image numbers, int64, increasing: those that stay, and the ``count`` that are held out.
    """
    if not count:
        return np.arange(len(labels)), np.empty(0, np.int64)
    shuffled = seeds.held_out().permutation(len(labels))
    own = labels[shuffled]
    by_class, sizes = np.argsort(own, kind="stable"), np.bincount(own)
    # An image's position among those of its class, from 0 to 1: a threshold takes the same share of every class.
    rank = np.arange(len(own)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    places = np.empty(len(own))
    places[by_class] = (rank + 0.5) / np.repeat(sizes, sizes)
    order = shuffled[np.argsort(places, kind="stable")]
    return np.sort(order[count:]), np.sort(order[:count])


#: What net.train appends to the name of a folder when it packs its images.
_PACKED = re.compile(r"(?<=.)(\.\d+x\d+)?\.packed$")


def short_name(path: str | None, classes: tuple[str, ...]) -> str:
    """A data set's name in figures: that of its folder, archive or store; rendered images are called synthetic."""
    if path is None:
        return "embedded digits"
    if classes == SHAPES:
        return "synthetic shapes"
    return "synthetic noise" if path.partition(":")[0] == SYNTHETIC else printable(_PACKED.sub("", Path(path).name))


@dataclass(frozen=True)
class ImageData:
    """A data set.

    ``path`` is the ``--data-path`` that opens it again, None for the embedded digits. ``mean`` is the training images'
    mean, float32 ``[size, size, 3]`` in gray levels 0..255. ``decoder`` names what decodes images when they are read,
    with its version and the quality they were encoded with; None if they are stored as pixels.
    """

    path: str | None
    train: Split
    val: Split
    classes: tuple[str, ...]
    mean: NDArray[np.float32]
    colour: ColourComponents
    decoder: str | None = None

    @property
    def name(self) -> str:
        """Its name in messages; rendered images are called synthetic."""
        if self.path is None:
            return "the embedded digits"
        path = printable(self.path)
        return f"{path} (synthetic shapes)" if self.classes == SHAPES else path

    @property
    def short_name(self) -> str:
        """Its name in figures; see :func:`short_name`."""
        return short_name(self.path, self.classes)

    @property
    def synthetic(self) -> bool:
        """Whether this program generated the images."""
        return self.path is not None and (self.path.partition(":")[0] == SYNTHETIC or self.classes == SHAPES)

    @property
    def size(self) -> int:
        """Rows and columns of an image."""
        return int(self.mean.shape[0])


#: Bytes of images summed at a time: as many as fit into the caches in float32.
_SUMMED_BYTES = 2**18


class PixelStatistics:
    """Mean image and colour covariance, summed up in integers: the order of the images does not matter."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.total = np.zeros((size, size, 3), np.int64)
        #: Sum over all pixels of the outer product of the colour with itself.
        self.gram = np.zeros((3, 3), np.int64)

    def add(self, images: NDArray[np.uint8]) -> None:
        """Add images, uint8 ``[count, size, size, 3]``."""
        gram = np.zeros((3, 3), np.int64)
        step = max(1, _SUMMED_BYTES // self.total.size)
        for first in range(0, len(images), step):
            rows = images[first : first + step].astype(np.float32).reshape(-1, self.total.shape[1], 3)
            planes = np.ascontiguousarray(rows.transpose(2, 0, 1))
            for one, other in itertools.combinations_with_replacement(range(3), 2):
                # One sum per row of pixels, since a sum of up to 258 products of bytes is exact in float32.
                products = np.einsum("ij,ij->i", planes[one], planes[other])
                gram[one, other] += int(products.sum(dtype=np.float64))
        self.gram += gram + np.triu(gram, 1).T
        self.count += len(images)
        self.total += images.sum(0, dtype=np.uint32)

    def merge(self, other: "PixelStatistics") -> None:
        """Add the sums of ``other``."""
        self.count += other.count
        self.total += other.total
        self.gram += other.gram

    def mean(self) -> NDArray[np.float32]:
        """The mean image, float32 ``[size, size, 3]``."""
        return (self.total / self.count).astype(np.float32)

    def colour(self) -> ColourComponents:
        """The principal components of the pixels' colours; a vector's largest entry is positive."""
        pixels = self.count * self.total.shape[0] * self.total.shape[1]
        mean = self.total.sum((0, 1)) / pixels
        covariance = self.gram / pixels - np.outer(mean, mean)
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
        largest = np.abs(vectors).argmax(0)
        signs = np.sign(vectors[largest, np.arange(3)])
        return ColourComponents(values, vectors * signs)


def statistics(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ColourComponents]:
    """Mean image and colour components of images in memory."""
    result = PixelStatistics(images.shape[1])
    result.add(images)
    return result.mean(), result.colour()
