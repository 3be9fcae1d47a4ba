"""Logits of the network, without a gradient."""

from collections.abc import Iterator

from .run import Job, Rows, Run
from .steps import Cell, compiling, measured


def cells(run: Run) -> list[Cell]:
    counts = (run.images,) if run.toy else (128, 1, 1024)
    return [
        Cell("inference", run.network, implementation, "eager" if run.toy else "reduce-overhead", run.dtype, images)
        for images in counts
        for implementation in (run.ours, "aten")
    ]


def ahead(run: Run) -> Iterator[Job]:
    yield from (compiling(run, cell) for cell in cells(run) if cell.mode)


def rows(run: Run) -> Rows:
    """A row for each batch and implementation."""
    yield from (measured(run, cell) for cell in cells(run))
