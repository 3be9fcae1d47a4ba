"""Estimates from a sample of a folder's images: whether all have one size, and the disk space that their store needs.

Also the errors for a disk with too little space.
"""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..common.errors import DataError
from ..common.printing import size_text
from ..readers.image import UnreadableImageError
from ..readers.members import Member
from ..readers.store import SPLITS
from .folder import Listing
from .packing import Packing, Task, pack, pixels_of

#: Images looked at.
_SAMPLED = 64


def _sample(listing: Listing) -> tuple[list[str], list[Member]]:
    """A few files spread over the splits, with their locations in an archive."""
    files = listing.files["train"] + listing.files["val"]
    chosen = [files[number] for number in np.linspace(0, len(files) - 1, min(len(files), _SAMPLED)).astype(int)]
    return chosen, [] if listing.members is None else [listing.members[file] for file in chosen]


def sampled_sizes(listing: Listing, size: int) -> set[tuple[int, int]]:
    """The rows and columns of a few of a folder's images, spread over it; larger ones than ``size`` may be reduced."""
    files, members = _sample(listing)
    # A larger JPEG image may be decoded at a fraction of its size, but never at less than size + 1.
    found = pixels_of(listing.root, files, members, size + 1)
    return {pixels.shape[:2] for pixels in found if not isinstance(pixels, UnreadableImageError)}


def all_have_size(listing: Listing, size: int) -> bool:
    """Whether a folder's images are ``size`` x ``size``, judged by :func:`sampled_sizes`."""
    return sampled_sizes(listing, size) == {(size, size)}


def note_enlarging(sizes: set[tuple[int, int]], size: int) -> None:
    """Print a note if all of :func:`sampled_sizes` are smaller than ``size``."""
    if sizes and (largest := max(map(min, sizes))) < size:
        print(
            f"note: the images seem to be {largest}x{largest} at most and are enlarged to {size}x{size}; net.prepare "
            "--size sets this"
        )


def needed_bytes(listing: Listing, packing: Packing) -> int:
    """The size of the finished store; for JPEG, estimated from a few images spread over the splits."""
    count = sum(len(listing.files[split]) for split in SPLITS)
    each = packing.size**2 * 3
    if packing.quality is not None:
        files, members = _sample(listing)
        done = pack(Task("val", 0, listing.root, files, members, packing, Path(), 0))
        lengths = [len(content) for content in done.encoded if content]
        each = round(np.mean(lengths)) + 16 if lengths else 0
    return count * (each + 8) + packing.size**2 * 12 + 2**20


def check_space(target: Path, needed: int, packing: Packing) -> None:
    """Check that a store fits on the disk of ``target``, with what is there already.

    Raises:
        DataError: it does not.
    """
    folder = target
    while not folder.exists():
        folder = folder.parent
    have = sum(file.stat().st_blocks * 512 for file in target.glob("*_images.*")) if target.exists() else 0
    free = shutil.disk_usage(folder).free
    if needed - have > free:
        about = "" if packing.quality is None else "about "
        raise DataError(
            f"the store needs {about}{size_text(needed)} in {target} and the disk has {size_text(free)} free; give "
            "another folder or free some space"
        )


@contextlib.contextmanager
def full_disk_named(target: Path) -> Iterator[None]:
    """Inside a ``with`` block, replace the error for a full disk, that of ``target``, by one that says how to continue.

    Raises:
        DataError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(
            f"{error.filename or target}: {error.strerror}; free some space and run the same command again, which goes "
            "on from the images that are stored"
        ) from None
