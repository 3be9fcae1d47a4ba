"""Files that an interruption or a full disk leaves whole, the old one or the new one; one writing process a folder."""

import contextlib
import errno
import os
import secrets
import stat
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

#: How the name of a file ends until it is whole.
PARTIAL = ".partial"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name ``path`` when the block ends, and vanishes when it raises.

    The bytes are on the disk before the name is, and the name before the block is left. Until then it has a name that
    nobody else has, so that two writers do not meet and no link that was put there is followed; what a killed writer
    leaves, :func:`remove_partials` removes.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(6)}{PARTIAL}")
    try:
        # "x" is O_EXCL, which follows no link either.
        with open(partial, "xb") as file:
            # For as long as it is held, the file is not what somebody left.
            _try_lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            if _OPENS_FOLDERS:
                # While the lock is held: nobody takes it for what was left.
                os.replace(partial, path)
        if not _OPENS_FOLDERS:
            # Windows renames no open file.
            os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            # A failed write does not say of what file, and nobody asked for this one.
            error.filename = str(path)
        raise
    _sync_folder(path)


def _sync_folder(path: Path) -> None:
    """Put a file's name on the disk, where the file system can."""
    if not _OPENS_FOLDERS:
        return
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems (FUSE, network shares) know no such thing for a folder; the file itself is on the disk.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            error.filename = str(path)
            raise
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    """Whether this process now holds the lock of an open file; on a file system without locks it does."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def remove_partials(folder: Path) -> None:
    """Remove what killed writers left in ``folder``; for whoever holds its lock."""
    for path in folder.glob(f"*{PARTIAL}"):
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(path.lstat().st_mode):
                continue
            if not _OPENS_FOLDERS:
                # Windows removes no open file.
                path.unlink()
                continue
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                if _try_lock(handle):
                    path.unlink(missing_ok=True)
            finally:
                os.close(handle)


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
    """Make ``folder`` if need be and keep other processes out of it until the block ends or this process does.

    Raises:
        DataError: another process is in it.
    """
    if not _OPENS_FOLDERS:
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            if not _try_lock(handle):
                raise DataError(f"{folder} is in use by another process")
            # Whoever held it before may have removed it in between.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(folder)):
                    break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        remove_partials(folder)
        yield
    finally:
        os.close(handle)
