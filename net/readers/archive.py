"""The published CIFAR-10, packed or unpacked. Archives are read to the end, where the checksum is compared."""

import gzip
import io
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..common.errors import DataError, MissingError
from .files import opened, read, reason
from .pickles import values

#: Bytes of a batch; the published ones take 31 million.
_BATCH_LIMIT = 64 * 2**20
#: Bytes of a whole archive, unpacked; the published ones take 186 million.
_ARCHIVE_LIMIT = 512 * 2**20
#: Classes of the data set.
CLASSES = 10
_PIXELS = 3 * 32 * 32
#: Files and folders in an archive; the published ones have nine.
_MEMBERS = 1000


class _Dtype:
    """Stand-in for ``numpy.dtype("u1")``, the only dtype in the published files."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise ValueError(f"its data are {code!r} and not bytes")

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which do not apply to bytes."""


class _Array:
    """Stand-in for a ``numpy.ndarray`` of bytes, which takes no memory beyond its content."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, content = state
        if not isinstance(dtype, _Dtype) or columns_first:
            raise ValueError("its data are no rows of bytes")
        self.value = np.frombuffer(content, np.uint8).reshape(shape)


def _array(*_: object) -> _Array:
    return _Array()


def _from_buffer(content: object, dtype: object, shape: object, order: str) -> _Array:
    """The form in pickle protocol 5, Python 3.14's default."""
    array = _Array()
    array.__setstate__((1, shape, dtype, order != "C", content))
    return array


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"its data are encoded in {encoding!r}")
    return text.encode(encoding)


#: The globals that the published files, and files written like them today, reference, and their replacements.
_FUNCTIONS: dict[str, Any] = {
    "numpy.core.multiarray _reconstruct": _array,
    "numpy._core.multiarray _reconstruct": _array,
    "numpy.core.numeric _frombuffer": _from_buffer,
    "numpy._core.numeric _frombuffer": _from_buffer,
    "numpy ndarray": None,
    "numpy dtype": _Dtype,
    "_codecs encode": _encoded,
}
_ALLOWED = re.compile("|".join(map(re.escape, _FUNCTIONS)))


class _Unpickler(pickle.Unpickler):
    """Reads the published format, and rejects everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module} {name}" not in _FUNCTIONS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _FUNCTIONS[f"{module} {name}"]


class _Bounded(io.RawIOBase):
    """A stream that raises an error before more than ``limit`` bytes are read."""

    def __init__(self, stream: BinaryIO | gzip.GzipFile, limit: int) -> None:
        self.stream, self.left = stream, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self.stream.read(len(buffer))
        self.left -= len(part)
        if self.left < 0:
            raise ValueError("it unpacks to more than the published archives")
        buffer[: len(part)] = part
        return len(part)


def read_members(path: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """The files of an archive (``.tar``, ``.tar.gz``) whose names are wanted, whatever folder they are in.

    Raises:
        DataError: it is damaged anywhere, or not such an archive.
    """
    found: dict[str, bytes] = {}
    try:
        with opened(path, "archive") as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = io.BufferedReader(_Bounded(gzip.GzipFile(fileobj=file) if compressed else file, _ARCHIVE_LIMIT))
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for number, member in enumerate(archive):
                    if number >= _MEMBERS:
                        raise ValueError(f"it holds more than {_MEMBERS} files")
                    name = Path(member.name).name
                    if not member.isreg() or name not in wanted:
                        continue
                    if member.issparse() or member.size > _BATCH_LIMIT:
                        raise ValueError(f"{name} is larger than the published file")
                    if name in found:
                        raise ValueError(f"it holds {name} twice")
                    content = archive.extractfile(member)
                    assert content is not None
                    found[name] = content.read()
                    if len(found[name]) != member.size:
                        raise ValueError(f"{name} is cut short")
            while stream.read(2**20):
                # gzip compares its checksum at its end, which comes after tar's end.
                pass
    except (DataError, MemoryError):
        raise
    except Exception as error:
        # zlib.error, struct.error, EOFError, tarfile.TarError and others, depending on the damage.
        raise DataError(f"{path} is not a whole tar archive: {reason(error)}") from None
    return found


def read_batch(folder: Path, name: str) -> bytes:
    """A batch of an unpacked archive.

    Raises:
        DataError: it is missing, or not a batch.
    """
    try:
        return read(folder / name, "CIFAR-10", _BATCH_LIMIT)
    except MissingError:
        raise DataError(f"{folder / name} is missing; unpack the whole CIFAR-10 archive") from None


def _python(content: bytes) -> tuple[Any, Any]:
    values(io.BytesIO(content), _ALLOWED)
    batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(batch, dict) or b"data" not in batch or b"labels" not in batch:
        raise ValueError("it holds no data and labels")
    labels = batch[b"labels"]
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError("labels are no list of integers")
    data = batch[b"data"]
    return data.value if isinstance(data, _Array) else data, labels


def batch(path: Path, name: str, content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The pixels, uint8 ``[N, 32, 32, 3]``, and labels, int64 ``[N]``, of a batch in the python or binary version.

    Args:
        path: of the archive or folder, for messages.
        name: of the batch; the binary ones end in ``.bin``.
        content: its bytes.

    Raises:
        DataError: it is something else.
    """
    try:
        if name.endswith(".bin"):
            if len(content) % (1 + _PIXELS):
                raise ValueError(f"its {len(content):,} bytes are no whole images")
            records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)
            pixels, truth = records[:, 1:], records[:, 0]
        else:
            pixels, truth = _python(content)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (len(truth), _PIXELS):
            raise ValueError(f"its data are not uint8 [{len(truth)}, {_PIXELS}]")
        if not len(truth) or min(truth) < 0 or max(truth) >= CLASSES:
            raise ValueError(f"labels are not 0 to {CLASSES - 1}")
    except MemoryError:
        raise
    except Exception as error:
        # A damaged pickle calls numpy with arbitrary values.
        raise DataError(f"{path}: {name} is not a batch of CIFAR-10: {reason(error)}") from None
    # Planes of red, green and blue, each row by row.
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.asarray(truth, np.int64)
