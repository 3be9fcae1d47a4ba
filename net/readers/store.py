"""Reading a packed store: ``meta.json``, and arrays that are checked against it.

The layout is in :mod:`net.data.store`, which assembles the parts.
"""

import hashlib
import io
import json
import math
import os
import threading
import weakref
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..common.errors import DataError, MissingError, UsageError
from ..common.fields import typed
from .files import opened, read, read_text, reason

#: The format number of each kind of store in ``meta.json``.
FORMATS = {"pixels": 1, "jpeg": 2}
META = "meta.json"
#: Images that share a checksum.
CHUNK = 64
SPLITS = ("train", "val")
#: Maximum bytes of ``meta.json``; the names of 21,000 classes take one million.
_META_LIMIT = 16 * 2**20
#: Maximum rows of a packed image, more than any photograph has.
_SIZE_LIMIT = 2**16


def read_meta(path: Path) -> dict[str, Any]:
    """The content of the store's ``meta.json``.

    Raises:
        DataError: it is missing, damaged, or of another format.
    """
    try:
        meta: dict[str, Any] = json.loads(read_text(path / META, "store", _META_LIMIT))
        if not isinstance(meta, dict):
            raise ValueError("no table")
        if meta["format"] not in FORMATS.values() or type(meta["format"]) is not int:
            known = " or ".join(map(str, FORMATS.values()))
            raise DataError(f"{path / META}: format {meta['format']!r} is not {known}; prepare the images again")
        if not 1 <= typed("image_size", meta["image_size"], int) <= _SIZE_LIMIT:
            raise ValueError(f"image_size must be 1 to {_SIZE_LIMIT:,}; got {meta['image_size']}")
        for split in SPLITS:
            if typed(f"counts of {split}", meta["counts"][split], int) < 1:
                raise ValueError(f"counts of {split} must be at least 1; got {meta['counts'][split]}")
        classes = typed("classes", meta["classes"], tuple[str, ...])
        if not classes or len(set(classes)) < len(classes):
            raise ValueError("classes must be names that differ")
        for name, shape in (("values", (3,)), ("vectors", (3, 3))):
            numbers = np.asarray(meta["colour"][name])
            if numbers.shape != shape or numbers.dtype.kind not in "fi" or not np.isfinite(numbers).all():
                raise ValueError("colour must hold 3 values and 3x3 vectors, all finite")
        if min(meta["colour"]["values"]) < 0:
            raise ValueError("colour's values must be at least 0")
        for table in ("sha256", "source"):
            typed(table, meta[table], dict)
        typed("source's sha256", meta["source"]["sha256"], str)
        if meta["format"] == FORMATS["jpeg"]:
            typed("jpeg's quality", meta["jpeg"]["quality"], int)
            typed("jpeg's decoder", meta["jpeg"]["decoder"], str)
    except MissingError:
        raise DataError(f"{path} is no finished store: it has no {META}; run python -m net.prepare again") from None
    except (DataError, MemoryError):
        raise
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, UsageError) as error:
        raise DataError(f"{path / META} is damaged: {reason(error)}") from None
    return meta


def _check_header(file: BinaryIO, dtype: type[np.generic], shape: tuple[int, ...]) -> int:
    """Read the header of a ``.npy`` file and compare it; returns the size in bytes of the array that follows.

    Raises:
        ValueError: it is damaged or differs.
    """
    version = npy.read_magic(file)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read_header is None:
        raise ValueError(f"its format is {version} and not (1, 0) or (2, 0)")
    found, columns_first, kind = read_header(file)
    if kind != np.dtype(dtype) or found != shape or (columns_first and len(shape) > 1):
        raise ValueError(f"it holds {kind} {found}, and must hold {np.dtype(dtype)} {shape}")
    return math.prod(shape) * np.dtype(dtype).itemsize


def read_array(path: Path, dtype: type[np.generic], shape: tuple[int, ...], sha256: object) -> NDArray[Any]:
    """A small array whose checksum is in ``meta.json``.

    Args:
        path: the ``.npy`` file.
        dtype, shape: what it must hold.
        sha256: its expected checksum.

    Raises:
        DataError: it is missing, damaged, or holds something else.
    """
    try:
        content = read(path, "store")
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"{path} is damaged: its checksum is not the one in {META}")
        file = io.BytesIO(content)
        if _check_header(file, dtype, shape) != len(content) - file.tell():
            raise ValueError("it is shorter or longer than its header says")
        return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape).copy()
    except MissingError:
        raise DataError(f"{path} is missing; prepare the images again") from None
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path} is damaged: {reason(error)}") from None


def mapped_images(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Images mapped into memory.

    Raises:
        DataError: the file is missing, short, or holds something else than uint8 of this shape.
    """
    try:
        # Mapped and not read, so that it may be larger than memory.
        with opened(path, "store", limit=2**63) as file:
            size = file.seek(0, 2)
            file.seek(0)
            needed = _check_header(file, np.uint8, shape)
            offset = file.tell()
            # An interruption may have left more data after the images.
            if size - offset < needed:
                raise ValueError(f"it is cut short: {size - offset:,} of {needed:,} bytes of images")
            return np.memmap(file, np.uint8, "r", offset, shape)
    except MissingError:
        raise DataError(f"{path} cannot be mapped: there is no such file; prepare the images again") from None
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be mapped: {reason(error)}") from None


class PackedFiles:
    """Files concatenated in one file, read by any number of threads at once.

    Args:
        path: the file.
        index: int64 ``[count, 2]``: each file's offset and length in bytes.
        largest: maximum bytes of each.

    Raises:
        DataError: the file is missing, or does not match the index.
    """

    def __init__(self, path: Path, index: NDArray[np.int64], largest: int) -> None:
        self.path, self.index = path, index
        try:
            with opened(path, "store", limit=2**63) as file:
                self._file = os.fdopen(os.dup(file.fileno()), "rb", buffering=0)
                weakref.finalize(self, self._file.close)
                size = file.seek(0, 2)
        except MissingError:
            raise DataError(f"{path} is missing; prepare the images again") from None
        starts, lengths = index.T
        # Checked in this order, nothing overflows.
        wrong = (starts < 0) | (starts > size) | (lengths < 1) | (lengths > size - starts.clip(0, size))
        wrong |= lengths > largest
        if wrong.any():
            number = int(wrong.argmax())
            raise DataError(
                f"{path} has {size:,} bytes, and image {number} should be the {lengths[number]:,} from "
                f"{starts[number]:,} on, at most {largest:,} of them; prepare the images again"
            )
        # An interruption may have left more data after the images. If there were less, some would share bytes.
        if sum(map(int, lengths)) > size:
            raise DataError(f"{path} has {size:,} bytes, fewer than its images take; prepare the images again")
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> bytes:
        """The content of a file.

        Raises:
            DataError: the containing file has been truncated since it was opened, or cannot be read.
        """
        start, length = map(int, self.index[number])
        try:
            if hasattr(os, "pread"):
                content = os.pread(self._file.fileno(), length, start)
            else:
                # Windows has no read that leaves the file position unchanged.
                with self._lock:
                    self._file.seek(start)
                    content = self._file.read(length)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from None
        if len(content) < length:
            raise DataError(f"{self.path} has been cut short: image {number} is not all there")
        return content


def read_arrays(path: Path, expected: Mapping[str, tuple[type[np.generic], tuple[int, ...] | None]]) -> dict[str, Any]:
    """The arrays of a ``.npz`` file that ``numpy.savez`` wrote.

    Args:
        path: the file.
        expected: dtype and shape of each; None is one dimension of any length.

    Raises:
        DataError: it is missing, damaged, or holds something else.
    """
    try:
        with opened(path, "progress") as file, zipfile.ZipFile(file) as archive:
            size = file.seek(0, 2)
            members = {member.filename: member for member in archive.infolist()}
            if sum(member.file_size for member in members.values()) > size:
                raise ValueError("its members are larger than the file")
            arrays = {}
            for name, (dtype, shape) in expected.items():
                content = archive.read(members[f"{name}.npy"])
                part = io.BytesIO(content)
                if shape is None:
                    npy.read_magic(part)
                    shape = (npy.read_array_header_1_0(part)[0][0],)
                    part.seek(0)
                if _check_header(part, dtype, shape) != len(content) - part.tell():
                    raise ValueError(f"{name} is shorter or longer than its header says")
                arrays[name] = np.frombuffer(content, dtype, offset=part.tell()).reshape(shape).copy()
            return arrays
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path} is damaged: {reason(error)}") from None
