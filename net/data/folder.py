"""An image folder, or an archive of one: which files it holds and which class each belongs to."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import DataError
from ..common.printing import printable
from ..readers import labels as label_files
from ..readers.members import Member, is_archive, members
from ..readers.store import SPLITS


@dataclass(frozen=True)
class Listing:
    """The files of an image folder, relative to ``root``, with their labels, in the order they are packed.

    ``members`` gives each file's location in the archive ``root``; it is None for a folder. ``notes`` are lines for the
    user: what was chosen, and what is missing but not required for training.
    """

    root: Path
    classes: tuple[str, ...]
    files: dict[str, list[str]]
    labels: dict[str, list[int]]
    members: dict[str, Member] | None = None
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A checksum of every file's name and label; for files in an archive also of the size and, in a zip, the CRC.

        An archive and the folder it was made from have different checksums.
        """
        result = hashlib.sha256("\0".join(self.classes).encode())
        for split in SPLITS:
            for file, label in zip(self.files[split], self.labels[split], strict=True):
                result.update(f"\0{split}\0{file}\0{label}".encode(errors="surrogateescape"))
                if self.members is not None:
                    member = self.members[file]
                    result.update(f"\0{member.size}\0{member.checksum}".encode())
        return result.hexdigest()


_TRAIN = "train"
#: Allowed names of the validation folder; "test" only if there is no other.
_VALIDATION = ("val", "validation", "valid")
_TEST = "test"
#: Files in a flat image folder that are not images.
_NO_IMAGES = {".txt", ".csv", ".tsv", ".json", ".xml", ".md", ".html", ".db", ".ini", ".zip", ".tar", ".gz"}
#: What Finder adds to archives.
_MACOS = "__MACOSX"
#: Number of classes named in a note; the others are only counted.
_NAMED = 5


class _Folder:
    """An image folder on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def has(self, name: str) -> bool:
        """Whether it contains the folder ``name``."""
        return (self.root / name).is_dir()

    def classes(self, name: str) -> dict[str, list[str]]:
        """The files of each folder in the folder ``name``, relative to the root, all in order."""
        return {
            entry.name: _files_below(Path(entry.path), self.root)
            for entry in _visible(self.root / name)
            if entry.is_dir()
        }

    def files(self, name: str, without: Path) -> list[str]:
        """The files in the folder ``name`` and below, relative to the root, except the file ``without``."""
        found = _files_below(self.root / name, self.root)
        if without.exists():
            left_out = _identity(without.stat())
            found = [file for file in found if _identity_of(self.root / file) != left_out]
        return found


class _Archive:
    """An archive of an image folder, which may be at the top level or nested.

    Raises:
        DataError: it contains several image folders, or none.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        files, folders = members(root)
        split = {tuple(name.split("/")): member for name, member in files.items()}
        parents = {
            parts[: parts.index(_TRAIN)]
            for parts in split
            if _TRAIN in parts[:-2] and parts[0] != _MACOS and Path(parts[-1]).suffix.lower() not in _NO_IMAGES
        }
        if len(parents) > 1:
            first, second, *_ = sorted("/".join((*parent, _TRAIN)) for parent in parents)
            raise DataError(
                f"{root} holds the folders {printable(first)} and {printable(second)}; make an archive of one of them"
            )
        if not parents:
            raise DataError(f"{root} holds no image folder: no images in a folder train/CLASS/")
        (parent,) = parents
        top = len(parent)
        #: By the parts of their names below the image folder, in the order of a folder on the disk.
        self._members = {
            parts[top:]: member
            for parts, member in sorted(split.items(), key=lambda item: item[0])
            if parts[:top] == parent and not any(part.startswith(".") for part in parts[top:])
        }
        names = {tuple(name.split("/")) for name in folders} | {
            parts[:count] for parts in split for count in range(top + 1, min(len(parts), top + 3))
        }
        self._folders = sorted(name[top:] for name in names if name[:top] == parent and len(name) > top)
        self.members = {"/".join(parts): member for parts, member in self._members.items()}

    def has(self, name: str) -> bool:
        """As for a folder."""
        return (name,) in self._folders

    def classes(self, name: str) -> dict[str, list[str]]:
        """As for a folder."""
        found: dict[str, list[str]] = {
            parts[1]: [] for parts in self._folders if parts[0] == name and len(parts) == 2 and parts[1][0] != "."
        }
        for parts in self._members:
            if parts[0] == name and len(parts) > 2:
                found[parts[1]].append("/".join(parts))
        return found

    def files(self, name: str, without: Path) -> list[str]:
        """As for a folder; the file ``without`` is never in the archive."""
        return ["/".join(parts) for parts in self._members if parts[0] == name]


def _validation(tree: _Folder | _Archive) -> tuple[str | None, list[str]]:
    """The folder of the validation images (None if there is none), and notes about it.

    Raises:
        DataError: there are several.
    """
    found = [name for name in _VALIDATION if tree.has(name)]
    if len(found) > 1:
        raise DataError(f"{tree.root} has the folders {' and '.join(found)}; keep one of them")
    if found:
        unused = [f"{tree.root} has {found[0]} and test: {found[0]} is used"] if tree.has(_TEST) else []
        return found[0], unused
    if tree.has(_TEST):
        return _TEST, [f"{tree.root} has no folder {', '.join(_VALIDATION[:-1])} or {_VALIDATION[-1]}: test is used"]
    return None, []


def is_image_folder(path: Path) -> bool:
    """Whether ``path`` has the folders of an image folder."""
    tree = _Folder(path)
    return any(tree.has(name) for name in (_TRAIN, *_VALIDATION, _TEST))


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _files_below(folder: Path, root: Path) -> list[str]:
    """Every visible file in ``folder`` and the folders in it, relative to ``root``, sorted.

    A folder reached a second time through links is skipped: links may be circular, or lead to each of many folders in
    two ways.
    """
    found: list[str] = []
    beginning, cut = os.path.relpath(folder, root), len(str(folder))
    seen = {_identity(folder.stat())}
    waiting = [iter(_visible(folder))]
    while waiting:
        entry = next(waiting[-1], None)
        if entry is None:
            waiting.pop()
        elif not entry.is_dir():
            found.append(beginning + entry.path[cut:])
        elif (identity := _identity(entry.stat())) not in seen:
            seen.add(identity)
            waiting.append(iter(_visible(Path(entry.path))))
    return found


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _identity_of(path: Path) -> tuple[int, int] | None:
    """None for a broken link, which is reported when the image is read."""
    try:
        return _identity(path.stat())
    except OSError:
        return None


def _by_class(tree: _Folder | _Archive, name: str) -> dict[str, list[str]]:
    """The files of each class folder of a split."""
    classes = tree.classes(name)
    for label, files in classes.items():
        place = tree.root / name / label
        try:
            label.encode()
        except UnicodeEncodeError:
            raise DataError(f"{place}: a class's name must be UTF-8; rename the folder") from None
        if not files:
            raise DataError(f"{place} holds no files; remove the folder or put the class's images in it")
    return classes


def _labelled(
    tree: _Folder | _Archive, split: str, classes: tuple[str, ...], label_file: Path
) -> tuple[list[str], list[int]]:
    """The files of a flat validation folder and their labels from ``label_file``."""
    folder = tree.root / split
    files = [file for file in tree.files(split, label_file) if Path(file).suffix.lower() not in _NO_IMAGES]
    names = [os.path.relpath(file, split) for file in files]
    if not names:
        raise DataError(f"{folder} holds no files")
    for name in names:
        if len(Path(name).parts) > 1 and Path(name).parts[0] in classes:
            raise DataError(f"{folder} has class folders ({name}); --val-labels is for one without")
    numbers = {name: number for number, name in enumerate(classes)}
    return files, [numbers[name] for name in label_files.read(label_file, folder, names, numbers)]


def scan(root: Path, label_file: Path | None = None) -> Listing:
    """List ``train/CLASS/*`` and ``val/CLASS/*``, or ``val/*`` with a label file. Hidden files are left out.

    The folder ``val`` may be named ``validation`` or ``valid``, or ``test`` if none of these exists.

    Args:
        root: the image folder, or a ``.tar`` or ``.zip`` archive that contains one, at the top level or nested.
        label_file: labels of a flat validation folder, see :func:`net.readers.labels.read`. Classes are named like the
            folders in ``train``.

    Raises:
        DataError: a folder is missing or empty, a class exists only in val, the label file does not match, or the
            archive cannot be used.
    """
    tree: _Folder | _Archive
    if root.is_dir():
        tree = _Folder(root)
    elif is_archive(root):
        tree = _Archive(root)
    else:
        raise DataError(f"{root} is no folder and no .tar or .zip archive")
    validation, notes = _validation(tree)
    for split, found in ((_TRAIN, tree.has(_TRAIN)), ("val", validation is not None)):
        if not found:
            raise DataError(f"{root} has no folder {split}; an image folder holds train/CLASS/* and val/CLASS/*")
    assert validation is not None
    train = _by_class(tree, _TRAIN)
    if not train:
        raise DataError(f"{root / _TRAIN} has no class folders; images belong in train/CLASS/")
    classes = tuple(train)
    files = {"train": [file for name in classes for file in train[name]]}
    labels = {"train": [number for number, name in enumerate(classes) for _ in train[name]]}
    if label_file is not None:
        files["val"], labels["val"] = _labelled(tree, validation, classes, label_file)
    else:
        val = _by_class(tree, validation)
        if not val:
            raise DataError(f"{root / validation} has no class folders; a flat folder needs --val-labels FILE")
        for name in val:
            if name not in train:
                raise DataError(f"class {name!r} is in {root / validation} and not in {root / _TRAIN}")
        files["val"] = [file for name in classes for file in val.get(name, [])]
        labels["val"] = [number for number, name in enumerate(classes) for _ in val.get(name, [])]
    if missing := [classes[number] for number in sorted(set(range(len(classes))) - set(labels["val"]))]:
        more = f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else ""
        named = ", ".join(printable(name) for name in missing[:_NAMED])
        notes.append(
            f"{len(missing):,} of {len(classes):,} classes have no image in {root / validation}: {named}{more}"
        )
    return Listing(root, classes, files, labels, tree.members if isinstance(tree, _Archive) else None, tuple(notes))


def listed(source: Path, val_labels: Path | None = None) -> Listing:
    """:func:`scan`, which may take minutes; prints this and the notes."""
    print(f"listing the files in {source}", flush=True)
    listing = scan(source, val_labels)
    for note in listing.notes:
        print(f"note: {note}")
    return listing
