"""Which implementation of an operator runs.

The choice is plain module state: ``torch.compile`` guards on it, so a compiled caller is traced again after a switch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT_VARIABLE = "KERNELS_IMPLEMENTATION"

#: ``auto`` takes the fastest one for the tensor's device; ``aten`` is PyTorch's own operators; ``reference`` is this
#: package's formula in plain PyTorch, forward and backward written out.
IMPLEMENTATIONS = ("auto", "aten", "reference")


def _checked(name: str, source: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{source} must be one of {', '.join(IMPLEMENTATIONS)}; got {name!r}")
    return name


_selected = _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def selected() -> str:
    """The implementation that runs now: ``"aten"`` or ``"reference"``."""
    return "reference" if _selected == "auto" else _selected


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Run the operators with the implementation ``name`` inside a ``with`` block.

    Args:
        name: one of ``"auto"``, ``"aten"``, ``"reference"``. The environment variable ``KERNELS_IMPLEMENTATION``
            sets the same switch for a whole process.

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
