"""JSON Lines logs of runs, ablations and Figure 1. Does not import torch."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.errors import DataError, MissingError
from .files import read

#: Maximum bytes; a run of ninety epochs writes 20 MB.
_LIMIT = 2**28
_KINDS = ("train", "eval")
#: The columns of a run's ``metrics.csv`` and the keys of its ``metrics.jsonl``.
COLUMNS = (
    "step",
    "epoch",
    "kind",
    "loss",
    "top1_error_percent",
    "top5_error_percent",
    "lr",
    "images_per_s",
    "memory_mib",
    "elapsed_s",
)
_NUMBERS = tuple(name for name in COLUMNS if name not in ("step", "kind"))


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and row.get("kind") in _KINDS
        and type(row.get("step")) is int
        and 0 <= row["step"] < 2**63
        and all(row.get(name) is None or type(row[name]) in (int, float) for name in _NUMBERS)
        and {"epoch", "loss", "top1_error_percent"} <= row.keys()
    )


def json_lines(path: Path, what: str, accepted: Callable[[Any], bool]) -> list[dict[str, Any]]:
    """The valid objects of a JSON Lines file.

    A truncated last line is skipped. So is any other damaged line, with a note: the lines around it are still valid.

    Args:
        path: the file.
        what: the name of the format, for messages.
        accepted: whether an object is valid.

    Raises:
        DataError: the file does not exist, is not a regular file, or is too large.
    """
    lines = read(path, what, _LIMIT).split(b"\n")
    rows, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if accepted(row):
            rows.append(row)
        elif line.strip() and number < len(lines):
            damaged.append(number)
    if damaged:
        first = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        print(f"{path}: skipped {len(damaged)} damaged lines: {first}")
    return rows


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics log; empty if there is no such file. See :func:`json_lines`."""
    try:
        return json_lines(path, "metrics", _is_row)
    except MissingError:
        return []


def _is_result(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    error, seed = row.get("top1_error_percent", 0), row.get("seed", 0)
    return isinstance(row.get("settings"), dict) or (
        isinstance(row.get("ablation"), str) and type(error) in (int, float) and type(seed) is int
    )


def read_results(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings and the rows of a results file of :mod:`net.ablations`. See :func:`json_lines`.

    Raises:
        DataError: it is not a results file.
    """
    lines = json_lines(path, "results", _is_result)
    if not lines or "settings" not in lines[0] or not all("ablation" in row for row in lines[1:]):
        raise DataError(f"{path} is not a results file of net.ablations")
    return lines[0]["settings"], lines[1:]


def _is_curve(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    epochs, errors = row.get("epochs"), row.get("errors")
    return (
        isinstance(row.get("activation"), str)
        and type(row.get("seed")) is int
        and isinstance(epochs, list)
        and isinstance(errors, list)
        and len(epochs) == len(errors)
        and all(
            type(number) in (int, float) and math.isfinite(number)
            for number in (row.get("rate"), row.get("max_epochs"), *epochs, *errors)
        )
    )


def read_curves(path: Path) -> list[dict[str, Any]]:
    """The curves of ``net.figures activations``; empty if there is no such file. See :func:`json_lines`."""
    try:
        return json_lines(path, "curves", _is_curve)
    except MissingError:
        return []
