"""The stages with register caps and segment lengths other than the current ones, interleaved; no table shows them."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kernels.gpu import config

from ..measure.records import time_columns
from ..measure.timing import copies, seconds
from ..subjects.cases import CASES, MODES, Case, check, failure, inputs, prepare
from .run import Job, Rows, Run

#: Register caps and rows per segment to try in addition to the current ones.
CAPS = (None, 64, 72, 80, 96, 112, 128)
SEGMENTS = (3, 4, 5, 6, 8, 12, 27)


@contextlib.contextmanager
def chosen(registers: dict[Any, Any], rows: int) -> Iterator[None]:
    """Use these register caps and rows per segment in the Triton kernels."""
    before = config.REGISTERS, config.SEGMENT_ROWS
    config.REGISTERS, config.SEGMENT_ROWS = registers, rows
    try:
        yield
    finally:
        config.REGISTERS, config.SEGMENT_ROWS = before


def tried() -> dict[str, tuple[dict[Any, Any], int]]:
    """Caps and rows of each choice."""
    today, rows_today = config.REGISTERS, config.SEGMENT_ROWS
    caps = {f"{cap or 'any'} registers": (dict.fromkeys(today, cap), rows_today) for cap in CAPS}
    return caps | {f"{rows} rows": (today, rows) for rows in SEGMENTS}


def ahead(run: Run) -> Iterator[Job]:
    if not run.scale.toy:
        for case in CASES[:2]:
            for name, choice in tried().items():
                yield f"{case.name}, {name}", partial(_check, run, case, choice)


def _check(run: Run, case: Case, choice: tuple[dict[Any, Any], int]) -> None:
    with chosen(*choice):
        check(prepare(case, run.scale.ours), run.scale.images, torch.bfloat16, run.device)


def rows(run: Run) -> Rows:
    """One row per choice that passes the check: inference, forward and backward."""
    choices = tried()

    def under(choice: str, call: Callable[[], object]) -> Callable[[], object]:
        def call_it() -> object:
            with chosen(*choices[choice]):
                return call()

        return call_it

    for case in CASES[1:2] if run.scale.toy else CASES[:2]:
        right = []
        run.say(f"checking {len(choices)} choices of {case.name}")
        for name, choice in choices.items():
            try:
                _check(run, case, choice)
                right.append(name)
            except Exception as error:  # Any error becomes the row's status, and the others continue.
                yield {**_described(case, name), "status": failure(error)}
        prepared = prepare(case, run.scale.ours)
        for mode in MODES[:3]:
            count = copies(case.work(run.scale.images, torch.bfloat16)[mode].bytes) if run.cuda else 1
            images = run.scale.images
            sets = [inputs(case, images, torch.bfloat16, "channels_last", run.device, n) for n in range(count)]
            calls = prepared.calls(mode, sets)
            rivals = [[under(name, call) for call in calls] for name in right]
            for name, times in zip(right, seconds(rivals, run.device, run.samples), strict=True):
                columns = {"mode": mode, "images": run.scale.images, **time_columns(times)}
                yield {**_described(case, name), **columns}


def _described(case: Case, name: str) -> dict[str, Any]:
    return {"suite": "choices", "case": f"choice: {case.name}", "implementation": name, "dtype": "bfloat16"}
