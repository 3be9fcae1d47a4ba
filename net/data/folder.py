"""An image folder: which files it holds and which class each belongs to."""

import csv
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError

SPLITS = ("train", "val")


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


def is_image_folder(path: Path) -> bool:
    """Whether ``path`` has the folders of an image folder."""
    return (path / "train").is_dir() or (path / "val").is_dir()


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _files_below(folder: Path, root: Path) -> list[str]:
    """Every visible file in ``folder`` and the folders in it, relative to ``root``, sorted."""
    found: list[str] = []
    for entry in _visible(folder):
        if entry.is_dir():
            found += _files_below(Path(entry.path), root)
        else:
            found.append(os.path.relpath(entry.path, root))
    return found


def _by_class(root: Path, split: str) -> dict[str, list[str]]:
    """The files of each class folder of a split."""
    classes = {}
    for entry in _visible(root / split):
        if entry.is_dir():
            classes[entry.name] = _files_below(Path(entry.path), root)
            if not classes[entry.name]:
                raise DataError(f"{entry.path} holds no files; remove the folder or put the class's images in it")
    return classes


def _file_and_class(line: str) -> tuple[str, ...]:
    """A line of a label file, cut at its last tab or comma, or at its last space."""
    separator = next((item for item in "\t," if item in line), None)
    return tuple(part.strip() for part in line.rsplit(separator, 1))


def _labelled(root: Path, classes: tuple[str, ...], label_file: Path) -> tuple[list[str], list[int]]:
    """The files of a flat val folder and their labels from ``label_file``."""
    numbers = {name: number for number, name in enumerate(classes)}
    names = [entry.name for entry in _visible(root / "val") if entry.is_file()]
    if not names:
        raise DataError(f"{root / 'val'} holds no files")
    try:
        lines = [line.strip() for line in label_file.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"label file {label_file} cannot be read: {error}") from None
    if not lines:
        raise DataError(f"label file {label_file} is empty")
    pairs: list[tuple[str, ...]]
    if lines[0].replace(" ", "").lower() == "imageid,predictionstring":
        # ImageNet's LOC_val_solution.csv: image name without its ending, then the class and a box, perhaps repeated.
        pairs = [(row[0], row[1].split()[0]) for row in csv.reader(lines[1:]) if len(row) > 1 and row[1].strip()]
    elif len(lines) == len(names) and all(line in numbers for line in lines):
        pairs = list(zip(names, lines, strict=True))
    elif all(len(_file_and_class(line)) == 2 for line in lines):
        pairs = [_file_and_class(line) for line in lines]
    elif len(lines) == len(names):
        pairs = list(zip(names, lines, strict=True))
    else:
        raise DataError(
            f"label file {label_file} must hold lines of 'FILE CLASS' or one class for each of the {len(names)} files "
            f"in {root / 'val'}; it has {len(lines)} lines"
        )
    truth = {}
    for name, label in pairs:
        if label not in numbers:
            hint = "; write the names of the train folders, not numbers" if label.isdigit() else ""
            raise DataError(f"label file {label_file}: {label!r} is no class of {root / 'train'}{hint}")
        truth[name] = numbers[label]
    labels = []
    for name in names:
        number = truth.get(name, truth.get(Path(name).stem))
        if number is None:
            raise DataError(f"label file {label_file} says nothing of {root / 'val' / name}")
        labels.append(number)
    return [os.path.join("val", name) for name in names], labels


def scan(root: Path, label_file: Path | None = None) -> Listing:
    """List ``train/CLASS/*`` and ``val/CLASS/*``, or ``val/*`` with a label file. Hidden files are left out.

    Args:
        root: the image folder.
        label_file: labels of a flat validation folder: lines of ``FILE CLASS``, ImageNet's ``LOC_val_solution.csv``,
            or one class a line in the order of the file names. Classes are named as the folders in ``train``.

    Raises:
        DataError: a folder that is missing or empty, a class that only val has, or a label file that does not fit.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder")
    for split in SPLITS:
        if not (root / split).is_dir():
            raise DataError(f"{root} has no folder {split}; an image folder holds train/CLASS/* and val/CLASS/*")
    train = _by_class(root, "train")
    if not train:
        raise DataError(f"{root / 'train'} has no class folders; images belong in train/CLASS/")
    classes = tuple(train)
    files = {"train": [file for name in classes for file in train[name]]}
    labels = {"train": [number for number, name in enumerate(classes) for _ in train[name]]}
    if label_file is not None:
        files["val"], labels["val"] = _labelled(root, classes, label_file)
    else:
        val = _by_class(root, "val")
        if not val:
            raise DataError(f"{root / 'val'} has no class folders; a flat folder needs --val-labels FILE")
        for name in val:
            if name not in train:
                raise DataError(f"class {name!r} is in {root / 'val'} and not in {root / 'train'}")
        files["val"] = [file for name in classes for file in val.get(name, [])]
        labels["val"] = [number for number, name in enumerate(classes) for _ in val.get(name, [])]
    return Listing(root, classes, files, labels)
