"""Records: files of JSON lines in ``reports/data``, a row for each measurement.

A row says what was measured (``case``, ``implementation``, ``mode``, ``shape``, ``dtype``, ``memory_format``), the
values with their units in the column names (``median_us``, ``p20_us``, ``p80_us``, ``images_per_s``, ...), and all that
:func:`bench.environment.describe` says of the machine.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .environment import ROOT, describe

DATA = ROOT / "reports" / "data"


def time_columns(seconds: Iterable[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of repeated times, in microseconds; of a single one the time alone."""
    times = np.fromiter(seconds, float) * 1e6
    if len(times) == 1:
        return {"median_us": round(float(times[0]), 2)}
    low, median, high = (round(float(value), 2) for value in np.percentile(times, [20, 50, 80]))
    return {"median_us": median, "p20_us": low, "p80_us": high}


def write(rows: Iterable[Mapping[str, Any]], folder: Path = DATA) -> Path:
    """Append rows, with the machine's columns, to this day's and commit's record of this machine."""
    environment = describe()
    kind = "gpu" if environment["driver"] else "cpu"
    path = folder / f"{environment['date']}-{kind}-{environment['commit']}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        for row in rows:
            # What a model says of another machine names that machine itself.
            file.write(json.dumps({**environment, **row}) + "\n")
    return path


def read(folder: Path = DATA) -> pd.DataFrame:
    """Every row of every record, oldest first, with the record's name in the column ``record``."""
    frames = []
    for path in sorted(folder.glob("*.jsonl")):
        frame = pd.DataFrame(json.loads(line) for line in path.read_text().splitlines())
        frame["record"] = path.name
        frames.append(frame)
    if not frames:
        return pd.DataFrame()
    rows = pd.concat(frames, ignore_index=True)
    # Of one day's records the name says nothing of the order; the first ones did not note the time.
    moments = rows["date"] + " " + (rows["time"].fillna("") if "time" in rows else "")
    return rows.loc[moments.sort_values(kind="stable").index].reset_index(drop=True)
