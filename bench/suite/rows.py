"""The rows of one run, in its folder, which its processes share. Needs no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NAME = "rows.jsonl"


def read_rows(folder: Path) -> list[Row]:
    """The rows of a run so far; a line that a killed process left unfinished is skipped."""
    path = folder / NAME
    return complete(path.read_text()) if path.exists() else []


def complete(text: str) -> list[Row]:
    """The rows of JSON lines; incomplete lines are skipped."""
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
