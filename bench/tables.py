"""Tables from records: the newest row of each thing measured, machine by machine.

A ratio says how many times faster a row is than a rival of the same record, machine, case, mode, shape and dtype, in
the memory format that serves the rival best. ``x aten`` is against PyTorch's own operators called eagerly,
``x compiled`` against the fastest way that ``torch.compile`` makes of them. A rival in another record gives no ratio,
and a row that no check of the results stands behind (``unverified``) gets none.
"""

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from .records import Row, moment

#: What a row measures, but for the machine.
KEYS = (
    *("suite", "case", "implementation", "mode", "shape", "dtype", "memory_format"),
    *("busy_processes", "kernel", "layer"),
)
#: What a rival has in common with a row; its implementation and memory format are its own.
TASK = ("suite", "case", "mode", "shape", "dtype", "busy_processes")
MODES = (
    *("inference", "forward", "backward", "input_gradient", "weight_gradient", "forward_backward"),
    *("training", "train_step"),
)
IMPLEMENTATIONS = (
    *("aten", "compiled", "xla", "reference", "inductor", "triton", "cudnn", "compiled reference", "traced"),
    *("onnxruntime", "openvino"),
)
#: What is not this project's, by the part of an implementation's name before the comma.
OTHERS = ("aten", "compiled", "cudnn", "xla", "onnxruntime", "openvino", "torchvision")
NEEDS_GPU = "needs a GPU"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
#: Suites in which a row has rivals.
RATED = ("kernels", "contention", "layers", "steps")
#: Columns that a table shows at once; the others come with a click.
SHOWN = 9


class Machine(NamedTuple):
    """Where figures may be compared: the same processor, threads and PyTorch."""

    name: str
    threads: int | None
    torch: str | None

    @property
    def cpu(self) -> bool:
        return self.name.startswith("CPU")

    @property
    def model(self) -> str:
        """The processor's name as people say it."""
        name = self.name.removeprefix("CPU: ").partition(" @")[0]
        return name.replace("(R)", "").replace("(TM)", "").removesuffix(" Processor")

    def __str__(self) -> str:
        parts = [self.name]
        if self.threads:
            parts.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        if self.torch:
            parts.append(f"torch {self.torch}")
        return ", ".join(parts)


class Cell(NamedTuple):
    """What a table shows, the number it is sorted by, and why there is none."""

    text: str
    value: float | None = None
    why: str = ""


class Column(NamedTuple):
    """Title, key in a row, how a value is written, and why a measured row may have none."""

    title: str
    key: str
    how: str = "text"
    why: str = "not measured"

    @property
    def numeric(self) -> bool:
        return self.how != "text"


class Table(NamedTuple):
    """Rows of cells under columns, of which the first :data:`SHOWN` are shown at once.

    ``facts`` are what all rows have in common, ``notes`` what is missing and why, ``sources`` the records. A table
    that is ``folded`` is behind a click as a whole.
    """

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    sources: Sequence[str] = ()
    notes: Sequence[str] = ()
    facts: str = ""
    folded: bool = False

    def shared(self) -> "Table":
        """The table with what a column of words says in every row said once, above it."""
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


class Section(NamedTuple):
    """A machine's tables on a page."""

    machine: Machine
    tables: list[Table]


class Page(NamedTuple):
    """A file of ``reports/``."""

    file: str
    title: str
    about: str
    sections: list[Section]


NO_RIVAL = "no such rival in the same record"
NO_CEILING = "the machine's ceilings are not in the record"
NONE_HERE = "has no meaning here"
#: Every column there is, the most telling first. `time` is in the table's unit. A table leaves out those of which
#: none of its rows has a value.
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
    Column("launches a step", "launches_per_step", "rate", NONE_HERE),
    Column("time a step", "us_per_step", "time", NONE_HERE),
    Column("% of step", "percent_of_step", "{:,.1f}", NONE_HERE),
    Column("wall clock", "wall_us", "time", NONE_HERE),
    Column("gaps", "gaps_us", "time", NONE_HERE),
    Column("images/s", "images_per_s", "rate", NONE_HERE),
    Column("x aten", "x_aten", "{:,.2f}", NO_RIVAL),
    Column("x compiled", "x_compiled", "{:,.2f}", NO_RIVAL),
    Column("% of limit", "percent_of_limit", "{:,.0f}", NO_CEILING),
    Column("kernels of", "kernels_of", "text", "runs none of the Triton kernels"),
    Column("GFLOP/s", "gflop_per_s", "rate", NONE_HERE),
    Column("GB/s", "gb_per_s", "rate", NONE_HERE),
    Column("KB an image", "kb_per_image", "{:,.1f}", NONE_HERE),
    Column("GB for ImageNet", "imagenet_gb", "{:,.1f}", NONE_HERE),
    Column("gray levels off", "gray_levels", "{:,.2f}", NONE_HERE),
    Column("top-1 %", "top1_accuracy_percent", "{:.2f}", NONE_HERE),
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
    Column("fewest MB", "fewest_mb", "number", NONE_HERE),
    Column("parameters", "parameters", "{:,.0f}", NONE_HERE),
    Column("output MiB", "output_mib", "{:,.1f}", NONE_HERE),
    Column("scratch MiB", "scratch_mib", "{:,.1f}", NONE_HERE),
    Column("saved MiB", "saved_mib", "{:,.1f}"),
    Column("peak MiB", "peak_mib", "{:,.0f}"),
    Column("process peak MiB", "process_peak_mib", "{:,.0f}"),
    Column("first call s", "first_call_s", "{:,.1f}"),
    Column("first call again s", "first_call_warm_s", "{:,.1f}"),
    Column("kernels launched", "kernels_launched", "{:,.0f}"),
    Column("sum of layers", "sum_of_layers_us", "time", NONE_HERE),
    Column("% explained", "percent_explained", "{:.1f}", NONE_HERE),
    Column("commit", "revision"),
)
BY_KEY = {column.key: column for column in COLUMNS}


def machine_of(row: Row) -> Machine:
    return Machine(row["machine"], row.get("threads"), row.get("torch"))


def values(row: Row, keys: Iterable[str]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in keys)


def newest(rows: Iterable[Row], *keys: str) -> list[Row]:
    """Of rows, oldest first, the newest of each thing measured on a machine; ``keys`` tell apart further."""
    return list({(machine_of(row), values(row, (*KEYS, *keys))): row for row in rows}.values())


def ours(row: Row) -> bool:
    """Whether a row is of this project's operators."""
    return str(row.get("implementation")).partition(", ")[0] not in OTHERS


def _rival(row: Row) -> str | None:
    """The ratio's column in which a row is the rival."""
    name, _, how = str(row.get("implementation")).partition(", ")
    if name == "compiled" or (name == "aten" and how not in ("", "eager")):
        return "x_compiled"
    return "x_aten" if name == "aten" else None


def _latest_profiles(rows: Iterable[Row]) -> list[Row]:
    """The rows without profiles that were made anew since: other kernels may run. A profile ends with its sum."""
    profiles: dict[tuple[Any, ...], list[Row]] = {}
    others = []
    for row in rows:
        if row["suite"] != "profile":
            others.append(row)
            continue
        its = profiles.setdefault((machine_of(row), values(row, ("case", "implementation", "shape", "dtype"))), [])
        if its and its[-1].get("kernel") == "sum":
            its.clear()
        its.append(row)
    return others + [row for its in profiles.values() for row in its]


def measured(rows: Sequence[Row]) -> list[Row]:
    """The newest row of each thing, with ratios, revision and its :class:`Machine` as columns.

    ``kernels_of`` names the state of the Triton kernels that a GPU's row was measured with, by the hash or, in the
    first records, by the commit. It says so where the newest record of any machine has other kernels.
    """
    rivals: dict[tuple[Any, ...], float] = {}
    for row in newest(rows, "record"):
        name = _rival(row)
        if name is not None and "median_us" in row and "unverified" not in row:
            key = (name, row["record"], machine_of(row), values(row, TASK))
            rivals[key] = min(row["median_us"], rivals.get(key, math.inf))
    today = next((row["kernels_code"] for row in reversed(rows) if row.get("kernels_code")), None)
    result = []
    for row in newest(_latest_profiles(row for row in rows if row["suite"])):
        row = {**row, "on": machine_of(row)}
        row["revision"] = f"{row.get('commit') or 'unknown'}{' with changes' if row.get('dirty') else ''}"
        if str(row.get("implementation")).partition(", ")[0] in ("triton", "auto") and not row["on"].cpu:
            code = row.get("kernels_code")
            row["kernels_of"] = (code or row.get("commit") or "unknown") + (
                "" if code == today else ", rewritten since"
            )
        if row["suite"] == "gate":
            row["verdict"] = row.pop("status", None)
        if "tflop_per_s" in row:
            row.setdefault("gflop_per_s", row["tflop_per_s"] * 1000)
        if row["suite"] in RATED and "median_us" in row and "unverified" not in row:
            for name in ("x_aten", "x_compiled"):
                time = rivals.get((name, row["record"], row["on"], values(row, TASK)))
                if time is not None:
                    row[name] = time / row["median_us"]
        result.append(row)
    return result


def machines_of(rows: Iterable[Row]) -> list[Machine]:
    """GPUs first; among them, and among CPUs, the one measured last."""
    last = {}
    for row in sorted(rows, key=moment):
        last[row["on"]] = moment(row)
    names = sorted(last, key=str)
    names.sort(key=last.__getitem__, reverse=True)
    return sorted(names, key=lambda machine: machine.cpu)


def rank(order: Sequence[str], value: object) -> tuple[int, str]:
    """What sorts names as in ``order``, and those that are not in it behind them."""
    return (order.index(value) if value in order else len(order), str(value))


def _natural(text: str) -> list[tuple[int, str]]:
    """What sorts names by the numbers in them."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def ordered(rows: Sequence[Row]) -> list[Row]:
    """By case, in the order in which cases are in the records, then by mode, dtype and shape; the fastest first."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    return sorted(
        rows,
        key=lambda row: (
            cases.index(row["case"]),
            rank(MODES, row.get("mode")),
            str(row.get("dtype")),
            _natural(str(row.get("shape"))),
            row.get("busy_processes", 0),
            row.get("median_us", math.inf),
            str(row.get("implementation")),
            str(row.get("memory_format")),
        ),
    )


def sources(rows: Iterable[Row]) -> list[str]:
    """A line for each record, commit and day, with machine and versions."""
    lines = []
    for row in rows:
        parts = [str(machine_of(row))]
        parts += [f"{name} {row[name]}" for name in ("triton", "driver") if row.get(name)]
        lines.append(f"`reports/data/{row['record']}`: {row['date']}, commit {row['revision']}; {', '.join(parts)}")
    return list(dict.fromkeys(lines))


def number(value: float) -> str:
    """Four significant digits, and no more than four behind the point."""
    behind = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(behind, 0), 4)}f}"


def unit_of(rows: Iterable[Row]) -> tuple[str, float]:
    """The unit for times, and its microseconds: that in which the middle one is not below 1."""
    times = [row[key] for row in rows for key in ("median_us", "us_per_step") if key in row]
    return ("ms", 1e3) if times and statistics.median(times) >= 1000 else ("us", 1.0)


def cell(row: Row, column: Column, scale: float = 1.0) -> Cell:
    """A row's value under a column, its times in units of ``scale`` microseconds."""
    value = row.get(column.key)
    if value is None:
        return Cell("-", None, str(row["status"]) if "status" in row and column.numeric else column.why)
    if column.how == "text":
        return Cell(str(value))
    if column.how == "interval":
        return Cell(f"{number(value / scale)} to {number(row['p80_us'] / scale)}", value)
    if column.how in ("time", "number"):
        text = number(value / scale if column.how == "time" else value)
    elif column.how == "rate":
        text = f"{value:,.{0 if value >= 100 else 1}f}"
    else:
        text = column.how.format(value)
    if column.key == "median_us" and "unverified" in row:
        return Cell(f"{text} (unverified)", value, str(row["unverified"]))
    return Cell(text, value)


def possible(rows: Iterable[Row]) -> tuple[list[Row], list[str]]:
    """The rows without those that need another machine, and notes that name what is missing."""
    rows = list(rows)
    kept = [row for row in rows if row.get("status") != NEEDS_GPU]
    absent = sorted({str(row["implementation"]) for row in rows if row.get("status") == NEEDS_GPU})
    notes = [f"Not measured here, for want of a GPU: {', '.join(absent)}."] if absent else []
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
    title: str, rows: Sequence[Row], columns: Sequence[Column] = COLUMNS, *, folded: bool = False
) -> list[Table]:
    """The table of ``rows``; none when there are none. What all rows have in common is said once, above it."""
    rows, notes = possible(rows)
    if not rows:
        return []
    unit, scale = unit_of(rows)
    used = [column for column in columns if any(column.key in row for row in rows)]
    cells = [[cell(row, column, scale) for column in used] for row in rows]
    return [Table(title, in_unit(used, unit), cells, sources(rows), notes, folded=folded).shared()]


def in_unit(columns: Iterable[Column], unit: str) -> list[Column]:
    """The columns, those of times with their unit."""
    return [
        column._replace(title=f"{column.title} {unit}") if column.how in ("time", "interval") else column
        for column in columns
    ]


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row with the shortest time."""
    return min((row for row in rows if "median_us" in row), key=lambda row: row["median_us"], default=None)


def markdown(table: Table) -> str:
    """A Markdown table, what is missing in it, and its records; the columns beyond the first are behind a click."""
    parts = [without_html(table.facts[:1].upper() + table.facts[1:] + "."), ""] if table.facts else []
    parts += [_github(table, range(min(SHOWN, len(table.columns)))), ""]
    if len(table.columns) > SHOWN:
        named = [place for place in range(SHOWN) if not table.columns[place].numeric]
        more = _github(table, [*named, *range(SHOWN, len(table.columns))])
        parts += [f"<details><summary>{more_columns(table)}</summary>", "", more, "", "</details>"]
        parts.append("")
    parts += [note for note in table.notes for note in (escaped(note), "")]
    parts += ["- " + without_html(line).replace("; ", ";\n  ") for line in table.sources]
    text = "\n".join(parts).rstrip() + "\n"
    if table.folded:
        summary = f"{without_html(table.title)}: {len(table.rows)} rows"
        return f"<details><summary>{summary}</summary>\n\n{text}\n</details>\n"
    return text


def more_columns(table: Table) -> str:
    """How many columns are not shown at once, in words."""
    count = len(table.columns) - SHOWN
    return f"{count} more column{'s' if count > 1 else ''}"


def escaped(text: str) -> str:
    """Text that Markdown is to show as it is, on one line: a record may come from anywhere."""
    return without_html(text).replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*")


def without_html(text: str) -> str:
    """Markdown with nothing in it that a browser takes for HTML, on one line."""
    return _CONTROL.sub(" ", text).replace("<", "&lt;")


def _github(table: Table, places: Iterable[int]) -> str:
    places = list(places)
    align = ["right" if table.columns[place].numeric else "left" for place in places]
    titles = [table.columns[place].title for place in places]
    cells = [[escaped(row[place].text) for place in places] for row in table.rows]
    return str(tabulate(cells, titles, "github", disable_numparse=True, colalign=align))
