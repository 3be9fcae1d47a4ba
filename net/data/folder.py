"""An image folder: which files it holds and which class each belongs to."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import DataError
from ..doors import labels as label_files
from ..doors.store import SPLITS


@dataclass(frozen=True)
class Listing:
    """The files of an image folder, relative to ``root``, with their labels, in the order they are packed."""

    root: Path
    classes: tuple[str, ...]
    files: dict[str, list[str]]
    labels: dict[str, list[int]]

    @property
    def digest(self) -> str:
        """A checksum of every file's name and label."""
        result = hashlib.sha256("\0".join(self.classes).encode())
        for split in SPLITS:
            for file, label in zip(self.files[split], self.labels[split], strict=True):
                result.update(f"\0{split}\0{file}\0{label}".encode(errors="surrogateescape"))
        return result.hexdigest()


#: What the folder of the validation images may be called; "test" where there is no other.
_VALIDATION = ("val", "validation", "valid")
_TEST = "test"
#: What lies beside images in a flat folder and is none.
_NO_IMAGES = {".txt", ".csv", ".tsv", ".json", ".xml", ".md", ".html", ".db", ".ini", ".zip", ".tar", ".gz"}


def _validation(root: Path) -> Path | None:
    """The folder of the validation images.

    Raises:
        DataError: there are several.
    """
    found = [root / name for name in _VALIDATION if (root / name).is_dir()]
    if len(found) > 1:
        raise DataError(f"{root} has the folders {' and '.join(path.name for path in found)}; keep one of them")
    test = root / _TEST
    return found[0] if found else test if test.is_dir() else None


def is_image_folder(path: Path) -> bool:
    """Whether ``path`` has the folders of an image folder."""
    return (path / "train").is_dir() or _validation(path) is not None


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _files_below(folder: Path, root: Path) -> list[str]:
    """Every visible file in ``folder`` and the folders in it, relative to ``root``, sorted.

    A folder that links lead to a second time is passed over: links may go round in a circle, or two ways to each of
    many folders.
    """
    found: list[str] = []
    seen = {_identity(folder.stat())}
    waiting = [iter(_visible(folder))]
    while waiting:
        entry = next(waiting[-1], None)
        if entry is None:
            waiting.pop()
        elif not entry.is_dir():
            found.append(os.path.relpath(entry.path, root))
        elif (identity := _identity(entry.stat())) not in seen:
            seen.add(identity)
            waiting.append(iter(_visible(Path(entry.path))))
    return found


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _by_class(folder: Path, root: Path) -> dict[str, list[str]]:
    """The files of each class folder of a split."""
    classes = {}
    for entry in _visible(folder):
        if entry.is_dir():
            try:
                entry.name.encode()
            except UnicodeEncodeError:
                raise DataError(f"{entry.path}: a class's name must be UTF-8; rename the folder") from None
            classes[entry.name] = _files_below(Path(entry.path), root)
            if not classes[entry.name]:
                raise DataError(f"{entry.path} holds no files; remove the folder or put the class's images in it")
    return classes


def _labelled(root: Path, folder: Path, classes: tuple[str, ...], label_file: Path) -> tuple[list[str], list[int]]:
    """The files of a flat validation folder and their labels from ``label_file``."""
    names = [
        os.path.relpath(root / file, folder)
        for file in _files_below(folder, root)
        if Path(file).suffix.lower() not in _NO_IMAGES
    ]
    if label_file.exists():
        names = [name for name in names if not label_file.samefile(folder / name)]
    if not names:
        raise DataError(f"{folder} holds no files")
    for name in names:
        if len(Path(name).parts) > 1 and Path(name).parts[0] in classes:
            raise DataError(f"{folder} has class folders ({name}); --val-labels is for one without")
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers[name] for name in label_files.read(label_file, folder, names, numbers)]
    return [os.path.relpath(folder / name, root) for name in names], labels


def scan(root: Path, label_file: Path | None = None) -> Listing:
    """List ``train/CLASS/*`` and ``val/CLASS/*``, or ``val/*`` with a label file. Hidden files are left out.

    The folder ``val`` may be called ``validation`` or ``valid``, or ``test`` where there is none of these.

    Args:
        root: the image folder.
        label_file: labels of a flat validation folder, see :func:`net.doors.labels.read`. Classes are named as the
            folders in ``train``.

    Raises:
        DataError: a folder that is missing or empty, a class that only val has, or a label file that does not fit.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder")
    folder = _validation(root)
    for split, found in (("train", (root / "train").is_dir()), ("val", folder is not None)):
        if not found:
            raise DataError(f"{root} has no folder {split}; an image folder holds train/CLASS/* and val/CLASS/*")
    assert folder is not None
    train = _by_class(root / "train", root)
    if not train:
        raise DataError(f"{root / 'train'} has no class folders; images belong in train/CLASS/")
    classes = tuple(train)
    files = {"train": [file for name in classes for file in train[name]]}
    labels = {"train": [number for number, name in enumerate(classes) for _ in train[name]]}
    if label_file is not None:
        files["val"], labels["val"] = _labelled(root, folder, classes, label_file)
    else:
        val = _by_class(folder, root)
        if not val:
            raise DataError(f"{folder} has no class folders; a flat folder needs --val-labels FILE")
        for name in val:
            if name not in train:
                raise DataError(f"class {name!r} is in {folder} and not in {root / 'train'}")
        files["val"] = [file for name in classes for file in val.get(name, [])]
        labels["val"] = [number for number, name in enumerate(classes) for _ in val.get(name, [])]
    return Listing(root, classes, files, labels)
