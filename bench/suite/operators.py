"""Every operator at the paper's shapes, its implementations sampled in turns."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..measure.records import time_columns
from ..subjects.cases import (
    CASES,
    DTYPES,
    IMPLEMENTATIONS,
    MODES,
    Case,
    Prepared,
    check,
    describe,
    failure,
    formats,
    implementations,
    kept,
    prepare,
    sampled,
)
from .run import Job, Rows, Run


def tasks(run: Run) -> Iterator[tuple[str, Case, tuple[str, ...]]]:
    """Dtype, case and its implementations, in order of value."""
    for dtype in DTYPES if run.toy else ("bfloat16", "float32"):
        for case in CASES[1:2] if run.toy else CASES:
            # The formula called eagerly is nobody's choice on a GPU.
            names = [name for name in implementations(case, run.device) if name != "reference"]
            yield dtype, case, (run.ours, "aten") if run.toy else tuple(names)


def ahead(run: Run) -> Iterator[Job]:
    for dtype, case, names in tasks(run):
        for name in names:
            # Only what is compiled here is kept on disk.
            if name == "triton" or (name in IMPLEMENTATIONS and IMPLEMENTATIONS[name][1]):
                job = partial(_check, case, name, run, dtype)
                yield f"{case.name}, {name}, {dtype}", job


def _check(case: Case, name: str, run: Run, dtype: str) -> Prepared:
    prepared = prepare(case, name)
    check(prepared, run.images, DTYPES[dtype], run.device)
    return prepared


def rows(run: Run) -> Rows:
    """A row for each implementation and mode that is right, and one that says why for each that is not."""
    for dtype, case, names in tasks(run):
        torch._dynamo.reset()
        checked: list[Prepared] = []
        for name in names:
            run.say(f"checking {name} of {case.name}, {dtype}")
            try:
                checked.append(_check(case, name, run, dtype))
            except Exception as error:  # Whatever it is becomes the row's status, and the others go on.
                yield {**_described(run, case, name, "forward", dtype), "status": failure(error)}
        for mode in MODES if checked else ():
            yield from _rivals(run, checked, mode, dtype)


def _rivals(run: Run, rivals: list[Prepared], mode: str, dtype: str) -> Rows:
    work = rivals[0].case.work(run.images, DTYPES[dtype])[mode]
    times = sampled(rivals, mode, run.images, DTYPES[dtype], run.device, run.samples)
    for rival, found in zip(rivals, times, strict=True):
        described = _described(run, rival.case, rival.implementation, mode, dtype)
        if isinstance(found, str):
            yield {**described, "status": found}
            continue
        columns = time_columns(found)
        if mode == "forward":
            columns["saved_mib"] = kept(rival, run.images, DTYPES[dtype], run.device)
        yield {**described, **columns, **work.columns(columns["median_us"], dtype, run.ceilings())}


def _described(run: Run, case: Case, name: str, mode: str, dtype: str) -> dict[str, Any]:
    return describe(case, name, mode, run.images, dtype, formats(name, run.device))
