"""Training steps that Inductor autotunes first, which takes minutes, so this part comes last."""

from ..cells import autotuned
from .run import Rows, Run
from .steps import measured


def rows(run: Run) -> Rows:
    """PyTorch's own library's network, then this project's."""
    yield from (measured(run, step) for step in autotuned(run.scale))
