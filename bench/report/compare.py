"""Compare two records of one machine: what got slower or faster, corrected for the machine itself.

A machine's speed varies: a shared one differs by a third from run to run. Code that is the same in both records shows
by how much: copies, matrix products, and PyTorch's own operators of the same version. These are the yardsticks. They
are grouped by kind (limited by memory, limited by products in a dtype, or run with busy processes). A row is corrected
by the median ratio of the yardsticks of its kind. Yardsticks themselves are not judged, and neither are other rivals,
because records do not contain their versions. Rows without a yardstick, such as decoding images, are compared directly.

A difference counts if two conditions hold. First, the intervals from the 20th to the 80th percentile of the two samples
are further apart than the same interval of all yardsticks around their medians; this covers the spread within a run.
Second, the medians differ by more than 5 %; runs on a quiet machine differ by less (PyTorch's own operators on an H200:
2 %). A row that was timed once has no spread and is not judged. A measurement that succeeded before and now fails
counts as slower.
"""

import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from net.common.errors import DataError, UsageError

from ..measure.implementations import PYTORCH, name_of, ours
from ..measure.records import Row, read_record
from .rows import KEYS, Machine, machine_of, newest, values
from .tables import number

#: Medians closer than this are the same.
SAME = 0.05
BUSY = "busy_processes"
SHOWN = KEYS[1:]
#: Suites in which a rival's row contains none of this project's code.
PURE = ("kernels", "contention")
#: The kind of rows that are limited by memory.
MEMORY = "memory"


class Drift(NamedTuple):
    """Ratios of the same code's times, after to before: median, 20th and 80th percentile, and the number of rows."""

    median: float
    low: float
    high: float
    rows: int


class Change(NamedTuple):
    """The verdict (``slower``, ``faster`` or ``fails``), both rows, and the drift of the machine."""

    verdict: str
    before: Row
    after: Row
    drift: Drift


def change(before: Row, after: Row, drift: Drift) -> Change | None:
    """The verdict on a pair of rows; None if there is none or nothing changed."""
    if "median_us" in before and str(after.get("status", "")).startswith("failed"):
        return Change("fails", before, after, drift)
    if not _sampled(before, after):
        return None
    ratio = after["median_us"] / before["median_us"] / drift.median
    if ratio > 1 + SAME and after["p20_us"] > before["p80_us"] * drift.high:
        return Change("slower", before, after, drift)
    if ratio < 1 / (1 + SAME) and after["p80_us"] < before["p20_us"] * drift.low:
        return Change("faster", before, after, drift)
    return None


def _sampled(*rows: Row) -> bool:
    return all(name in row for row in rows for name in ("median_us", "p20_us", "p80_us"))


def yardstick(row: Row) -> bool:
    """Whether a row is of PyTorch's code alone, which is the same in both records."""
    return row["suite"] == "ceilings" or (row["suite"] in PURE and name_of(row) in PYTORCH)


def judged(row: Row) -> bool:
    """Whether a row contains this project's code."""
    return row["suite"] != "ceilings" and (row["suite"] not in PURE or ours(row))


def kinds(rows: Iterable[Row]) -> list[str]:
    """The kind of each row of one record: what limits it. Empty where unknown."""
    rows = list(rows)
    ceilings = [row for row in rows if row["suite"] == "ceilings"]
    copied = max((row.get("gb_per_s", 0) for row in ceilings if row["case"] == "copy"), default=0)
    products = {row["dtype"]: row["gflop_per_s"] for row in ceilings if row["case"] != "copy" and "gflop_per_s" in row}

    def kind(row: Row) -> str:
        product = f"products in {row.get('dtype')}"
        if row["suite"] == "ceilings":
            return MEMORY if row["case"] == "copy" else product
        if row.get(BUSY):
            return f"{row[BUSY]} busy processes"
        if row["suite"] == "contention":
            return MEMORY
        if "gflop" not in row or "fewest_mb" not in row:
            return ""
        # As in bench.measure.ceilings: no dtype is computed more slowly than float32.
        rate = max(products.get(row["dtype"], 0), products.get("float32", 0))
        return product if rate and copied and row["gflop"] / rate > row["fewest_mb"] / copied * 1e-3 else MEMORY

    return [kind(row) for row in rows]


def drifts(before: list[Row], after: list[Row]) -> dict[str, Drift]:
    """The machine's drift per kind, from the yardsticks among pairs of rows; no drift for rows without a kind.

    The spread around the medians is taken over all kinds together, because a kind may have a single yardstick.
    """
    ratios: dict[str, list[float]] = {"": []}
    for kind, old, new in zip(kinds(before), before, after, strict=True):
        its = ratios.setdefault(kind, [])
        if kind and yardstick(old) and "median_us" in old and "median_us" in new:
            its.append(new["median_us"] / old["median_us"])
    medians = {kind: statistics.median(its or [1.0]) for kind, its in ratios.items()}
    spread = [ratio / medians[kind] for kind, its in ratios.items() for ratio in its] or [1.0]
    low, high = (float(value) for value in np.percentile(spread, [20, 80]))
    return {kind: Drift(its, its * low, its * high, len(ratios[kind])) for kind, its in medians.items()}


def _spread(drift: Drift) -> str:
    return f"from {drift.low / drift.median - 1:+.0%} to {drift.high / drift.median - 1:+.0%}"


def _rows(path: Path) -> tuple[dict[tuple[object, ...], Row], set[Machine]]:
    if not path.is_file():
        raise UsageError(f"--compare: {path} is no file")
    try:
        rows = newest(read_record(path))
    except DataError as error:
        raise UsageError(f"--compare: {error}") from None
    return {(machine_of(row), values(row, KEYS)): row for row in rows}, {machine_of(row) for row in rows}


def compare(first: Path, second: Path) -> int:
    """Print what changed from one record to another; 1 if anything got slower, else 0.

    Raises:
        UsageError: a file is not a record; or the records are of different machines or different measurements.
    """
    (before, machine), (after, other) = _rows(first), _rows(second)
    if machine != other:
        raise UsageError(
            f"--compare: {first} is of {' and '.join(sorted(map(str, machine))) or 'nothing'}, {second} of "
            f"{' and '.join(sorted(map(str, other))) or 'nothing'}; only records of one machine can be compared"
        )
    common = [key for key in before if key in after]
    if not common:
        raise UsageError(f"--compare: {first} and {second} have no measurement in common")
    pairs = [(before[key], after[key]) for key in common]
    drift = drifts([old for old, _ in pairs], [new for _, new in pairs])
    for kind, its in drift.items():
        if its.rows:
            moved = "moved" if abs(its.median - 1) > SAME else "is the same"
            print(f"the machine {moved}, {kind}: {its.median - 1:+.0%} time for the same code ({its.rows} rows)")
    print(f"rows are corrected by the drift of their kind, around which the same code varies {_spread(drift[''])}")
    found, sampled = [], 0
    for kind, (old, new) in zip(kinds(old for old, _ in pairs), pairs, strict=True):
        if not judged(old):
            continue
        sampled += _sampled(old, new)
        if (one := change(old, new, drift[kind])) is not None:
            found.append(one)
    found.sort(key=lambda one: one.before["median_us"] / one.after.get("median_us", float("inf")) * one.drift.median)
    lines = []
    for one in found:
        was, now = one.before["median_us"], one.after.get("median_us")
        if now:
            times = [number(now), f"{now / was - 1:+.0%}", f"{now / was / one.drift.median - 1:+.0%}"]
        else:
            times = ["", one.after["status"], ""]
        lines.append([one.verdict, *(one.before.get(name, "") for name in SHOWN), number(was), *times])
    if lines:
        titles = ["", *SHOWN, "before us", "after us", "change", "less the machine's"]
        print(tabulate(lines, titles, disable_numparse=True))
    count = sum(judged(old) for old, _ in pairs)
    print(f"{len(found)} of {count} changed by more than noise; {sampled} were timed often enough to tell")
    for name, one_side in ((first, set(before) - set(after)), (second, set(after) - set(before))):
        if one_side:
            print(f"{len(one_side)} only in {name}")
    sys.stdout.flush()
    return int(any(one.verdict != "faster" for one in found))
