"""Which data a path means."""

from pathlib import Path

from ..common.errors import DataError, UsageError
from ..doors.members import is_archive
from . import cifar10, digits, synthetic
from .folder import is_image_folder
from .images import ImageData
from .prepare import prepare
from .store import is_store, open_store

#: Images are packed a little larger than the network's input, for the crops: 256 for 224 (section 4.1).
PACKED_RATIO = 256 / 224


def packed_size(image_size: int) -> int:
    """Rows and columns of the images packed for a network: 256 for the usual 224 and 227, else in the paper's ratio."""
    return 256 if image_size in (224, 227) else round(image_size * PACKED_RATIO)


def open_data(
    path: str | None,
    *,
    image_size: int,
    classes: int,
    store: str | None = None,
    val_labels: str | None = None,
    workers: int | None = None,
) -> ImageData:
    """Open the data set that ``path`` names, and pack an image folder, or an archive of one, first.

    Args:
        path: None for the embedded digits; an image folder or an archive of one, a packed store, CIFAR-10, or
            ``synthetic[:COUNT]``.
        image_size: rows and columns of the network's input; decides the size of images that are packed or made up.
        classes: classes of random images.
        store: where an image folder is packed; None is ``PATH.packed``.
        val_labels: label file of a flat validation folder.
        workers: processes that pack.

    Raises:
        DataError: nothing there, or something that is none of these.
    """
    if path is None:
        return digits.load()
    count = synthetic.parse(path)
    if count is not None:
        return synthetic.load(count, packed_size(image_size), classes)
    place = Path(path)
    if not place.exists():
        raise DataError(f"--data-path {path} does not exist")
    if is_store(place):
        if store is not None:
            raise UsageError(f"--store {store} goes with an image folder, and {path} is a packed store already")
        return open_store(place)
    if (archive := cifar10.find(place)) is not None:
        return cifar10.load(archive)
    if is_image_folder(place) if place.is_dir() else is_archive(place):
        target = Path(store) if store is not None else place.with_name(place.name + ".packed")
        labels = None if val_labels is None else Path(val_labels)
        size = packed_size(image_size)
        prepare(place, target, size=size, any_kind=True, val_labels=labels, workers=workers)
        return open_store(target)
    if place.is_dir() and not any(place.iterdir()):
        raise DataError(f"--data-path {path} is empty")
    raise DataError(
        f"--data-path {path} is no image folder (train/CLASS/*, val/CLASS/*) and no .tar or .zip of one, no packed "
        "store and no CIFAR-10"
    )
