"""Records: files of JSON lines in ``reports/data``, a row for each measurement.

A row says what was measured (``suite``, ``case``, ``implementation``, ``mode``, ``shape``, ``dtype``,
``memory_format``), the values with their units in the column names (``median_us``, ``p20_us``, ``p80_us``,
``images_per_s``, ...), or in ``status`` why there are none, and all that :func:`bench.environment.describe` says of the
machine. Reading needs no torch.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from net.common.errors import DataError

from .environment import HOME

DATA = HOME / "reports" / "data"
Row = dict[str, Any]
#: Of rows that say so; those of ``parallel`` and ``choices`` are in no table of this package's.
SUITES = (
    *("ceilings", "gate", "kernels", "contention", "layers", "steps", "profile", "train", "input"),
    *("parallel", "choices"),
)
#: Columns that are more than zero; others in microseconds are parts of them, and may be none.
TIMES = ("median_us", "p20_us", "p80_us", "limit_us", "synchronized_us", "wall_us")
#: What every row says.
REQUIRED = ("case", "machine", "date")
#: The suite of rows that do not name one, by how their case begins; some belong to none. The first that fits counts.
SUITE_OF_CASE = {
    "copy": "ceilings",
    "matrix product": "ceilings",
    "stage": "kernels",
    "update of a network in parallel": "",
    "update of one rank": "",
    "update of ": "steps",
    "digits, ": "steps",
    "prepare, ": "input",
    "loader, ": "input",
    "crop, ": "input",
    "the kernels' tests": "",
    "compute-sanitizer": "",
    "choice: ": "",
    "trace": "",
    "all-reduce of two processes": "",
}


def time_columns(seconds: Iterable[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of repeated times, in microseconds; of a single one the time alone."""
    times = np.fromiter(seconds, float) * 1e6
    if len(times) == 1:
        return {"median_us": round(float(times[0]), 2)}
    low, median, high = (round(float(value), 2) for value in np.percentile(times, [20, 50, 80]))
    return {"median_us": median, "p20_us": low, "p80_us": high}


def write(rows: Iterable[Mapping[str, Any]], folder: Path = DATA) -> Path:
    """Append rows, with the machine's columns, to this day's and commit's record of this machine."""
    from .environment import describe

    environment = describe()
    kind = "gpu" if environment["driver"] else "cpu"
    path = folder / f"{environment['date']}-{kind}-{environment['commit']}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        for row in rows:
            # What a model says of another machine names that machine itself.
            file.write(json.dumps({**environment, **row}) + "\n")
    return path


def read_record(path: Path) -> list[Row]:
    """The rows of one record, each with its suite and, in ``record``, the file's name.

    Raises:
        DataError: a line is no row; the message names file and line.
    """
    rows = []
    # Not splitlines(), which also ends lines at characters that JSON strings may hold.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{place} must be an object, a row of a record; got {line.decode()[:40]}")
        for name in REQUIRED:
            if not isinstance(row.get(name), str) or not row[name]:
                raise DataError(f"{place}: a row must say its {name} in words; got {row.get(name)!r}")
        for name in TIMES:
            value = row.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise DataError(f"{place}: {name} must be a positive number; got {value!r}")
        if "suite" not in row:
            begins = [suite for begin, suite in SUITE_OF_CASE.items() if row["case"].startswith(begin)]
            row["suite"] = begins[0] if begins else None
        elif row["suite"] not in SUITES:
            row["suite"] = None
        if row["suite"] is None:
            raise DataError(f"{place}: the suite of case {row['case']!r} must be one of {', '.join(SUITES)}")
        row = _renamed(row)
        row["record"] = path.name
        rows.append(row)
    return rows


def _renamed(row: Row) -> Row:
    """A row in today's names: of the paper's network a CPU's first rows say no mode of compilation, being eager."""
    if row["case"] == "update of the paper's network":
        return {**row, "case": "update of paper", "implementation": f"{row['implementation']}, eager"}
    return row


def moment(row: Row) -> str:
    """Day and time of a row, in the order of which they sort; the first records do not note the time."""
    return f"{row['date']} {row.get('time', '')}"


def read(folder: Path = DATA) -> list[Row]:
    """Every row of every record, oldest first.

    Raises:
        DataError: as :func:`read_record`.
    """
    rows = [row for path in sorted(folder.glob("*.jsonl")) for row in read_record(path)]
    # Of one day's records the name says nothing of the order.
    return sorted(rows, key=moment)
