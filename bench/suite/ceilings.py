"""What the device can do at best, with which everything after it is compared."""

from ..measure import ceilings
from .run import Rows, Run


def rows(run: Run) -> Rows:
    """Copies and matrix products."""
    yield from ceilings.rows(run.device, run.samples, run.say)
