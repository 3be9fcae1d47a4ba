"""The device's peak rates, with which later rows are compared."""

from ..measure import ceilings
from .run import Rows, Run


def rows(run: Run) -> Rows:
    """Copies and matrix products."""
    yield from ceilings.rows(run.device, run.samples, run.say)
