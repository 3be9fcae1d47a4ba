"""The work of a packing process: decode a chunk of files, then write pixels or encode JPEG."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..common.allocator import keep_freed_memory
from ..readers.files import opened
from ..readers.image import UnreadableImageError, decoder, encode_jpeg, pillow
from ..readers.members import Member, read_member
from .decode import read_pixels, square
from .images import PixelStatistics
from .store import checksum


@dataclass(frozen=True)
class Packing:
    """How images are packed: rows and columns, and the JPEG quality; None for pixels."""

    size: int
    quality: int | None = None

    @property
    def kind(self) -> str:
        """``pixels`` or ``jpeg``."""
        return "pixels" if self.quality is None else "jpeg"

    def __str__(self) -> str:
        kept = "as pixels" if self.quality is None else f"in JPEG of quality {self.quality}"
        return f"images of {self.size}x{self.size} {kept}"

    @property
    def key(self) -> str:
        """What an interrupted run and the run that continues it must have in common."""
        return f"{self.size} {pillow()}" if self.quality is None else f"{self.size} {self.quality} {decoder()}"


@dataclass(frozen=True)
class Task:
    """Consecutive images of a split that share one checksum, and their destination.

    ``members`` gives the files' locations in the archive ``root``; it is empty for a folder. Pixels are written into
    the file ``path`` starting at ``offset``. JPEG files are returned, because their offsets depend on earlier ones.
    """

    split: str
    chunk: int
    root: Path
    files: list[str]
    members: list[Member]
    packing: Packing
    path: Path
    offset: int


@dataclass
class Done:
    """A task's result: the reason for each skipped file (empty for the others), sums, checksum, and the number of
    images that were enlarged. ``encoded`` are JPEG files, empty for skipped ones."""

    split: str
    chunk: int
    reasons: list[str]
    enlarged: int
    statistics: PixelStatistics | None
    checksum: int
    encoded: list[bytes]


def pixels_of(
    root: Path, files: list[str], members: list[Member], size: int
) -> Iterator[NDArray[np.uint8] | UnreadableImageError]:
    """The pixels of each file, or why it cannot be read; see :func:`net.data.decode.read_pixels`.

    Args:
        root, files, members: as in :class:`Task`.
        size: a JPEG image may be decoded at a fraction of its size, but no smaller than this.
    """
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(opened(root, "archive", limit=2**63)) if members else None
        for number, file in enumerate(files):
            try:
                place = os.path.join(root, file)
                yield read_pixels(place if archive is None else read_member(archive, members[number]), size)
            except UnreadableImageError as error:
                yield error


def _decoded(task: Task) -> tuple[NDArray[np.uint8], list[str], int]:
    """A task's images, with zeros for skipped files; the reasons; and the number of enlarged images."""
    size = task.packing.size
    images = np.zeros((len(task.files), size, size, 3), np.uint8)
    reasons, enlarged = [], 0
    for number, pixels in enumerate(pixels_of(task.root, task.files, task.members, size)):
        if isinstance(pixels, UnreadableImageError):
            reasons.append(str(pixels))
            continue
        images[number] = square(pixels, size)
        enlarged += min(pixels.shape[:2]) < size
        reasons.append("")
    return images, reasons, enlarged


def write_at(path: Path, offset: int, content: bytes | memoryview) -> None:
    """Write to a file at an offset.

    Raises:
        OSError: with the file's name.
    """
    try:
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(content)
    except OSError as error:
        # The error for a full disk does not name the file.
        error.filename = str(path)
        raise


def pack(task: Task) -> Done:
    """Decode a task's files, and write the pixels to their offset or encode them."""
    images, reasons, enlarged = _decoded(task)
    encoded: list[bytes] = []
    if task.packing.quality is None:
        write_at(task.path, task.offset, images.data)
    else:
        quality = task.packing.quality
        encoded = [
            b"" if reason else encode_jpeg(image, quality) for image, reason in zip(images, reasons, strict=True)
        ]
    statistics = None
    if task.split == "train":
        statistics = PixelStatistics(task.packing.size)
        statistics.add(images[[not reason for reason in reasons]])
    return Done(task.split, task.chunk, reasons, enlarged, statistics, checksum(encoded or images), encoded)


def start_worker() -> None:
    """Initialize a worker process, which uses one thread."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
    # Read when PyTorch is imported later.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    keep_freed_memory()
