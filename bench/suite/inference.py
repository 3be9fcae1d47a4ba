"""Logits of the network, without a gradient."""

from collections.abc import Iterator

from ..cells import inference
from .run import Job, Rows, Run
from .steps import compiling, measured


def ahead(run: Run) -> Iterator[Job]:
    yield from (compiling(run, step) for step in inference(run.scale) if step.mode)


def rows(run: Run) -> Rows:
    """A row for each batch and implementation."""
    yield from (measured(run, step) for step in inference(run.scale))
