"""Atomic file writes, and a lock that gives a folder one writing process.

After an interruption or on a full disk, a file is either the complete old one or the complete new one.
"""

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
#: Windows cannot open folders, so there they can be neither locked nor synced.
_OPENS_FOLDERS = fcntl is not None and hasattr(os, "O_DIRECTORY")

#: Suffix of a file that is still being written.
PARTIAL = ".partial"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that is renamed to ``path`` when the block ends, and removed when it raises.

    The data is synced before the rename, and the rename before the block is left. Until then the file has a random
    name, so that two writers never collide and no planted symlink is followed. :func:`remove_partials` removes what a
    killed writer leaves.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(6)}{PARTIAL}")
    try:
        # "x" is O_EXCL, which does not follow symlinks either.
        with open(partial, "xb") as file:
            # remove_partials skips files that are locked.
            _try_lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            if _OPENS_FOLDERS:
                # While the lock is held, so that remove_partials cannot delete it first.
                os.replace(partial, path)
        if not _OPENS_FOLDERS:
            # Windows cannot rename an open file.
            os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            # A failed write names no file or the temporary one; report the file the caller asked for.
            error.filename = str(path)
        raise
    _sync_folder(path)


def _sync_folder(path: Path) -> None:
    """Sync the folder entry of a file, where the file system supports it."""
    if not _OPENS_FOLDERS:
        return
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems (FUSE, network shares) cannot sync a folder; the file itself has been synced.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            error.filename = str(path)
            raise
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    """Try to lock an open file; True if this process holds the lock, or the file system has no locks."""
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
    """Remove what killed writers left in ``folder``; the caller holds its lock."""
    for path in folder.glob(f"*{PARTIAL}"):
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(path.lstat().st_mode):
                continue
            if not _OPENS_FOLDERS:
                # Windows cannot remove an open file.
                path.unlink()
                continue
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                if _try_lock(handle):
                    path.unlink(missing_ok=True)
            finally:
                os.close(handle)


def check_writable(flag: str, given: str | None) -> None:
    """Check that an output file can be written, before hours of work.

    Args:
        flag: its name in the error message.
        given: the file; nothing is checked if it is None.

    Raises:
        UsageError: it is a folder, or its folder does not exist or is not writable.
    """
    if given is None:
        return
    path = Path(given)
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; give a file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{flag} {path}: folder {path.parent} does not exist")
    # By writing, not by looking at permissions: root has them everywhere, even in /proc.
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create ``folder`` if necessary and hold its lock until the block or the process ends.

    Raises:
        DataError: another process holds the lock.
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
            # The previous holder may have removed the folder after we opened it.
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
