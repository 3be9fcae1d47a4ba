"""The formulas of :mod:`kernels.reference` as regions compiled by ``torch.compile``, for eager callers on a CPU.

Each combination of shape, dtype, memory format and parameters is compiled when it is first met, which takes seconds to
half a minute. Where :mod:`kernels.compiler` finds an obstacle :mod:`kernels.cpu` runs instead, after one notice.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import compiler, cpu, private, reference

#: Shapes and parameters that are compiled; further ones run as ``reference`` does.
_VARIANTS = 64


@functools.cache
def _compiled(function: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    if (obstacle := compiler.obstacle()) is not None:
        _say_once(obstacle)
        return otherwise
    return torch.compile(function, dynamic=False)


@functools.cache
def _say_once(obstacle: str) -> None:
    warnings.warn(f"kernels: running 'reference' instead of 'inductor': {obstacle}", stacklevel=2)


def forward(*arguments: Any) -> Any:
    """See :func:`kernels.reference.forward`."""
    with private.dynamo(recompile_limit=_VARIANTS):
        return _compiled(reference.forward, cpu.forward)(*arguments)


def backward(*arguments: Any) -> Any:
    """See :func:`kernels.reference.backward`."""
    with private.dynamo(recompile_limit=_VARIANTS):
        return _compiled(reference.backward, cpu.backward)(*arguments)
