"""Two records of one machine: what got slower, what got faster.

A difference counts when the middle three fifths of the two samples, from the 20th to the 80th percentile, do not meet
and the medians are more than 5 % apart: the first holds the spread within a run against it, the second what runs
differ by (PyTorch's own operators on an H200: 2 %). A CPU that others use differs by more than that from run to run;
there only records made alone on the machine can be compared. What was timed once has no spread and is not judged. What
was measured and now fails counts as slower.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from net.errors import DataError, UsageError

from .records import Row, read_record
from .tables import KEYS, Machine, machine_of, newest, number, values

#: Medians closer than this are the same.
SAME = 0.05
SHOWN = KEYS[1:]


class Change(NamedTuple):
    """What became of a thing measured: ``slower``, ``faster``, ``fails``, and the rows."""

    verdict: str
    before: Row
    after: Row


def change(before: Row, after: Row) -> Change | None:
    """What became of a thing; None when nothing can be said or nothing happened."""
    if "median_us" in before and str(after.get("status", "")).startswith("failed"):
        return Change("fails", before, after)
    if not all(name in row for row in (before, after) for name in ("median_us", "p20_us", "p80_us")):
        return None
    for verdict, low, high in (("slower", before, after), ("faster", after, before)):
        if low["p80_us"] < high["p20_us"] and high["median_us"] > low["median_us"] * (1 + SAME):
            return Change(verdict, before, after)
    return None


def _rows(path: Path) -> tuple[dict[tuple[object, ...], Row], set[Machine]]:
    if not path.is_file():
        raise UsageError(f"--compare: {path} is no file")
    try:
        rows = [row for row in newest(read_record(path)) if row["suite"]]
    except DataError as error:
        raise UsageError(f"--compare: {error}") from None
    return {(machine_of(row), values(row, KEYS)): row for row in rows}, {machine_of(row) for row in rows}


def compare(first: Path, second: Path) -> int:
    """Print what changed from one record to another; 1 if anything got slower, else 0.

    Raises:
        UsageError: a file that is no record; records of different machines, or of different things.
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
    found = [one for key in common if (one := change(before[key], after[key])) is not None]
    found.sort(key=lambda one: one.before["median_us"] / one.after.get("median_us", float("inf")))
    lines = []
    for one in found:
        old, new = one.before["median_us"], one.after.get("median_us")
        times = [number(new), f"{new / old - 1:+.0%}"] if new else ["", one.after["status"]]
        lines.append([one.verdict, *(one.before.get(name, "") for name in SHOWN), number(old), *times])
    judged = sum("p20_us" in before[key] and "p20_us" in after[key] for key in common)
    if lines:
        print(tabulate(lines, ["", *SHOWN, "before us", "after us", "change"], disable_numparse=True))
    print(f"{len(found)} of {len(common)} changed by more than noise; {judged} were timed often enough to tell")
    for name, one_side in ((first, set(before) - set(after)), (second, set(after) - set(before))):
        if one_side:
            print(f"{len(one_side)} only in {name}")
    sys.stdout.flush()
    return int(any(one.verdict != "faster" for one in found))
