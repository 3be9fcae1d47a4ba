"""CIFAR-10 from its published archives or from the folders they unpack to, in the python or the binary version."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .images import ImageData, Split, statistics

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_PIXELS = 3 * 32 * 32


class _ArrayUnpickler(pickle.Unpickler):
    """Reads what the published files hold, numpy arrays and plain containers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _python_batch(content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    return np.asarray(batch[b"data"], np.uint8), np.asarray(batch[b"labels"], np.int64)


def _binary_batch(content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _split(read: Callable[[str], bytes], names: tuple[str, ...], binary: bool, path: Path) -> Split:
    images, labels = [], []
    for name in names:
        file = name + ".bin" if binary else name
        content = read(file)
        try:
            pixels, truth = (_binary_batch if binary else _python_batch)(content)
            if not len(truth) or len(truth) != len(pixels) or truth.min() < 0 or truth.max() >= len(CLASSES):
                raise ValueError("labels are not 0 to 9")
            # Planes of red, green and blue, each row by row.
            images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        except Exception as error:
            raise DataError(f"{path}: {file} is not a batch of CIFAR-10: {error}") from None
        labels.append(truth)
    return Split(np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels))


def find(path: Path) -> Path | None:
    """The archive, or the folder with the batches, that ``path`` is or holds; None if it is no CIFAR-10."""
    if path.is_file():
        return path if path.name.startswith("cifar-10") and path.name.endswith((".tar.gz", ".tgz", ".tar")) else None
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
        DataError: a batch is missing or is not what the published files hold.
    """
    members: dict[str, bytes] = {}
    if path.is_file():
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    file = archive.extractfile(member) if member.isfile() else None
                    if file is not None:
                        members[Path(member.name).name] = file.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{path} is not a whole tar archive: {error}") from None

    def read(name: str) -> bytes:
        if path.is_file():
            if name not in members:
                raise DataError(f"{path} holds no {name}; the published CIFAR-10 archives do")
            return members[name]
        if not (path / name).is_file():
            raise DataError(f"{path / name} is missing; unpack the whole CIFAR-10 archive")
        return (path / name).read_bytes()

    binary = "data_batch_1.bin" in members or (path / "data_batch_1.bin").is_file()
    train = _split(read, _TRAIN, binary, path)
    val = _split(read, ("test_batch",), binary, path)
    mean, colour = statistics(train.images)
    return ImageData(os.path.abspath(path), train, val, CLASSES, mean, colour)
