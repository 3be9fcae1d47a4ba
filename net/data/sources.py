"""Opens the data set that a path refers to."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..common.errors import DataError, UsageError
from ..readers.members import is_archive
from ..readers.store import read_meta
from . import cifar10, digits, synthetic
from .folder import is_image_folder, listed
from .images import ImageData
from .prepare import prepare
from .sampling import all_have_size
from .store import is_store, open_store

#: Images are packed slightly larger than the network's input, for the crops: 256 for 224 (section 4.1).
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
    stored: int | None = None,
    workers: int | None = None,
    note: bool = True,
) -> ImageData:
    """Open the data set at ``path``; an image folder, or an archive of one, is packed first, once for each size.

    Args:
        path: None for the embedded digits; an image folder or an archive of one, a packed store, CIFAR-10, or
            ``synthetic[:COUNT]``.
        image_size: rows and columns of the network's input. Images of this size are packed as they are, others at
            :func:`packed_size`, at which random images are generated too.
        classes: number of classes of random images.
        store: where to pack an image folder; None for ``PATH.SIZExSIZE.packed``, or ``PATH.packed`` if that is a store
            of the right size.
        val_labels: label file of a flat validation folder.
        stored: rows and columns at which an image folder is packed, if a network was trained on such images.
        workers: number of packing processes.
        note: whether to print a note if another decoder packed the images.

    Raises:
        DataError: there is nothing at ``path``, or something else. UsageError: ``store`` or ``val_labels`` was given,
            but nothing is packed.
    """
    load: Callable[[], ImageData]
    place = Path(path or "")
    if path is None:
        what, load = "the embedded digits are none", digits.load
    elif (count := synthetic.parse(path)) is not None:
        what, load = f"{path} is none", partial(synthetic.load, count, packed_size(image_size), classes)
    elif not place.exists():
        raise DataError(f"--data-path {path} does not exist")
    elif is_store(place):
        what, load = f"{path} is a packed store already", partial(open_store, place, note=note)
    elif (archive := cifar10.find(place)) is not None:
        what, load = f"{path} is CIFAR-10", partial(cifar10.load, archive)
    elif is_image_folder(place) if place.is_dir() else is_archive(place):
        listing = listed(place, None if val_labels is None else Path(val_labels))
        usual = packed_size(image_size)
        # Images of the network's own size stay as they are: enlarging and cropping them would be another task.
        size = stored or (image_size if all_have_size(listing, image_size) else usual)
        beside = f"{os.path.abspath(path)}.{size}x{size}.packed"
        target = Path(os.path.abspath(path) + ".packed" if store is None else store)
        there = read_meta(target)["image_size"] if is_store(target) else None
        if there == usual != size and stored is None:
            print(
                f"note: {target} holds the {size}x{size} images enlarged to {usual}x{usual}, as earlier versions "
                f"packed them; net.train --store {beside} packs them as they are"
            )
            size = usual
        elif store is None and there != size:
            target = Path(beside)
        prepare(listing, target, size=size, any_kind=True, workers=workers)
        return open_store(target, note=note)
    elif place.is_dir() and not any(place.iterdir()):
        raise DataError(f"--data-path {path} is empty")
    else:
        raise DataError(
            f"--data-path {path} is no image folder (train/CLASS/*, val/CLASS/*) and no .tar or .zip of one, no packed "
            "store and no CIFAR-10"
        )
    for flag, value in (("--store", store), ("--val-labels", val_labels)):
        if value is not None:
            raise UsageError(f"{flag} {value} goes with an image folder, and {what}")
    return load()
