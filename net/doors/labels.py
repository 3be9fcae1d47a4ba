"""Label files of a flat validation folder, as people have them."""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath

from ..common.errors import DataError
from .files import read_text

#: Bytes, lines, and characters of a line; a line for each of ImageNet's 50,000 images takes 3 MB.
LIMIT, _LINES, _LINE = 2**26, 2**21, 2**16
#: The head of ImageNet's LOC_val_solution.csv: a name without its ending, then a class and a box, perhaps repeated.
_KAGGLE = ["imageid", "predictionstring"]


def _cells(line_by_line: str) -> list[list[str]]:
    """Rows of a table: of tabs, else of commas (with quotes), else what stands before and after the last space."""
    if line_by_line.count("\n") > _LINES:
        raise ValueError(f"it has more than {_LINES:,} lines")
    lines = [line for line in line_by_line.splitlines() if line.strip()]
    if not lines:
        return []
    if any(len(line) > _LINE for line in lines):
        raise ValueError(f"it has a line of more than {_LINE:,} characters")
    if "\t" in lines[0]:
        rows = [line.split("\t") for line in lines]
    elif "," in lines[0]:
        # Strict: a quote that is never closed would swallow the rest of the file.
        rows = list(csv.reader(io.StringIO("\n".join(lines)), strict=True, skipinitialspace=True))
    else:
        rows = [line.strip().rsplit(None, 1) for line in lines]
    return [[cell.strip() for cell in row] for row in rows]


class _Files:
    """The files of the folder, by what a label file may call them: path in the folder, name, name without ending."""

    def __init__(self, names: Sequence[str]) -> None:
        self.known: dict[str, list[str]] = defaultdict(list)
        for name in names:
            for call in {name, PurePath(name).name, PurePath(name).stem}:
                self.known[call].append(name)

    def meant(self, cell: str) -> list[str]:
        return self.known.get(cell) or self.known.get(PurePath(cell).name, [])


def _natural(name: str) -> list[tuple[int, int]]:
    """A key that orders 2.png before 10.png, and else as text does."""
    parts = re.findall(r"[0-9]+|[^0-9]", name)
    return [(ord("0"), int(part)) if part[0] in "0123456789" else (ord(part), 0) for part in parts]


def _check_order(path: Path, names: Sequence[str]) -> None:
    """Refuse one class a line where people may have had another order of the files in mind."""
    for other in (sorted(names, key=_natural), sorted(names, key=str.casefold)):
        if other != list(names):
            here, there = next((one, two) for one, two in zip(names, other, strict=True) if one != two)
            raise DataError(
                f"label file {path} has one class a line, and it is not clear for which files: sorted as text {here} "
                f"comes before {there}, sorted by number or without regard to case after it; write lines of "
                "'FILE CLASS'"
            )


def read(path: Path, folder: Path, names: Sequence[str], classes: Collection[str]) -> list[str]:
    """The class of each file.

    Lines of ``FILE CLASS``, apart by a tab, a comma or a space, perhaps with a header and other columns; ImageNet's
    ``LOC_val_solution.csv``; or one class a line in the order of the names.

    Args:
        path: the label file.
        folder: of the images, for messages.
        names: the files in it, sorted.
        classes: the names that a class may have.

    Raises:
        DataError: the file cannot be read, names no class of these, says nothing of a file, or two things of one.
    """
    text = read_text(path, "label file", LIMIT)
    try:
        rows = _cells(text)
    except (ValueError, csv.Error) as error:
        raise DataError(f"label file {path} cannot be read: {error}") from None
    if not rows:
        raise DataError(f"label file {path} is empty")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    files = _Files(names)
    if [cell.lower() for cell in rows[0]] == _KAGGLE:
        pairs = [(row[0], row[1].split()[0]) for row in rows[1:] if len(row) > 1 and row[1]]
    elif len(lines) - len(names) in (0, 1) and all(line in classes for line in lines[len(lines) - len(names) :]):
        # The one line more is a header.
        return _in_order(path, names, lines[len(lines) - len(names) :])
    elif min(map(len, rows)) > 1:
        pairs = _pairs(rows, lines, files, classes)
    elif len(lines) == len(names):
        return _in_order(path, names, [_class(path, folder, line, classes) for line in lines])
    else:
        raise DataError(
            f"label file {path} must hold lines of 'FILE CLASS' or one class for each of the {len(names)} files in "
            f"{folder}; it has {len(lines)} lines"
        )
    truth: dict[str, str] = {}
    for cell, label in pairs:
        meant = files.meant(cell)
        _class(path, folder, label, classes)
        for name in meant:
            if truth.setdefault(name, label) != label:
                raise DataError(f"label file {path} says both {truth[name]!r} and {label!r} of {folder / name}")
    for name in names:
        if name not in truth:
            raise DataError(f"label file {path} says nothing of {folder / name}")
    return [truth[name] for name in names]


def _in_order(path: Path, names: Sequence[str], labels: list[str]) -> list[str]:
    _check_order(path, names)
    return labels


def _class(path: Path, folder: Path, label: str, classes: Collection[str]) -> str:
    if label not in classes:
        hint = "; write the names of the train folders, not numbers" if label.isdigit() else ""
        raise DataError(f"label file {path}: {label[:100]!r} is no class of {folder.parent / 'train'}{hint}")
    return label


def _pairs(rows: list[list[str]], lines: list[str], files: _Files, classes: Collection[str]) -> list[tuple[str, str]]:
    """(file, class) of each row, whichever columns they are in; a header is left out."""
    columns = range(min(map(len, rows)))
    file = max(columns, key=lambda column: sum(bool(files.meant(row[column])) for row in rows))
    label = max(set(columns) - {file}, key=lambda column: (sum(row[column] in classes for row in rows), -column))
    pairs = [(row[file], row[label]) for row in rows]
    if not any(cell in classes for _, cell in pairs):
        # Names that hold the separator, perhaps.
        separator = next((item for item in "\t," if item in lines[0]), None)
        split = [line.rsplit(separator, 1) for line in lines]
        pairs = [(cells[0].strip(), cells[-1].strip()) for cells in split]
    first, rest = pairs[0], pairs[1:]
    if rest and first[1] not in classes and not files.meant(first[0]):
        return rest
    return pairs
