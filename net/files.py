"""Files that an interruption or a full disk leaves whole, the old one or the new one; one writing process a folder."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import DataError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
#: Windows opens no folders: there they can be neither locked nor put on the disk.
_OPENS_FOLDERS = fcntl is not None and hasattr(os, "O_DIRECTORY")

#: What a file is called until it is whole.
PARTIAL = ".partial"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name ``path`` when the block ends, and vanishes when it raises.

    The bytes are on the disk before the name is, and the name before the block is left.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            # A failed write does not say of what file, and nobody asked for this one.
            error.filename = str(path)
        raise
    if not _OPENS_FOLDERS:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_writable(flag: str, given: str | None) -> None:
    """Refuse what cannot be written, before hours of work go into it.

    Args:
        flag: names it in the refusal.
        given: a file; None is nothing to check.

    Raises:
        UsageError: it is a folder, or there is no folder for it, or one that may not be written to.
    """
    if given is None:
        return
    path = Path(given)
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; give a file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder {path.parent}")
    # Asked of the file system and not of its rights: a root's are enough everywhere, in /proc too.
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of ``folder`` until the block ends or this process does.

    Raises:
        DataError: another process is in it.
    """
    if not _OPENS_FOLDERS:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder} is in use by another process") from None
        except OSError:
            # A file system without locks: nothing can be said.
            pass
        yield
    finally:
        os.close(handle)
