"""CIFAR-10 from its published archives or from the unpacked folders, in the Python or the binary version."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..common.errors import DataError
from ..readers.archive import batch, read_batch, read_members
from ..readers.members import members
from .images import ImageData, Split, statistics

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST = "test_batch"


def _split(read: Callable[[str], bytes], names: tuple[str, ...], path: Path) -> Split:
    images, labels = zip(*(batch(path, name, read(name)) for name in names), strict=True)
    return Split(np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels))


def _holds_batches(path: Path) -> bool:
    """Whether a ``.tar`` named CIFAR-10 holds batches, not an image folder made from them."""
    try:
        files, _ = members(path)
    except DataError:
        return True
    return any(Path(name).name.startswith(_TRAIN[0]) for name in files)


def find(path: Path) -> Path | None:
    """The archive, or the folder with the batches, that ``path`` is or contains; None if it is not CIFAR-10."""
    if path.is_file():
        if not path.name.startswith("cifar-10") or not path.name.endswith((".tar.gz", ".tgz", ".tar")):
            return None
        return path if path.suffix != ".tar" or _holds_batches(path) else None
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
        if (folder / "data_batch_1").is_file() or (folder / "data_batch_1.bin").is_file():
            return folder
    for archive in ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"):
        if (path / archive).is_file():
            return path / archive
    return None


def load(path: Path) -> ImageData:
    """Read the five training batches and the test batch, which serves for validation.

    Args:
        path: what :func:`find` returned.

    Raises:
        DataError: a batch is missing or differs in form from the published files.
    """
    packed = path.is_file()
    names = [*_TRAIN, _TEST]
    found = read_members(path, (*names, *(f"{name}.bin" for name in names))) if packed else {}

    def read(name: str) -> bytes:
        if packed and name not in found:
            raise DataError(f"{path} holds no {name}; the published CIFAR-10 archives do")
        return found[name] if packed else read_batch(path, name)

    ending = ".bin" if "data_batch_1.bin" in found or (path / "data_batch_1.bin").is_file() else ""
    train = _split(read, tuple(name + ending for name in _TRAIN), path)
    val = _split(read, (_TEST + ending,), path)
    mean, colour = statistics(np.asarray(train.images))
    return ImageData(os.path.abspath(path), train, val, CLASSES, mean, colour)
