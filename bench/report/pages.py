"""Which rows of the records are on which page of ``reports/``, and in which tables."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..measure.records import Row, moment
from . import figures
from .rows import (
    IMPLEMENTATIONS,
    PARAMETER_BYTES,
    Machine,
    best,
    fastest,
    layer_memory,
    machines_of,
    ordered,
    rank,
    values,
)
from .tables import (
    BY_KEY,
    Cell,
    Column,
    Figure,
    Page,
    Section,
    Table,
    cell,
    detail,
    in_unit,
    possible,
    sources,
    unit_of,
)


def overview(rows: Sequence[Row]) -> list[Table]:
    """Medians of all implementations side by side, each in the memory format that serves it best."""
    rows, notes = possible(rows)
    if not rows:
        return []
    unit, scale = unit_of(rows)
    names = sorted({str(row.get("implementation")) for row in rows}, key=lambda name: rank(IMPLEMENTATIONS, name))
    tasks: dict[tuple[Any, ...], list[Row]] = {}
    for row in ordered(rows):
        tasks.setdefault(values(row, ("case", "mode", "shape", "dtype")), []).append(row)
    limits = [BY_KEY["limit_us"]] if any("limit_us" in row for row in rows) else []
    cells = []
    for task, group in tasks.items():
        line = [Cell("-" if value is None else str(value)) for value in task]
        for name in names:
            its = [row for row in group if str(row.get("implementation")) == name]
            row = fastest(its) or next((row for row in its if "status" in row), {})
            line.append(cell(row, BY_KEY["median_us"], scale))
        line += [cell(next((row for row in group if "limit_us" in row), {}), column, scale) for column in limits]
        cells.append(line)
    columns = [BY_KEY[key] for key in ("case", "mode", "shape", "dtype")]
    columns += [Column(name, "median_us", "time") for name in names]
    columns = in_unit([*columns, *limits], unit)
    notes += [
        f"Triton kernels of {name}." for name in sorted({row["kernels_of"] for row in rows if "kernels_of" in row})
    ]
    return [Table("Medians side by side", columns, cells, sources(rows), notes).shared()]


def _kernels(rows: Sequence[Row]) -> list[Table]:
    return [*overview(rows), *detail("Every measurement", ordered(rows), folded=True)]


def _in_order(rows: Sequence[Row]) -> list[Table]:
    return detail("", ordered(rows))


def _steps(rows: Sequence[Row]) -> list[Table]:
    parts: dict[str, list[Row]] = {"Training step": [], "Inference": [], "net.train, end to end": [], "Whole runs": []}
    titles = {"train_step": "Training step", "inference": "Inference"}
    for row in ordered(rows):
        end_to_end = "net.train, end to end" if row["suite"] == "train" else "Whole runs"
        parts[titles.get(str(row.get("mode")), end_to_end) if row["suite"] == "steps" else end_to_end].append(row)
    return [table for title, its in parts.items() for table in detail(title, its)]


def _profile(rows: Sequence[Row]) -> list[Table]:
    """A table for each profiled step: its kernels, longest first, and their sum."""
    steps: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        steps.setdefault(values(row, ("case", "implementation", "shape", "dtype")), []).append(row)
    columns = [column for column in BY_KEY.values() if column.key not in ("case", "implementation", "mode")]
    tables = []
    for (case, implementation, *_), its in steps.items():
        its.sort(key=lambda row: (row.get("kernel") == "sum", -row.get("us_per_step", 0.0), str(row.get("kernel"))))
        tables += detail(f"{case}, {implementation}", its, columns)
    return tables


def _launches(rows: Sequence[Row]) -> list[Table]:
    """The fewest launches first."""
    counted = [column for column in BY_KEY.values() if column.key.endswith("_launches")]
    moved = [BY_KEY[f"{kind}_mb"] for kind in ("elementwise", "bias_relu", "stages")]
    copies = [BY_KEY[f"copied_{of}"] for of in ("weights", "activations")]
    forms = [BY_KEY["case"], Column("forms", "implementation")]
    facts = [BY_KEY[key] for key in ("shape", "dtype", "revision")]
    rows = sorted(rows, key=lambda row: (str(row["case"]), row["all_launches"]))
    return detail("", rows, [*forms, *counted, *moved, *facts]) + detail("Copies", rows, [*forms, *copies, *facts])


def _memory(rows: Sequence[Row]) -> list[Table]:
    tables = []
    layers = layer_memory(rows)
    if layers:
        total = {key: sum(row.get(key, 0) for row in layers) for key in ("parameters", "saved_mib")}
        names = [BY_KEY[key] for key in ("case", "implementation", "dtype", "parameters")]
        computed = [Column(f"{name} MiB", name, "{:,.1f}") for name in ("weights", "gradients", "momentum")]
        kept = [BY_KEY[key] for key in ("saved_mib", "output_mib")]
        cells = []
        for row in [
            *layers,
            {**total, "case": "sum", **{key: layers[0].get(key) for key in ("implementation", "dtype")}},
        ]:
            mib = row.get("parameters", 0) * PARAMETER_BYTES / 2**20
            line = [cell(row, column) for column in names] + [Cell(f"{mib:,.1f}", mib)] * 3
            cells.append(line + [cell(row, column) for column in kept])
        title = "Memory of training, by layer; weights, gradients and momentum are computed"
        tables.append(Table(title, [*names, *computed, *kept], cells, sources(layers)).shared())
    shown = ("case", "implementation", "mode", "shape", "dtype", "memory_format", "saved_mib")
    for title, suite, keys in (
        ("Peak of a step", "steps", (*shown[:5], "peak_mib", "process_peak_mib", "memory_format")),
        ("Saved for backward, by kernel", "kernels", shown),
    ):
        kept_rows = [row for row in rows if row["suite"] == suite and any(key in row for key in keys if "mib" in key)]
        tables += detail(title, ordered(kept_rows), [BY_KEY[key] for key in keys], folded=suite == "kernels")
    return tables


class _Kind(NamedTuple):
    """A page of suites: title, line for the list of pages, introduction, suites, and what makes their tables."""

    title: str
    line: str
    about: str
    suites: tuple[str, ...]
    tables: Callable[[Sequence[Row]], list[Table]]
    #: First word of its figures' file names, and what draws a machine's rows.
    figure: str = ""
    drawing: Callable[[list[Row]], figures.Drawing | None] = lambda rows: None


RATIOS = (
    "`x aten` is the speedup over PyTorch's own operators called eagerly, and `x compiled` the speedup over their "
    "fastest form under `torch.compile`. Rivals come from the same record and machine, in their fastest memory format."
)
LIMIT = (
    "The limit is the larger of two lower bounds on the time: the FLOPs at the rate of a large matrix product, and the "
    "minimum memory traffic at the rate of the best large copy. Both rates were measured in the same run."
)
PAGES = {
    "kernels": _Kind(
        "Kernels",
        "the operators at the paper's shapes, compared with their rivals and their limits",
        f"The operators at the paper's shapes. {RATIOS} {LIMIT}",
        ("kernels",),
        _kernels,
        "kernels",
        figures.kernels,
    ),
    "contention": _Kind(
        "Contention",
        "the stages as a user's program runs them, alone and with busy processes running",
        "Stages 1 and 2, forward and backward, alone on the machine and with busy processes running, with PyTorch's "
        "default thread and memory settings. `x aten` compares rows with the same number of busy processes.",
        ("contention",),
        _in_order,
    ),
    "steps": _Kind(
        "Steps",
        "training steps of whole networks, inference, `net.train` end to end, and full training runs",
        f"Training steps (updates) of whole networks, inference, and full training runs. {RATIOS}",
        ("steps", "train"),
        _steps,
        "steps",
        figures.steps,
    ),
    "profile": _Kind(
        "Where a step's time goes",
        "the GPU kernels of a training step, with launches and time",
        "The GPU kernels of a captured training step: launches and time per step, averaged over replays. Gaps are the "
        "wall-clock time minus the kernels' time.",
        ("profile",),
        _profile,
    ),
    "launches": _Kind(
        "Kernel launches of a training step",
        "the kernel launches of a training step on a GPU in each form, estimated without a GPU",
        "The kernel launches and memory traffic of a single process's captured training step on a GPU in each form, "
        "from `python -m bench.launches`. `stages` are this project's kernels after a convolution, with normalization "
        "or pooling; `bias and ReLU` are those without. `elementwise` is everything without a column of its own, "
        "`pointwise` the sum of these two. This is an estimate made on a CPU: it omits "
        "the kernels that cuDNN and cuBLAS launch inside an operator, some 60 on an H100, and their memory traffic.",
        ("launches",),
        _launches,
    ),
    "layers": _Kind(
        "Layers",
        "the paper's network layer by layer",
        f"The paper's network layer by layer. {LIMIT} A copy writes as much as it reads. Code that mostly reads, such "
        "as the optimizer and the dense layers, can exceed the limit, and so can tensors that fit in a cache. "
        "`training` is forward and backward. `sum of layers` adds up the training time of all layers, the loss and the "
        "optimizer; `% explained` is its share of the whole step. The rest is spent between layers: autograd, the "
        "exchange between towers, gradient accumulation, and host time.",
        ("layers",),
        _in_order,
        "roofline",
        figures.roofline,
    ),
    "memory": _Kind(
        "Memory",
        "the memory of training, by layer and by kernel, and the peak of a step",
        "Saved is the memory saved for backward, each tensor counted once. Weights, gradients and momentum each take "
        "four bytes per parameter. Peak is device memory; process peak is the memory of the whole process.",
        ("layers", "steps", "kernels"),
        _memory,
        "memory",
        figures.memory,
    ),
    "input_pipeline": _Kind(
        "Input pipeline",
        "decoding, reading and augmenting images",
        "Decoding, reading from the packed store, and the paper's augmentation.",
        ("input",),
        _in_order,
    ),
    "ceilings": _Kind(
        "Ceilings",
        "copies and matrix products, from which the limits are computed",
        "The machine's fastest copies and matrix products. The limits in other tables are computed from these.",
        ("ceilings",),
        _in_order,
    ),
    "gate": _Kind(
        "Checks before measuring",
        "the checks on the device before its stages were timed",
        "Checks on the device before its stages were timed. If a check failed, stages timed anyway are marked as "
        "unverified.",
        ("gate",),
        _in_order,
    ),
}


def file_of(word: str, machine: Machine) -> str:
    """The file of a machine's figure, below ``reports/``."""
    return f"figures/{word}-{re.sub(r'[^a-z0-9.]+', '-', str(machine).lower()).strip('-')}.png"


def pages(rows: Sequence[Row]) -> list[Page]:
    """The pages that have anything to show; ``rows`` are those of :func:`bench.report.rows.measured`."""
    found = []
    for name, kind in PAGES.items():
        sections = []
        for machine in machines_of(rows):
            its = [row for row in rows if row["on"] == machine]
            tables = kind.tables([row for row in its if row["suite"] in kind.suites])
            drawing = kind.drawing(its)
            drawn = [Figure(file_of(kind.figure, machine), *drawing)] if drawing is not None else []
            if tables:
                sections.append(Section(str(machine), drawn, tables, "CPU" if machine.cpu else "GPU"))
        if sections:
            found.append(Page(name, kind.title, kind.line, kind.about, sections))
    return found


#: README's columns.
HEADLINE = tuple(
    Column(title, key)
    for title, key in (
        ("benchmark", "what"),
        ("machine", "on"),
        ("ours", "ours"),
        ("PyTorch compiled", "theirs"),
        ("speedup", "ratio"),
        ("date", "date"),
    )
)


def headline(rows: Sequence[Row]) -> list[Table]:
    """README's table: the latest training step on a GPU, the latest stage on a CPU, and full training runs.

    A row that no gate has verified is marked and gets no ratio.
    """
    chosen: list[tuple[str, Row, Row | None]] = []
    for cpu in (False, True):
        for machine in machines_of(rows):
            its = [row for row in rows if row["on"] == machine]
            if machine.cpu == cpu and (timed := _timed(its, cpu)) is not None:
                chosen.append(timed)
                break
    trainings = {row["case"]: row for row in sorted(rows, key=moment) if str(row["case"]).endswith(", a whole run")}
    for case, row in trainings.items():
        what = f"{case.removesuffix(', a whole run')}, full training run, top-1 on"
        chosen.append((f"{what} {row.get('judged_on', 'validation images')}", row, None))
    cells = []
    for what, ours, theirs in chosen:
        result = _spent(ours)
        if "top1_accuracy_percent" in ours:
            result = f"{ours['top1_accuracy_percent']:.1f} % in {result}"
        if "unverified" in ours:
            result += " (unverified)"
        verified = theirs is not None and "unverified" not in ours
        ratio = f"{theirs['median_us'] / ours['median_us']:.1f}" if theirs is not None and verified else "-"
        on = str(ours["machine"]).removeprefix("CPU: ")
        if ours["on"].cpu and "cores" in ours:
            on += f", {ours['cores']} cores"
        texts = (what, on, result, "-" if theirs is None else _spent(theirs), ratio, str(ours["date"]))
        cells.append([Cell(text) for text in texts])
    if not cells:
        return []
    used = [row for _, ours, theirs in chosen for row in (ours, theirs) if row is not None]
    return [Table("", list(HEADLINE), cells, sources(used))]


def _timed(rows: Sequence[Row], cpu: bool) -> tuple[str, Row, Row | None] | None:
    """A machine's timing: its description, our row, and compiled PyTorch's row in the same shape; None if missing."""
    if cpu:
        ours, theirs, _ = best([row for row in rows if row["suite"] == "kernels"], "stage1", "forward_backward")
        how = "compiled, " if ours is not None and ours["implementation"] == "inductor" else ""
        what = f"ReLU, LRN and pooling after conv1, {how}forward and backward"
    else:
        ours, theirs, _ = best(rows, "update of paper")
        if ours is None:
            ours, theirs, _ = best(rows, "update of paper", unverified=True)
        what = "training step of the paper's network"
    if ours is None:
        return None
    images = str(ours["shape"]).partition("x")[0]
    return f"{what}, {images} images, {ours['dtype']}", ours, theirs


def _spent(row: Row) -> str:
    """The time of a row; CPU time for training runs that shared the machine with other programs."""
    if "cpu_s" in row:
        return f"{row['cpu_s'] / 60:,.0f} min of CPU time"
    seconds = row["median_us"] / 1e6
    if seconds < 10:
        return f"{1e3 * seconds:,.3g} ms"
    return f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"
