"""The parts of a page: tables whose cells hold their text, their number, and the reason if there is none."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..measure.records import Row
from .rows import machine_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

NEEDS_GPU = "needs a GPU"
#: Columns that a table shows at first; the others appear on a click.
SHOWN = 9


class Cell(NamedTuple):
    """The text of a cell, the number it is sorted by, and the reason if there is none."""

    text: str
    value: float | None = None
    why: str = ""


class Column(NamedTuple):
    """Title, key in a row, format of the value, and why a measured row may have none.

    ``how`` is ``text``, ``time`` (in the table's unit), ``ms``, ``interval``, ``number``, ``rate`` or a format string.
    """

    title: str
    key: str
    how: str = "text"
    why: str = "not measured"

    @property
    def numeric(self) -> bool:
        return self.how != "text"


class Table(NamedTuple):
    """Rows of cells under columns, of which the first :data:`SHOWN` are visible at first.

    ``about`` is the paragraph above it, ``facts`` what all rows have in common, ``notes`` what is missing and why,
    ``sources`` the records. A ``folded`` table appears as a whole on a click.
    """

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    sources: Sequence[str] = ()
    notes: Sequence[str] = ()
    facts: str = ""
    folded: bool = False
    about: str = ""

    def shared(self) -> "Table":
        """The table without text columns whose cells are all equal; they are stated once, above it."""
        lines = list(zip(*self.rows, strict=True))
        same = [
            place > 0 and len(self.rows) > 1 and not column.numeric and len({one.text for one in lines[place]}) == 1
            for place, column in enumerate(self.columns)
        ]
        facts = [
            f"{self.columns[place].title} {lines[place][0].text}" for place, all_same in enumerate(same) if all_same
        ]
        keep = [place for place, all_same in enumerate(same) if not all_same]
        rows = [[row[place] for place in keep] for row in self.rows]
        columns = [self.columns[place] for place in keep]
        return self._replace(columns=columns, rows=rows, facts=", ".join(filter(None, [self.facts, *facts])))

    @property
    def more(self) -> str:
        """The number of columns hidden at first, in words; empty if none are."""
        count = len(self.columns) - SHOWN
        return f"{count} more column{'s' if count > 1 else ''}" if count > 0 else ""


class Figure(NamedTuple):
    """A file below ``reports/``, its content in words, and the function that draws it."""

    file: str
    about: str
    draw: "Callable[[], Canvas]"


class Section(NamedTuple):
    """Figures and tables under a heading, usually of one machine.

    ``group`` is GPU, CPU or neither; the page opens the first section of each group.
    """

    title: str
    figures: Sequence[Figure]
    tables: Sequence[Table]
    group: str = ""


class Page(NamedTuple):
    """A file of ``reports/``: its name without ``.md``, title, a line for the list of pages, and its content."""

    name: str
    title: str
    line: str
    about: str
    sections: Sequence[Section]
    figures: Sequence[Figure] = ()


NO_RIVAL = "no such rival in the same record"
NO_CEILING = "the machine's ceilings are not in the record"
NONE_HERE = "not applicable"
#: Every column measured by pytest and the device suite, most important first. A table omits columns in which none of
#: its rows has a value.
COLUMNS = (
    Column("case", "case"),
    Column("kernel", "kernel"),
    Column("layer", "layer"),
    Column("implementation", "implementation", "text", NONE_HERE),
    Column("mode", "mode", "text", NONE_HERE),
    Column("shape", "shape", "text", NONE_HERE),
    Column("dtype", "dtype", "text", NONE_HERE),
    Column("other busy processes", "busy_processes", "{:.0f}"),
    Column("status", "verdict"),
    Column("median", "median_us", "time"),
    Column("launches per step", "launches_per_step", "rate", NONE_HERE),
    Column("time per step", "us_per_step", "time", NONE_HERE),
    Column("% of step", "percent_of_step", "{:,.1f}", NONE_HERE),
    Column("wall clock", "wall_us", "time", NONE_HERE),
    Column("gaps", "gaps_us", "time", NONE_HERE),
    Column("images/s", "images_per_s", "rate", NONE_HERE),
    Column("x aten", "x_aten", "{:,.2f}", NO_RIVAL),
    Column("x compiled", "x_compiled", "{:,.2f}", NO_RIVAL),
    Column("% of limit", "percent_of_limit", "{:,.0f}", NO_CEILING),
    Column("kernels of", "kernels_of", "text", "runs no Triton kernels"),
    Column("GFLOP/s", "gflop_per_s", "rate", NONE_HERE),
    Column("GB/s", "gb_per_s", "rate", NONE_HERE),
    Column("KB per image", "kb_per_image", "{:,.1f}", NONE_HERE),
    Column("GB for ImageNet", "imagenet_gb", "{:,.1f}", NONE_HERE),
    Column("error, gray levels", "gray_levels", "{:,.2f}", NONE_HERE),
    Column("top-1 %", "top1_accuracy_percent", "{:.2f}", NONE_HERE),
    Column("CPU s", "cpu_s", "{:,.0f}", NONE_HERE),
    Column("updates", "updates", "{:,.0f}", NONE_HERE),
    Column("step alone", "step_us", "time", NONE_HERE),
    Column("lost", "lost_us", "time", NONE_HERE),
    Column("repeats", "repeats", "{:,.0f}", NONE_HERE),
    Column("p20 to p80", "p20_us", "interval", "timed once"),
    Column("limit", "limit_us", "time", NO_CEILING),
    Column("synchronized", "synchronized_us", "time"),
    Column("memory format", "memory_format", "text", NONE_HERE),
    Column("% of a copy", "percent_of_copy_bandwidth", "{:,.0f}", NO_CEILING),
    Column("GFLOP", "gflop", "number", NONE_HERE),
    Column("minimum MB", "fewest_mb", "number", NONE_HERE),
    Column("parameters", "parameters", "{:,.0f}", NONE_HERE),
    Column("output MiB", "output_mib", "{:,.1f}", NONE_HERE),
    Column("scratch MiB", "scratch_mib", "{:,.1f}", NONE_HERE),
    Column("saved MiB", "saved_mib", "{:,.1f}"),
    Column("peak MiB", "peak_mib", "{:,.0f}"),
    Column("process peak MiB", "process_peak_mib", "{:,.0f}"),
    Column("first call s", "first_call_s", "{:,.1f}"),
    Column("first call, warm cache s", "first_call_warm_s", "{:,.1f}"),
    Column("kernel launches", "kernels_launched", "{:,.0f}"),
    Column("sum of layers", "sum_of_layers_us", "time", NONE_HERE),
    Column("% explained", "percent_explained", "{:.1f}", NONE_HERE),
    *(
        Column(kind.replace("_relu", " and ReLU"), f"{kind}_launches", "{:,.0f}")
        for kind in (
            *("pointwise", "all"),
            *("convolutions", "products", "stages", "bias_relu", "elementwise", "loss", "update"),
        )
    ),
    *(
        Column(f"{kind.replace('_relu', ' and ReLU')} MB", f"{kind}_mb", "{:,.0f}")
        for kind in ("stages", "bias_relu", "elementwise")
    ),
    Column("of weights and their gradients", "copied_weights"),
    Column("of activations and their gradients", "copied_activations"),
    Column("commit", "revision"),
)
BY_KEY = {column.key: column for column in COLUMNS}


def sources(rows: Iterable[Row]) -> list[str]:
    """A line for each record, commit and day, with machine and versions."""
    lines = []
    for row in rows:
        parts = [str(machine_of(row))]
        parts += [f"{name} {row[name]}" for name in ("triton", "driver") if row.get(name)]
        revision = f"{row.get('commit') or 'unknown'}{' with changes' if row.get('dirty') else ''}"
        lines.append(f"`reports/data/{row['record']}`: {row['date']}, commit {revision}; {', '.join(parts)}")
    return list(dict.fromkeys(lines))


def number(value: float) -> str:
    """Four significant digits, and no more than four decimals."""
    decimals = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(decimals, 0), 4)}f}"


def unit_of(rows: Iterable[Row]) -> tuple[str, float]:
    """The unit for times and its length in microseconds: milliseconds if the median time is at least one."""
    times = [row[key] for row in rows for key in ("median_us", "us_per_step") if key in row]
    return ("ms", 1e3) if times and statistics.median(times) >= 1000 else ("us", 1.0)


def cell(row: Row, column: Column, scale: float = 1.0) -> Cell:
    """A row's value under a column, its times in units of ``scale`` microseconds."""
    value = row.get(column.key)
    if value is None:
        return Cell("-", None, str(row["status"]) if "status" in row and column.numeric else column.why)
    if isinstance(value, Cell):
        return value
    if column.how == "text":
        return Cell(str(value))
    if column.how == "interval":
        return Cell(f"{number(value / scale)} to {number(row['p80_us'] / scale)}", value)
    if column.how in ("time", "ms", "number"):
        text = number(value / {"time": scale, "ms": 1e3, "number": 1.0}[column.how])
    elif column.how == "rate":
        text = f"{value:,.{0 if value >= 100 else 1}f}"
    else:
        text = column.how.format(value)
    if column.key == "median_us" and "unverified" in row:
        return Cell(f"{text} (unverified)", value, str(row["unverified"]))
    return Cell(text, value)


def possible(rows: Iterable[Row]) -> tuple[list[Row], list[str]]:
    """The rows, except those that need another machine, and notes that name what is missing."""
    rows = list(rows)
    kept = [row for row in rows if row.get("status") != NEEDS_GPU]
    absent = sorted({str(row["implementation"]) for row in rows if row.get("status") == NEEDS_GPU})
    notes = [f"Not measured without a GPU: {', '.join(absent)}."] if absent else []
    failed: dict[str, list[str]] = {}
    for row in kept:
        for reason in filter(None, (row.get("status"), row.get("unverified"))):
            name = ", ".join(str(row[key]) for key in ("case", "implementation", "mode") if key in row)
            failed.setdefault(str(reason), []).append(name)
    for reason, names in failed.items():
        names = list(dict.fromkeys(names))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        notes.append(f"{'; '.join(names[:3])}{more}: {reason}.")
    return kept, notes


def detail(
    title: str, rows: Sequence[Row], columns: Sequence[Column] = COLUMNS, *, folded: bool = False, about: str = ""
) -> list[Table]:
    """The table of ``rows``; none if there are none. Values that all rows share are stated once, above it."""
    rows, notes = possible(rows)
    if not rows:
        return []
    unit, scale = unit_of(rows)
    used = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    cells = [[cell(row, column, scale) for column in used] for row in rows]
    return [Table(title, in_unit(used, unit), cells, sources(rows), notes, folded=folded, about=about).shared()]


def in_unit(columns: Iterable[Column], unit: str) -> list[Column]:
    """The columns, with the unit added to those of times."""
    return [
        column._replace(title=f"{column.title} {unit}") if column.how in ("time", "interval") else column
        for column in columns
    ]
