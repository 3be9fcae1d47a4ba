"""Updates for which Inductor measures every choice it has first, which takes minutes: nothing comes after them."""

import importlib.util

from ..subjects.network import TORCHVISION
from .run import Rows, Run
from .steps import Cell, measured


def rows(run: Run) -> Rows:
    """PyTorch's own library's network, then this project's."""
    how = "eager" if run.toy else "max-autotune"
    if importlib.util.find_spec("torchvision") and not run.toy:
        yield measured(run, Cell("update", TORCHVISION, "aten", how, run.dtype, run.images))
    yield measured(run, Cell("update", run.network, run.ours, how, run.dtype, run.images))
