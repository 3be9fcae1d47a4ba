"""Every operator at the paper's shapes, its implementations sampled in turns."""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..cells import Operator, operators
from ..measure.records import time_columns
from ..subjects.cases import (
    BY_NAME,
    DTYPES,
    IMPLEMENTATIONS,
    Case,
    Prepared,
    check,
    describe,
    failure,
    formats,
    kept,
    prepare,
    sampled,
)
from .run import Job, Rows, Run


def tasks(run: Run) -> Iterator[tuple[str, Case, list[Operator]]]:
    """Dtype, case and its cells, in order of value."""
    for (dtype, name), cells in itertools.groupby(operators(run.scale), lambda cell: (cell.dtype, cell.case)):
        yield dtype, BY_NAME[name], list(cells)


def _names(cells: Sequence[Operator]) -> list[str]:
    return list(dict.fromkeys(cell.implementation for cell in cells))


def ahead(run: Run) -> Iterator[Job]:
    for dtype, case, cells in tasks(run):
        for name in _names(cells):
            # Only these leave compiled code on disk.
            if name == "triton" or IMPLEMENTATIONS[name][1]:
                yield f"{case.name}, {name}, {dtype}", partial(_check, case, name, run, dtype)


def _check(case: Case, name: str, run: Run, dtype: str) -> Prepared:
    prepared = prepare(case, name)
    check(prepared, run.scale.images, DTYPES[dtype], run.device)
    return prepared


def rows(run: Run) -> Rows:
    """A row for each mode of an implementation that passes its check, and one with the reason if it does not."""
    for dtype, case, cells in tasks(run):
        torch._dynamo.reset()
        checked: dict[str, Prepared] = {}
        for name in _names(cells):
            run.say(f"checking {name} of {case.name}, {dtype}")
            try:
                checked[name] = _check(case, name, run, dtype)
            except Exception as error:  # Any error becomes the row's status, and the others continue.
                yield {**_described(run, case, name, "forward", dtype), "status": failure(error)}
        for mode, its in itertools.groupby(cells, lambda cell: cell.mode):
            rivals = [checked[cell.implementation] for cell in its if cell.implementation in checked]
            if rivals:
                yield from _rivals(run, rivals, mode, dtype)


def _rivals(run: Run, rivals: list[Prepared], mode: str, dtype: str) -> Rows:
    work = rivals[0].case.work(run.scale.images, DTYPES[dtype])[mode]
    times = sampled(rivals, mode, run.scale.images, DTYPES[dtype], run.device, run.samples)
    for rival, found in zip(rivals, times, strict=True):
        described = _described(run, rival.case, rival.implementation, mode, dtype)
        if isinstance(found, str):
            yield {**described, "status": found}
            continue
        columns = time_columns(found)
        if mode == "forward":
            columns["saved_mib"] = kept(rival, run.scale.images, DTYPES[dtype], run.device)
        yield {**described, **columns, **work.columns(columns["median_us"], dtype, run.ceilings())}


def _described(run: Run, case: Case, name: str, mode: str, dtype: str) -> dict[str, Any]:
    return describe(case, name, mode, run.scale.images, dtype, formats(name, run.device))
