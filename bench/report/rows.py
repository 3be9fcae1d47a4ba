"""The rows that the report shows: the newest of each thing measured on a machine, with ratios against rivals.

A ratio is a row's speedup over a rival of the same record, machine, case, mode, shape and dtype, in the rival's fastest
memory format. ``x_aten`` compares with PyTorch's own operators called eagerly, ``x_compiled`` with their fastest form
under ``torch.compile``. Rivals in other records give no ratio, and ``unverified`` rows, whose results no check has
confirmed, get none, and neither do steps with all of cuDNN's algorithms, which the rivals' steps do not use.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from ..measure.implementations import NONDETERMINISTIC, name_of, ours
from ..measure.kernels_code import SAME_KERNELS
from ..measure.records import Row, moment

#: What a row measures, except the machine.
KEYS = (
    *("suite", "case", "implementation", "mode", "shape", "dtype", "memory_format"),
    *("busy_processes", "kernel", "layer"),
)
#: What a rival has in common with a row; implementation and memory format differ.
TASK = ("suite", "case", "mode", "shape", "dtype", "busy_processes")
RATIOS = ("x_aten", "x_compiled")
#: A profile is one unit: one row per kernel, and a last row for the kernel ``sum``.
PROFILE = ("on", "case", "implementation", "shape", "dtype")
MODES = (
    *("inference", "forward", "backward", "input_gradient", "weight_gradient", "forward_backward"),
    *("training", "train_step"),
)
IMPLEMENTATIONS = (
    *("aten", "compiled", "xla", "reference", "inductor", "triton", "cudnn", "compiled reference", "traced"),
    *("onnxruntime", "openvino"),
)
#: Suites in which a row has rivals.
RATED = ("kernels", "contention", "layers", "steps")
#: Rows of the suite ``layers`` that are not layers.
NOT_LAYERS = ("input preparation", "optimizer", "sum of layers", "whole step")
#: Bytes of a parameter: weights, gradients and momentum are float32.
PARAMETER_BYTES = 4


class Machine(NamedTuple):
    """The unit of comparison: the same processor, threads and PyTorch."""

    name: str
    threads: int | None
    torch: str | None

    @property
    def cpu(self) -> bool:
        return self.name.startswith("CPU")

    @property
    def model(self) -> str:
        """The processor's short name."""
        name = self.name.removeprefix("CPU: ").partition(" @")[0]
        return name.replace("(R)", "").replace("(TM)", "").removesuffix(" Processor")

    def __str__(self) -> str:
        parts = [self.name]
        if self.threads:
            parts.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        if self.torch:
            parts.append(f"torch {self.torch}")
        return ", ".join(parts)


def machine_of(row: Row) -> Machine:
    return Machine(row["machine"], row.get("threads"), row.get("torch"))


def values(row: Row, keys: Iterable[str]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in keys)


def _newest(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """The last row for each value of ``keys``, in the order in which the values first occur."""
    number = frame.groupby(list(keys), dropna=False, sort=False).ngroup()
    return frame.assign(number=number).drop_duplicates("number", keep="last").sort_values("number")


def _frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows, oldest first, each with its :class:`Machine` as ``on`` and its place among them as ``place``."""
    columns = {"record", "median_us", "unverified", *KEYS}.union(*rows)
    frame = pd.DataFrame([{**dict.fromkeys(columns), **row} for row in rows], columns=sorted(columns))
    return frame.assign(on=[machine_of(row) for row in rows], place=range(len(rows)))


def newest(rows: Sequence[Row]) -> list[Row]:
    """Of rows, oldest first, the newest of each thing measured on a machine."""
    return [rows[place] for place in _newest(_frame(rows), ("on", *KEYS))["place"]] if rows else []


def measured(rows: Sequence[Row]) -> list[Row]:
    """The newest row of each thing, with ratios, revision and its :class:`Machine` (``on``) as columns.

    A new profile replaces the whole earlier one. ``kernels_of`` names the version of the Triton kernels that a GPU row
    was measured with, and marks it if the newest record of any machine has other kernels.

    Args:
        rows: as :func:`bench.measure.records.read` returns them, oldest first.
    """
    if not rows:
        return []
    frame = _frame(rows)
    timed = _newest(frame, ("on", *KEYS, "record"))
    timed = timed[timed["median_us"].notna() & timed["unverified"].isna() & timed["suite"].isin(RATED)]
    rival, times = timed["implementation"].map(_rival), timed["median_us"].astype(float)
    task = [timed[key] for key in ("on", "record", *TASK)]
    for name in RATIOS:
        ratio = times.where(rival == name).groupby(task, dropna=False).transform("min") / times
        frame[name] = ratio.where(~timed["implementation"].astype(str).str.contains(NONDETERMINISTIC))
    profiles = frame[frame["suite"] == "profile"]
    ends = profiles["kernel"] == "sum"
    same = [profiles[key] for key in PROFILE]
    # The number of profiles of the same step that ended before this row.
    before = ends.groupby(same, dropna=False).cumsum() - ends
    frame = frame.drop(profiles.index[before < before.groupby(same, dropna=False).transform("max")])
    today = next((row["kernels_code"] for row in reversed(rows) if row.get("kernels_code")), None)
    shown = _newest(frame, ("on", *KEYS))
    ratios = shown[list(RATIOS)].to_dict("records")
    return [_shown(rows[place], today, its) for place, its in zip(shown["place"], ratios, strict=True)]


def _shown(row: Row, today: str | None, ratios: dict[str, float]) -> Row:
    row = {**row, "on": machine_of(row)}
    row["revision"] = f"{row.get('commit') or 'unknown'}{' with changes' if row.get('dirty') else ''}"
    if name_of(row) in ("triton", "auto") and not row["on"].cpu:
        code = row.get("kernels_code")
        same = code is not None and SAME_KERNELS.get(code, code) == SAME_KERNELS.get(str(today), today)
        row["kernels_of"] = (code or row.get("commit") or "unknown") + ("" if same else ", rewritten since")
    if row["suite"] == "gate":
        row["verdict"] = row.pop("status", None)
    return row | {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio)}


def _rival(implementation: object) -> str | None:
    """The ratio for which a row of this implementation is the rival."""
    name, _, how = str(implementation).partition(", ")
    if name == "compiled" or (name == "aten" and how not in ("", "eager")):
        return "x_compiled"
    return "x_aten" if name == "aten" else None


def machines_of(rows: Iterable[Row]) -> list[Machine]:
    """GPUs first; among them, and among CPUs, the one measured last."""
    last = {}
    for row in sorted(rows, key=moment):
        last[row["on"]] = moment(row)
    names = sorted(last, key=str)
    names.sort(key=last.__getitem__, reverse=True)
    return sorted(names, key=lambda machine: machine.cpu)


def rank(order: Sequence[str], value: object) -> tuple[int, str]:
    """Sorts names as in ``order``, and those that are not in it after them."""
    return (order.index(value) if value in order else len(order), str(value))


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts names by the numbers in them."""
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


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row with the shortest time."""
    return min((row for row in rows if "median_us" in row), key=lambda row: row["median_us"], default=None)


def most(rows: Sequence[Row], kind: Callable[[Row], object]) -> list[Row]:
    """The rows of the most frequent kind."""
    kinds = [kind(row) for row in rows]
    chosen = max(sorted(set(kinds), key=str), key=kinds.count, default=None)
    return [row for row, its in zip(rows, kinds, strict=True) if its == chosen]


def best(
    rows: Iterable[Row], case: str, mode: str | None = None, *, unverified: bool = False
) -> tuple[Row | None, Row | None, Row | None]:
    """The fastest rows of a case: ours, compiled PyTorch and eager PyTorch, in the shape and dtype with the most
    measurements. Unverified rows count only if requested.
    """
    its = [
        row
        for row in rows
        if row["case"] == case
        and mode in (None, row.get("mode"))
        and "median_us" in row
        and NONDETERMINISTIC not in str(row.get("implementation"))
        and (unverified or "unverified" not in row)
    ]
    its = most(its, lambda row: values(row, ("dtype", "shape")))
    names = {id(row): str(row.get("implementation")) for row in its}
    compiled = [row for row in its if names[id(row)] == "compiled" or names[id(row)].startswith("aten, ")]
    return (
        fastest(row for row in its if ours(row)),
        fastest(row for row in compiled if names[id(row)] != "aten, eager"),
        fastest(row for row in its if names[id(row)] in ("aten", "aten, eager")),
    )


def layers_of(rows: Iterable[Row]) -> list[Row]:
    """The fastest row of each layer and mode, in the dtype and batch with the most measurements."""
    rows = [row for row in rows if row["suite"] == "layers" and row["case"] not in NOT_LAYERS and "median_us" in row]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in most(rows, lambda row: (row.get("dtype"), str(row.get("shape")).partition("x")[0])):
        groups.setdefault((row["case"], row.get("mode")), []).append(row)
    return [row for row in map(fastest, groups.values()) if row is not None]


def layer_memory(rows: Iterable[Row]) -> list[Row]:
    """The training memory of each layer: ``parameters``, ``saved_mib`` and ``output_mib``, if recorded."""
    found: dict[str, Row] = {}
    for row in layers_of(rows):
        columns: Row = {key: row[key] for key in ("parameters", "saved_mib", "output_mib") if key in row}
        if "parameters" in columns or "saved_mib" in columns:
            found[row["case"]] = {**row, **found.get(row["case"], {}), **columns}
    return list(found.values())
