"""Tables from records: the newest row of each thing measured, a section for each machine, GPUs first.

A ratio says how many times faster a row is than a rival of the same record, machine, case, mode, shape and dtype, in
the memory format that serves the rival best. ``x aten`` is against PyTorch's own operators called eagerly,
``x compiled`` against the fastest way that ``torch.compile`` makes of them. A rival in another record gives no ratio.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from .records import Row, moment

NOT_MEASURED = "not measured"
#: What a row measures, but for the machine.
KEYS = ("suite", "case", "implementation", "mode", "shape", "dtype", "memory_format")
#: What a rival has in common with a row; its implementation and memory format are its own.
TASK = ("suite", "case", "mode", "shape", "dtype")
MODES = ("inference", "forward", "backward", "forward_backward", "training", "train_step")
IMPLEMENTATIONS = ("aten", "compiled", "cudnn", "reference", "compiled reference", "inductor", "traced", "triton")
#: Rows of the suite ``layers`` that are not layers.
NOT_LAYERS = ("input preparation", "optimizer", "sum of layers", "whole step")
MODELLED = "modelled: "
#: The implementation's name where only an earlier state of the kernel was measured.
CHANGED = "triton, changed since"


class Machine(NamedTuple):
    """Where figures may be compared: the same processor, threads and PyTorch."""

    name: str
    threads: int | None
    torch: str | None

    def __str__(self) -> str:
        parts = [self.name]
        if self.threads:
            parts.append(f"{self.threads} threads")
        if self.torch:
            parts.append(f"torch {self.torch}")
        return ", ".join(parts)


class Cell(NamedTuple):
    """What a table shows, and the number it is sorted by."""

    text: str
    value: float | None = None


class Column(NamedTuple):
    """Title, key in a row, how a value is written, and what is shown where a measured row has none."""

    title: str
    key: str
    how: str = "text"
    missing: str = "-"


class Table(NamedTuple):
    """A title, (column, whether it holds numbers), rows of cells, and the records the figures come from."""

    title: str
    columns: list[tuple[str, bool]]
    rows: list[list[Cell]]
    sources: list[str]


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


#: ``time`` is in the table's unit. A table leaves out the columns of which none of its rows has a value.
COLUMNS = (
    Column("case", "case"),
    Column("implementation", "implementation"),
    Column("mode", "mode"),
    Column("shape", "shape"),
    Column("dtype", "dtype"),
    Column("memory format", "memory_format"),
    Column("median", "median_us", "time", NOT_MEASURED),
    Column("p20 to p80", "p20_us", "interval", "timed once"),
    Column("images/s", "images_per_s", "{:,.0f}", NOT_MEASURED),
    Column("x aten", "x_aten", "{:,.2f}"),
    Column("x compiled", "x_compiled", "{:,.2f}"),
    Column("limit", "limit_us", "time"),
    Column("% of limit", "percent_of_limit", "{:,.0f}"),
    Column("modelled", "modelled_us", "time"),
    Column("model's error %", "model_error_percent", "{:+,.0f}"),
    Column("% of a copy", "percent_of_copy_bandwidth", "{:,.0f}"),
    Column("GFLOP", "gflop", "number"),
    Column("fewest MB", "fewest_mb", "number"),
    Column("GFLOP/s", "gflop_per_s", "{:,.0f}"),
    Column("GB/s", "gb_per_s", "{:,.0f}"),
    Column("parameters", "parameters", "{:,.0f}"),
    Column("output MiB", "output_mib", "{:,.1f}"),
    Column("saved MiB", "saved_mib", "{:,.1f}", NOT_MEASURED),
    Column("peak MiB", "peak_mib", "{:,.0f}", NOT_MEASURED),
    Column("process peak MiB", "process_peak_mib", "{:,.0f}", NOT_MEASURED),
    Column("first call s", "first_call_s", "{:,.1f}", NOT_MEASURED),
    Column("first call again s", "first_call_warm_s", "{:,.1f}", NOT_MEASURED),
    Column("kernels launched", "kernels_launched", "{:,.0f}", NOT_MEASURED),
    Column("sum of layers", "sum_of_layers_us", "time"),
    Column("% explained", "percent_explained", "{:.1f}"),
    Column("updates", "updates", "{:,.0f}"),
    Column("top-1 %", "top1_accuracy_percent", "{:.2f}", NOT_MEASURED),
)
BY_KEY = {column.key: column for column in COLUMNS}
RATIOS = (
    "`x aten`: how many times faster than PyTorch's own operators called eagerly; `x compiled`: than the fastest way "
    "`torch.compile` makes of them. Rivals are of the same record and machine, in the memory format that serves them "
    "best."
)


def machine_of(row: Row) -> Machine:
    return Machine(row["machine"], row.get("threads"), row.get("torch"))


def values(row: Row, keys: Iterable[str]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in keys)


def newest(rows: Iterable[Row], *keys: str) -> list[Row]:
    """Of rows, oldest first, the newest of each thing measured on a machine; ``keys`` tell apart further."""
    return list({(machine_of(row), values(row, (*KEYS, *keys))): row for row in rows}.values())


def _rival(row: Row) -> str | None:
    """The ratio's column in which a row is the rival."""
    name, _, how = str(row.get("implementation")).partition(", ")
    if name == "compiled" or (name == "aten" and how not in ("", "eager")):
        return "x_compiled"
    return "x_aten" if name == "aten" else None


def measured(rows: Sequence[Row]) -> list[Row]:
    """The newest row of each thing, with ratios and modelled figures as columns, and its :class:`Machine`.

    A model's figure stands beside what was measured of the same kernels. What is modelled and not measured gets a row
    of its own among those of the GPU it was modelled for; so does a kernel that has changed since it was measured.
    """
    rivals: dict[tuple[Any, ...], float] = {}
    for row in newest(rows, "record"):
        name = _rival(row)
        if name is not None and "median_us" in row:
            key = (name, row["record"], machine_of(row), values(row, TASK))
            rivals[key] = min(row["median_us"], rivals.get(key, math.inf))
    models = [row for row in rows if "modelled_us" in row]
    latest = {(values(row, KEYS), row["machine"]): row for row in models}
    shown = [row for row in rows if row["suite"] and row["suite"] != "model"]
    machines = {row["machine"]: machine_of(row) for row in shown}
    result = []
    for row in newest(shown):
        row = {**row, "on": machine_of(row)}
        if "tflop_per_s" in row:
            row.setdefault("gflop_per_s", row["tflop_per_s"] * 1000)
        if row["suite"] in ("kernels", "layers", "steps") and "median_us" in row:
            for name in ("x_aten", "x_compiled"):
                time = rivals.get((name, row["record"], row["on"], values(row, TASK)))
                if time is not None:
                    row[name] = time / row["median_us"]
        result.append(row)
    for model in models:
        gpu = model["machine"].removeprefix(MODELLED)
        pairs = [row for row in result if row["machine"] == gpu and _models(model, row)]
        same = [row for row in pairs if row.get("kernels_code") == model.get("kernels_code")]
        for row in same:
            row.update(modelled_us=model["modelled_us"], model=model)
            if "median_us" in row:
                row["model_error_percent"] = 100 * (model["modelled_us"] / row["median_us"] - 1)
        if not same and model is latest[values(model, KEYS), model["machine"]]:
            on = machines.get(gpu, Machine(model["machine"], None, None))
            name = CHANGED if pairs else model.get("implementation", "triton")
            result.append({**model, "suite": "kernels", "implementation": name, "on": on})
    return result


def _models(model: Row, row: Row) -> bool:
    """Whether ``row`` measured what ``model`` is a prediction of."""
    wanted = {"suite": "kernels", "implementation": "triton"}
    wanted.update({key: model[key] for key in KEYS[1:] if key in model})
    return all(row.get(key) == value for key, value in wanted.items())


def machines_of(rows: Iterable[Row]) -> list[Machine]:
    """GPUs first, among them the one measured last first; what was modelled alone comes last."""
    last = {}
    for row in sorted(rows, key=moment):
        last[row["on"]] = moment(row)
    names = sorted(last, key=str)
    names.sort(key=last.__getitem__, reverse=True)
    return sorted(names, key=lambda machine: (machine.name.startswith(MODELLED), machine.name.startswith("CPU")))


def rank(order: Sequence[str], value: object) -> tuple[int, str]:
    """What sorts names as in ``order``, and those that are not in it behind them."""
    return (order.index(value) if value in order else len(order), str(value))


def ordered(rows: Sequence[Row]) -> list[Row]:
    """By case, in the order in which cases are in the records, then by mode, dtype and shape; the fastest first."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    return sorted(
        rows,
        key=lambda row: (
            cases.index(row["case"]),
            rank(MODES, row.get("mode")),
            str(row.get("dtype")),
            str(row.get("shape")),
            row.get("median_us", math.inf),
            str(row.get("implementation")),
            str(row.get("memory_format")),
        ),
    )


def sources(rows: Iterable[Row]) -> list[str]:
    """A line for each record, commit and day, with machine and versions."""
    lines = []
    for row in rows:
        for source in (row, row.get("model")):
            if source is None:
                continue
            parts = [str(machine_of(source))]
            parts += [f"{name} {source[name]}" for name in ("triton", "driver") if source.get(name)]
            changes = " with changes" if source.get("dirty") else ""
            commit = f"commit {source.get('commit', 'unknown')}{changes}"
            lines.append(f"`reports/data/{source['record']}`: {source['date']}, {commit}; {', '.join(parts)}")
    return list(dict.fromkeys(lines))


def number(value: float) -> str:
    """Four significant digits, and no more than four behind the point."""
    behind = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(behind, 0), 4)}f}"


def unit_of(rows: Iterable[Row]) -> tuple[str, float]:
    """The unit for times, and its microseconds: that in which the middle one is not below 1."""
    times = [row[key] for row in rows for key in ("median_us", "modelled_us") if key in row]
    return ("ms", 1e3) if times and statistics.median(times) >= 1000 else ("us", 1.0)


def _cell(row: Row, column: Column, scale: float) -> Cell:
    value = row.get(column.key)
    if value is None:
        if "status" in row and column.how != "text":
            return Cell(row["status"] if column.key == "median_us" else "")
        return Cell("-" if column.how == "interval" and "median_us" not in row else column.missing)
    if column.how == "text":
        return Cell(str(value))
    if column.how == "interval":
        return Cell(f"{number(value / scale)} to {number(row['p80_us'] / scale)}", value)
    if column.how == "time":
        return Cell(number(value / scale), value)
    return Cell(number(value) if column.how == "number" else column.how.format(value), value)


def detail(title: str, rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> list[Table]:
    """The table of ``rows``; none when there are none."""
    if not rows:
        return []
    unit, scale = unit_of(rows)
    # Without any time there still is a status to show.
    used = [column for column in columns if column.key == "median_us" or any(column.key in row for row in rows)]
    titles = [
        (f"{column.title} {unit}" if column.how in ("time", "interval") else column.title, column.how != "text")
        for column in used
    ]
    cells = [[_cell(row, column, scale) for column in used] for row in rows]
    return [Table(title, titles, cells, sources(rows))]


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row with the shortest time."""
    return min((row for row in rows if "median_us" in row), key=lambda row: row["median_us"], default=None)


def overview(rows: Sequence[Row]) -> list[Table]:
    """Medians of all implementations side by side, each in the memory format that serves it best."""
    if not rows:
        return []
    unit, scale = unit_of(rows)
    names = sorted({str(row.get("implementation")) for row in rows}, key=lambda name: rank(IMPLEMENTATIONS, name))
    tasks: dict[tuple[Any, ...], list[Row]] = {}
    for row in ordered(rows):
        tasks.setdefault(values(row, ("case", "mode", "shape", "dtype")), []).append(row)
    extra = [BY_KEY[key] for key in ("limit_us", "modelled_us") if any(key in row for row in rows)]
    cells = []
    for task, group in tasks.items():
        line = [Cell("-" if value is None else str(value)) for value in task]
        for name in names:
            its = [row for row in group if str(row.get("implementation")) == name]
            row = fastest(its) or next((row for row in its if "status" in row), {})
            line.append(_cell(row, BY_KEY["median_us"], scale))
        for column in extra:
            # Of a kernel that has changed the row comes last.
            line.append(_cell(([{}] + [row for row in group if column.key in row])[-1], column, scale))
        cells.append(line)
    titles = [(name, False) for name in ("case", "mode", "shape", "dtype")]
    titles += [(f"{name} {unit}", True) for name in (*names, *(column.title for column in extra))]
    return [Table("Medians side by side", titles, cells, sources(rows))]


def kernels(rows: Sequence[Row]) -> list[Table]:
    return [*overview(rows), *detail("Everything measured", ordered(rows))]


def in_order(rows: Sequence[Row]) -> list[Table]:
    return detail("", ordered(rows))


def steps(rows: Sequence[Row]) -> list[Table]:
    parts = {"train_step": "Training step", "inference": "Inference", "other": "Whole runs"}
    return [
        table
        for mode, title in parts.items()
        for table in detail(
            title, ordered([row for row in rows if (row.get("mode") if row.get("mode") in parts else "other") == mode])
        )
    ]


def most(rows: Sequence[Row], kind: Callable[[Row], object]) -> list[Row]:
    """The rows of the kind that most of them are of."""
    kinds = [kind(row) for row in rows]
    chosen = max(sorted(set(kinds), key=str), key=kinds.count, default=None)
    return [row for row, its in zip(rows, kinds, strict=True) if its == chosen]


def layers_of(rows: Iterable[Row]) -> list[Row]:
    """The layers, in the dtype and batch of which the most was measured: the fastest row of each layer and mode."""
    rows = [row for row in rows if row["suite"] == "layers" and row["case"] not in NOT_LAYERS and "median_us" in row]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in most(rows, lambda row: (row.get("dtype"), str(row.get("shape")).partition("x")[0])):
        groups.setdefault((row["case"], row.get("mode")), []).append(row)
    return [row for row in map(fastest, groups.values()) if row is not None]


def layer_memory(rows: Iterable[Row]) -> list[Row]:
    """What training keeps of each layer: ``parameters``, ``saved_mib`` and ``output_mib`` where they are recorded."""
    found: dict[str, Row] = {}
    for row in layers_of(rows):
        columns: Row = {key: row[key] for key in ("parameters", "saved_mib", "output_mib") if key in row}
        if "parameters" in columns or "saved_mib" in columns:
            found[row["case"]] = {**row, **found.get(row["case"], {}), **columns}
    return list(found.values())


#: Bytes of a parameter: weights, gradients and momentum are float32.
PARAMETER_BYTES = 4


def memory(rows: Sequence[Row]) -> list[Table]:
    tables = []
    layers = layer_memory(rows)
    if layers:
        cells = []
        total = dict.fromkeys(("parameters", "saved_mib"), 0.0)
        for row in layers:
            for key in total:
                total[key] += row.get(key, 0)
        for row in [*layers, {**total, "case": "sum"}]:
            mib = row.get("parameters", 0) * PARAMETER_BYTES / 2**20
            line = [_cell(row, BY_KEY[key], 1.0) for key in ("case", "implementation", "dtype", "parameters")]
            line += [Cell(f"{mib:,.1f}", mib)] * 3
            line += [_cell(row, BY_KEY[key], 1.0) for key in ("saved_mib", "output_mib")]
            cells.append(line)
        texts = [(name, False) for name in ("layer", "implementation", "dtype")]
        computed = ("parameters MiB (computed)", "gradients MiB (computed)", "momentum MiB (computed)")
        titles = [*texts, *((name, True) for name in ("parameters", *computed, "saved MiB", "output MiB"))]
        tables.append(Table("What training keeps, by layer", titles, cells, sources(layers)))
    shown = ("case", "implementation", "mode", "shape", "dtype", "memory_format", "saved_mib")
    for title, suite, keys in (
        ("Peak of a step", "steps", (*shown[:6], "peak_mib", "process_peak_mib")),
        ("Kept for backward, by kernel", "kernels", shown),
    ):
        chosen = [row for row in rows if row["suite"] == suite and any(key in row for key in keys[6:])]
        tables += detail(title, ordered(chosen), [BY_KEY[key] for key in keys])
    return tables


class _Kind(NamedTuple):
    title: str
    about: str
    suites: tuple[str, ...]
    tables: Callable[[Sequence[Row]], list[Table]]


LAYERS = (
    "The paper's network layer by layer, called eagerly; `training` is forward and backward. The limit is the "
    "longer of computing the layer's FLOPs at the rate of a large matrix product and moving its fewest bytes at the "
    "rate of the best large copy, both measured in the same run. A copy writes as much as it reads, so what mostly "
    "reads, the optimizer and the dense layers, can be faster than such a limit, and so can what finds its tensors "
    "in a cache. `sum of layers` adds the medians of the layers' training, the loss and the optimizer; `% "
    "explained` is its share of the whole step measured beside it. The rest is what lies between layers: autograd, "
    "the exchange between towers, gradients added up, and, where a GPU's layers are replayed from graphs and the "
    "whole step is called eagerly, the host's time."
)
PAGES = {
    "kernels.md": _Kind(
        "Kernels",
        f"The operators at the paper's shapes. {RATIOS} `{CHANGED}`: the kernels of today, where only an earlier state "
        "of them was measured.",
        ("kernels",),
        kernels,
    ),
    "layers.md": _Kind("Layers", LAYERS, ("layers",), in_order),
    "steps.md": _Kind("Steps", f"Updates of whole networks, inference, and whole runs. {RATIOS}", ("steps",), steps),
    "memory.md": _Kind(
        "Memory",
        "Saved is what is kept for backward, each tensor once. Parameters, gradients and momentum are computed: four "
        "bytes for each parameter. Peak is the device's, process peak all that the process holds.",
        ("layers", "steps", "kernels"),
        memory,
    ),
    "input_pipeline.md": _Kind(
        "Input pipeline", "Decoding, reading from the packed store, and the paper's variations.", ("input",), in_order
    ),
    "ceilings.md": _Kind(
        "Ceilings",
        "What the machine does at best: the limits in the other tables are made of these.",
        ("ceilings",),
        in_order,
    ),
}


def pages(rows: Sequence[Row]) -> list[Page]:
    """Every page; ``rows`` are those of :func:`measured`."""
    found = []
    for file, kind in PAGES.items():
        sections = []
        for machine in machines_of(rows):
            its = [row for row in rows if row["on"] == machine and row["suite"] in kind.suites]
            sections.append(Section(machine, kind.tables(its)))
        found.append(Page(file, kind.title, kind.about, sections))
    return found


def _headline_rows(rows: Sequence[Row], cpu: bool) -> list[Row]:
    """Of a machine's rows those on README's first screen: of a case the fastest of ours and of PyTorch's own."""

    def best(case: str, mode: str | None = None) -> list[Row]:
        its = [row for row in rows if row["case"] == case and mode in (None, row.get("mode")) and "median_us" in row]
        its = most(its, lambda row: values(row, ("dtype", "shape")))
        ours, theirs = (fastest(row for row in its if (_rival(row) is None) == own) for own in (True, False))
        # Called eagerly PyTorch's own are what a GPU's users have without doing anything.
        eager = None if cpu else fastest(row for row in its if row.get("implementation") == "aten, eager")
        return [row for row in (ours, theirs, eager) if row is not None]

    if not cpu:
        weird = fastest(best("update of one_weird_trick"))
        chosen = [*best("update of paper"), *([weird] if weird else []), *best("inference of paper")[:2]]
    else:
        stages = best("stage1", "forward_backward") + best("stage2", "forward_backward")
        chosen = best("update of paper") + stages
        for case in ("loader, 2 reading", "prepare, one process", "digits, a whole run"):
            chosen += best(case)
    return list({id(row): row for row in chosen}.values())


HEADLINE = (
    *("case", "implementation", "shape", "dtype", "median_us", "images_per_s", "x_aten", "x_compiled"),
    *("peak_mib", "updates", "top1_accuracy_percent"),
)


def headline(rows: Sequence[Row]) -> list[Section]:
    """README's tables: of a GPU, then of a CPU; each of the machine with the most to show."""
    found: dict[bool, Section] = {}
    for machine in machines_of(rows):
        cpu = machine.name.startswith("CPU")
        its = _headline_rows([row for row in rows if row["on"] == machine], cpu)
        # The rows are of many kinds: what one of them lacks has mostly no meaning for it.
        tables = detail("", its, [BY_KEY[key]._replace(missing="-") for key in HEADLINE])
        if tables and (cpu not in found or len(tables[0].rows) > len(found[cpu].tables[0].rows)):
            found[cpu] = Section(machine, tables)
    return [found[cpu] for cpu in sorted(found)]


def markdown(table: Table) -> str:
    """A Markdown table and its records."""
    align = ["right" if numeric else "left" for _, numeric in table.columns]
    titles = [title for title, _ in table.columns]
    cells = [[cell.text.replace("|", "\\|") for cell in row] for row in table.rows]
    body = tabulate(cells, titles, "github", disable_numparse=True, colalign=align)
    lines = ["- " + line.replace("; ", ";\n  ") for line in table.sources]
    return "\n".join([body, "", *lines]) + "\n"
