"""Archives of image files, ``.tar`` and ``.zip``: their content, with each file read in place.

Member names are never used as paths here; one that would lead out of a folder is rejected anyway.
"""

import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..common.errors import DataError
from .files import opened, reason
from .image import UnreadableImageError

#: Maximum unpacked bytes of a file in an archive; a camera's raw image takes less.
_LIMIT = 2**28
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
#: A zip's local header: its length without name and extra field, and the offset of their lengths.
_LOCAL_HEADER, _LENGTHS_AT = 30, 26
_ENCRYPTED = 1
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive.

    ``start`` is the offset of its bytes (in a zip, of its header), ``stored`` their number, ``size`` the unpacked size.
    ``method`` is a zip's compression method; -1 in a tar. ``refused`` says why it cannot be read; empty if it can.
    """

    start: int
    stored: int
    size: int
    method: int = -1
    checksum: int = 0
    refused: str = ""


def is_archive(path: Path) -> bool:
    """Whether ``path`` is a file that begins like a tar or a zip, or is named like one."""
    if not path.is_file():
        return False
    with opened(path, "archive", limit=2**63) as file:
        head = file.read(512)
    return _is_zip(head) or _is_tar(head) or path.name.endswith((".tar", ".zip", ".tar.gz", ".tgz"))


def _is_zip(head: bytes) -> bool:
    return head.startswith((b"PK\3\4", b"PK\5\6"))


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def members(path: Path) -> tuple[dict[str, Member], set[str]]:
    """The files of an archive by their names, without a leading ``./``, and its folders' names.

    Raises:
        DataError: it is a compressed tar or damaged, or has a duplicate name or one that leads out of a folder.
    """
    files: dict[str, Member] = {}
    folders: set[str] = set()
    try:
        with opened(path, "archive", limit=2**63) as file:
            head = file.read(512)
            size = file.seek(0, 2)
            file.seek(0)
            for magic, program in _COMPRESSED.items():
                # A tar begins with the name of its first file.
                if head.startswith(magic) and not _is_tar(head):
                    raise DataError(
                        f"{path} is compressed with {program}, and images are read in place from an archive; "
                        "unpack it, or make a plain .tar or a .zip of it"
                    )
            add = _add_zip if _is_zip(head) else _add_tar
            add(file, size, files, folders)
    except (DataError, MemoryError):
        raise
    except Exception as error:
        # zipfile and tarfile raise struct.error, ValueError, OSError and their own errors, depending on the damage.
        raise DataError(f"{path} is not a complete .tar or .zip archive: {reason(error)}") from None
    return files, folders


def _name(name: str) -> str:
    parts = [part for part in name.split("/") if part != "."]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise ValueError(f"it holds the name {name[:100]!r}, which leads out of its folder")
    return "/".join(part for part in parts if part)


def _add_zip(file: BinaryIO, size: int, files: dict[str, Member], folders: set[str]) -> None:
    with zipfile.ZipFile(file) as archive:
        stored = 0
        for item in archive.infolist():
            name = _name(item.filename)
            if item.is_dir():
                folders.add(name)
                continue
            refused = ""
            if item.flag_bits & _ENCRYPTED:
                refused = "it is encrypted"
            elif item.compress_type not in (_STORED, _DEFLATED):
                refused = f"it is compressed with a zip archive's method {item.compress_type}; only 0 and 8 are read"
            start, took, unpacked = item.header_offset, item.compress_size, item.file_size
            if not 0 <= start < size:
                raise ValueError(f"{name[:100]!r} should begin at {start:,} of {size:,} bytes")
            _add(files, name, Member(start, took, unpacked, item.compress_type, item.CRC, refused))
            stored += took
        if stored > size:
            # With files that share their bytes, a small archive could unpack to any size.
            raise ValueError("its files take more bytes than it has")


def _add_tar(file: BinaryIO, size: int, files: dict[str, Member], folders: set[str]) -> None:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        taken = 0
        while (item := archive.next()) is not None:
            # tarfile keeps every entry it has read, a kilobyte per file.
            archive.members.clear()  # type: ignore[attr-defined]
            name = _name(item.name)
            if item.isdir():
                folders.add(name)
                continue
            refused = ""
            if item.islnk():
                refused = "it is a link to a file that does not come first"
            elif item.issparse():
                refused = "it has holes"
            elif not item.isreg():
                refused = "it is a link or a device, which is not followed in an archive"
            elif item.offset_data + item.size > size:
                raise ValueError("it is cut short")
            member = Member(item.offset_data, item.size, item.size, refused=refused)
            if item.islnk():
                member = files.get(_name(item.linkname), member)
            _add(files, name, member)
            taken += 0 if member.refused else member.size
        if taken > size:
            # With links to one file, a small archive could contain any number of images.
            raise ValueError(
                "its files and the hard links to them take more bytes than it has; repack it without links"
            )
        # tarfile treats the end of the file, and a damaged header, as the end of the archive.
        file.seek(archive.offset)
        rest = file.read(2 * tarfile.BLOCKSIZE)
        if len(rest) < tarfile.BLOCKSIZE:
            raise ValueError("it is cut short, after a whole file")
        if any(rest):
            raise ValueError(f"what follows at byte {archive.offset:,} is neither a file nor the archive's end")


def _add(files: dict[str, Member], name: str, member: Member) -> None:
    if name in files:
        raise ValueError(f"it holds {name[:100]!r} twice")
    files[name] = member


def read_member(file: BinaryIO, member: Member) -> bytes:
    """The content of a member.

    Args:
        file: the opened archive.
        member: its entry from :func:`members`.

    Raises:
        UnreadableImageError: it cannot be read, is too large, or does not match its entry.
    """
    if member.refused:
        raise UnreadableImageError(member.refused)
    if max(member.stored, member.size) > _LIMIT:
        raise UnreadableImageError(f"has {member.size:,} bytes; at most {_LIMIT:,} are read from an archive")
    start = member.start
    if member.method >= 0:
        file.seek(start)
        header = file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\3\4"):
            raise UnreadableImageError("the archive has no such file at its place")
        start += _LOCAL_HEADER + sum(struct.unpack_from("<HH", header, _LENGTHS_AT))
    file.seek(start)
    content = file.read(member.stored)
    if len(content) < member.stored:
        raise UnreadableImageError("the archive is cut short there")
    if member.method == _DEFLATED:
        try:
            # One byte more than expected is enough to detect it.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, member.size + 1)
        except zlib.error as error:
            raise UnreadableImageError(f"cannot be unpacked: {reason(error)}") from None
    if len(content) != member.size or (member.method >= 0 and zlib.crc32(content) != member.checksum):
        raise UnreadableImageError("does not unpack to what the archive says")
    return content
