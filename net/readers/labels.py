"""Label files of a flat validation folder, in the formats in common use."""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath

from ..common.errors import DataError
from .files import read_text

#: Maximum bytes, lines, and characters of a line; ImageNet's 50,000 lines have 3 MB.
LIMIT, _LINES, _LINE = 2**26, 2**21, 2**16
#: Header of ImageNet's LOC_val_solution.csv: a file name without suffix, then one or more classes with boxes.
_KAGGLE = ["imageid", "predictionstring"]


def _cells(line_by_line: str) -> list[list[str]]:
    """The rows of a table, separated by tabs, else by commas (with quotes), else split at the last space."""
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
        # strict: an unclosed quote would otherwise swallow the rest of the file.
        rows = list(csv.reader(io.StringIO("\n".join(lines)), strict=True, skipinitialspace=True))
    else:
        rows = [line.strip().rsplit(None, 1) for line in lines]
    return [[cell.strip() for cell in row] for row in rows]


class _Files:
    """The files of the folder, by what a label file may call them: relative path, name, or name without suffix."""

    def __init__(self, names: Sequence[str]) -> None:
        self.known: dict[str, list[str]] = defaultdict(list)
        for name in names:
            for alias in {name, PurePath(name).name, PurePath(name).stem}:
                self.known[alias].append(name)

    def matches(self, cell: str) -> list[str]:
        return self.known.get(cell) or self.known.get(PurePath(cell).name, [])


def _natural(name: str) -> list[tuple[int, int]]:
    """A sort key that orders 2.png before 10.png, and otherwise as text."""
    parts = re.findall(r"[0-9]+|[^0-9]", name)
    return [(ord("0"), int(part)) if part[0] in "0123456789" else (ord(part), 0) for part in parts]


def _check_order(path: Path, names: Sequence[str]) -> None:
    """Reject one class per line if the author may have had the files in another order."""
    for other in (sorted(names, key=_natural), sorted(names, key=str.casefold)):
        if other != list(names):
            here, there = next((one, two) for one, two in zip(names, other, strict=True) if one != two)
            raise DataError(
                f"label file {path} has one class per line, but the order of the files is ambiguous: {here} sorts "
                f"before {there} as text, and after it by number or ignoring case; write lines of 'FILE CLASS'"
            )


def read(path: Path, folder: Path, names: Sequence[str], classes: Collection[str]) -> list[str]:
    """The class of each file.

    Supported are lines of ``FILE CLASS``, separated by a tab, comma or space, optionally with a header and further
    columns; ImageNet's ``LOC_val_solution.csv``; and one class per line in the order of the names.

    Args:
        path: the label file.
        folder: of the images, for messages.
        names: the files in it, sorted.
        classes: the allowed class names.

    Raises:
        DataError: the file cannot be read, names an unknown class, or has no label or conflicting labels for a file.
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
        # An extra first line is a header.
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
        matches = files.matches(cell)
        _class(path, folder, label, classes)
        for name in matches:
            if truth.setdefault(name, label) != label:
                raise DataError(f"label file {path} has both {truth[name]!r} and {label!r} for {folder / name}")
    for name in names:
        if name not in truth:
            raise DataError(f"label file {path} has no label for {folder / name}")
    return [truth[name] for name in names]


def _in_order(path: Path, names: Sequence[str], labels: list[str]) -> list[str]:
    _check_order(path, names)
    return labels


def _class(path: Path, folder: Path, label: str, classes: Collection[str]) -> str:
    if label not in classes:
        hint = "; use the names of the folders in train, not numbers" if label.isdigit() else ""
        raise DataError(f"label file {path}: {label[:100]!r} is not a class in {folder.parent / 'train'}{hint}")
    return label


def _pairs(rows: list[list[str]], lines: list[str], files: _Files, classes: Collection[str]) -> list[tuple[str, str]]:
    """(file, class) of each row, with the columns found by content; a header is skipped."""
    columns = range(min(map(len, rows)))
    file = max(columns, key=lambda column: sum(bool(files.matches(row[column])) for row in rows))
    label = max(set(columns) - {file}, key=lambda column: (sum(row[column] in classes for row in rows), -column))
    pairs = [(row[file], row[label]) for row in rows]
    if not any(cell in classes for _, cell in pairs):
        # File names may contain the separator.
        separator = next((item for item in "\t," if item in lines[0]), None)
        split = [line.rsplit(separator, 1) for line in lines]
        pairs = [(cells[0].strip(), cells[-1].strip()) for cells in split]
    first, rest = pairs[0], pairs[1:]
    if rest and first[1] not in classes and not files.matches(first[0]):
        return rest
    return pairs
