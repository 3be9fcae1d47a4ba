"""The formulas of :mod:`kernels.traced` as regions compiled by ``torch.compile``, for eager callers.

Each combination of shape, dtype, memory format and parameters is compiled on first use, which takes seconds to half a
minute.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import private, traced

#: The number of combinations that are compiled; further ones run uncompiled.
_VARIANTS = 64


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def forward(*arguments: Any) -> Any:
    """See :func:`kernels.reference.forward`."""
    with private.dynamo(recompile_limit=_VARIANTS):
        return _compiled(traced.forward)(*arguments)


def backward(*arguments: Any) -> Any:
    """See :func:`kernels.reference.backward`."""
    with private.dynamo(recompile_limit=_VARIANTS):
        return _compiled(traced.backward)(*arguments)
