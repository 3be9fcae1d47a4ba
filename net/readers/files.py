"""Opening input files: only regular ones, and none larger than the format or the available memory allows."""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..common.errors import DataError, MissingError

_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
#: Maximum size of a file that is read whole, as a fraction of the available memory.
MEMORY_SHARE = 0.8


def free_host_memory() -> int:
    """Bytes of memory available without swapping; ``sys.maxsize`` where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            (line,) = [line for line in file if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        # Not Linux: no limit.
        return sys.maxsize
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def opened(path: Path | str, what: str, limit: int | None = None) -> Iterator[BinaryIO]:
    """Open an input file.

    Args:
        path: the file; symlinks are followed.
        what: the format's name, for messages.
        limit: maximum size in bytes; by default :data:`MEMORY_SHARE` of the available memory.

    Raises:
        MissingError: it does not exist. DataError: it is a pipe, device or folder, too large, or not readable.
    """
    try:
        # Checked before opening, because opening some devices has side effects, and again on the open file.
        _check_regular(os.stat(path), path, what)
        # O_NONBLOCK, in case a pipe has replaced the file since: opening one waits for a writer.
        handle = os.open(path, _FLAGS)
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            _check_regular(status, path, what)
            allowed = int(MEMORY_SHARE * free_host_memory()) if limit is None else limit
            if status.st_size > allowed:
                raise DataError(f"{what} {path} has {status.st_size:,} bytes; at most {allowed:,} are read")
            yield file
    except FileNotFoundError:
        raise MissingError(f"{what} {path} does not exist") from None
    except OSError as error:
        if error.errno is None:
            # Raised by a library, about the content.
            raise
        raise DataError(f"{what} {path} cannot be read: {error.strerror}") from None


def _check_regular(status: os.stat_result, path: Path | str, what: str) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
    raise DataError(f"{what} {path} is {kind}; give a regular file")


def read(path: Path, what: str, limit: int | None = None) -> bytes:
    """The content of a file; see :func:`opened`."""
    with opened(path, what, limit) as file:
        return file.read() if limit is None else file.read(limit)


def read_text(path: Path, what: str, limit: int) -> str:
    """The content of a UTF-8 text file, with or without a byte order mark; see :func:`opened`.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return read(path, what, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{what} {path} is not UTF-8: {error}") from None


def reason(error: BaseException) -> str:
    """The first line of a library's error message, or the type of the error; of a KeyError, what is missing."""
    if isinstance(error, KeyError):
        return f"{str(error)[:190]} is missing"
    lines = str(error).split("\n")
    return (lines[0].strip() or type(error).__name__)[:200]
