"""Records: JSON Lines files in ``reports/data``, one row per measurement.

A row says what was measured (``suite``, ``case``, ``implementation``, ``mode``, ``shape``, ``dtype``,
``memory_format``), the values with their units in the column names (``median_us``, ``p20_us``, ``p80_us``,
``images_per_s``, ...), or in ``status`` why there are none, and the columns of
:func:`bench.measure.environment.describe`. Reading does not need torch.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from net.common.errors import DataError
from net.common.files import atomic_write

from .environment import HOME

DATA = HOME / "reports" / "data"
Row = dict[str, Any]
#: The suites; rows of ``choices`` are in no table.
SUITES = (
    *("ceilings", "gate", "kernels", "contention", "layers", "steps", "profile", "train", "input"),
    *("parallel", "choices", "launches"),
)
#: Columns that must be positive; other times are parts of these and may be zero.
TIMES = ("median_us", "p20_us", "p80_us", "limit_us", "synchronized_us", "wall_us")
#: Columns that every row has.
REQUIRED = ("suite", "case", "machine", "date")


def time_columns(seconds: Iterable[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of repeated times, in microseconds; for a single time only the median."""
    times = np.fromiter(seconds, float) * 1e6
    if len(times) == 1:
        return {"median_us": round(float(times[0]), 2)}
    low, median, high = (round(float(value), 2) for value in np.percentile(times, [20, 50, 80]))
    return {"median_us": median, "p20_us": low, "p80_us": high}


def write(rows: Iterable[Mapping[str, Any]], folder: Path = DATA) -> Path:
    """Append rows, with the machine's columns, to this day's and commit's record of this machine.

    The file is replaced atomically, so readers always find complete rows, even if this process is stopped.
    """
    from .environment import describe

    environment = describe()
    kind = "gpu" if environment["driver"] else "cpu"
    path = folder / f"{environment['date']}-{kind}-{environment['commit']}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    assert all(row.get("suite") in SUITES for row in rows)
    lines = "".join(json.dumps({**environment, **row}) + "\n" for row in rows)
    before = path.read_bytes() if path.exists() else b""
    with atomic_write(path) as file:
        file.write(before + lines.encode())
    return path


def read_record(path: Path) -> list[Row]:
    """The rows of one record, each with the file's name in ``record``.

    Raises:
        DataError: a line is not a row; the message names file and line.
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
        if row["suite"] not in SUITES:
            raise DataError(f"{place}: suite must be one of {', '.join(SUITES)}; got {row['suite']!r}")
        row["record"] = path.name
        rows.append(row)
    return rows


def moment(row: Row) -> str:
    """Date and time of a row, as a sort key; the first records have no time."""
    return f"{row['date']} {row.get('time', '')}"


def read_training(path: Path) -> Row:
    """The row of a full training run, from its ``run.json``.

    Raises:
        DataError: a key is missing.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        copied = {key: run[key] for key in ("case", "cores", "threads", "torch", "python", "date", "cpu_s")}
        return copied | {
            "suite": "steps",
            "mode": "train",
            "machine": f"CPU: {run['machine'].partition(',')[0]}",
            "commit": run["commit"][:10],
            "median_us": 1e6 * run["wall_s"],
            "top1_accuracy_percent": 100 - run["test"][0]["top1_error_percent"],
            "judged_on": "test images",
            "record": f"trainings/{path.parent.name}/{path.name}",
        }
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no record of a training: {type(error).__name__}: {error}") from None


def read(folder: Path = DATA) -> list[Row]:
    """Every row of every record, and one per training run, oldest first.

    Raises:
        DataError: as :func:`read_record`.
    """
    rows = [row for path in sorted(folder.glob("*.jsonl")) for row in read_record(path)]
    rows += map(read_training, sorted(folder.glob("trainings/*/run.json")))
    # The names of one day's records are not in chronological order.
    return sorted(rows, key=moment)
