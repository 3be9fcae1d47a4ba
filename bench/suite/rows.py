"""The rows of one run, in its folder: how its processes know what the others have measured. Needs no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NAME = "rows.jsonl"


def read_rows(folder: Path) -> list[Row]:
    """The rows that a run has so far; a line that a killed process has not finished is left out."""
    path = folder / NAME
    return complete(path.read_text()) if path.exists() else []


def complete(text: str) -> list[Row]:
    """The rows of a file of JSON lines, without those that are not whole."""
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def add_row(folder: Path, row: Mapping[str, Any]) -> None:
    """Append a row to those of the run."""
    with open(folder / NAME, "a") as file:
        file.write(json.dumps(row) + "\n")
