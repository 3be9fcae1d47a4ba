"""Which implementation of an operator runs.

The choice is plain module state: ``torch.compile`` guards on it, so a compiled caller is traced again after a switch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT_VARIABLE = "KERNELS_IMPLEMENTATION"
#: Triton reads this when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: ``auto`` takes what serves best: ``triton`` on a GPU; on a CPU the formula traced into the graph under
#: ``torch.compile``, and ``reference`` in eager calls, which wait for no compiler; ``aten`` on an Apple GPU. That is
#: PyTorch's own operators; ``reference`` is this package's formula in plain PyTorch, forward and backward written out;
#: ``inductor`` is the same, compiled, for eager calls; ``triton`` is this package's GPU kernels, which run on CPU
#: tensors where the environment variable ``TRITON_INTERPRET`` is 1.
IMPLEMENTATIONS = ("auto", "aten", "reference", "inductor", "triton")


def _checked(name: str, source: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{source} must be one of {', '.join(IMPLEMENTATIONS)}; got {name!r}")
    return name


_selected = _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def selected() -> str:
    """The name that is chosen now, one of :data:`IMPLEMENTATIONS`."""
    return _selected


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Run the operators with the implementation ``name`` inside a ``with`` block.

    Args:
        name: one of :data:`IMPLEMENTATIONS`. The environment variable ``KERNELS_IMPLEMENTATION`` sets the same switch
            for a whole process.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global _selected
    before = _selected
    _selected = _checked(name, "name")
    try:
        yield
    finally:
        _selected = before
