"""Which implementation of an operator runs.

The choice is plain module state: ``torch.compile`` guards on it, so a compiled caller is traced again after a switch.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ENVIRONMENT_VARIABLE = "KERNELS_IMPLEMENTATION"

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


#: Held by the thread that is inside :func:`implementation`.
_switch = threading.RLock()


def selected() -> str:
    """The name that is chosen now, one of :data:`IMPLEMENTATIONS`."""
    return _selected


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Run the operators with the implementation ``name`` inside a ``with`` block.

    The switch is the process's, so that the threads of autograd and of ``nn.DataParallel`` follow it. While a thread is
    inside the block no other may enter one. A backward pass runs with the implementation of its forward pass.

    Args:
        name: one of :data:`IMPLEMENTATIONS`. The environment variable ``KERNELS_IMPLEMENTATION`` sets the same switch
            for a whole process.

    Raises:
        ValueError: ``name`` is none of these.
        RuntimeError: another thread is inside a block.
    """
    global _selected
    _checked(name, "name")
    # In a compiled function the block has done its work when the function has been traced.
    held = not torch.compiler.is_compiling()
    if held and not _switch.acquire(blocking=False):
        raise RuntimeError(
            f"implementation({name!r}): another thread has chosen {_selected!r} for the process; enter the block once, "
            "around the threads"
        )
    before = _selected
    _selected = name
    try:
        yield
    finally:
        _selected = before
        if held:
            _switch.release()
