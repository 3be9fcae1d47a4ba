"""How kernels are launched, or only compiled, several at once."""

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

from . import config

#: Maximum number of kernels that compile at once.
THREADS = 8


class _Local(threading.local):
    #: Compiles what this thread launches; None where launches run.
    pool: ThreadPoolExecutor | None = None


_local = _Local()


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, /, *arguments: Any, **named: Any) -> None:
    """Launch a kernel on a device's current stream.

    Args:
        kernel: the Triton kernel.
        grid: the number of programs along each axis.
        device: of the tensors.
        arguments, named: the kernel's arguments and Triton's options.
    """
    if _local.pool is None:
        with _on(device):
            kernel[grid](*arguments, **named)
    else:
        like = _standin(arguments), {name: _standin(value) for name, value in named.items()}
        _local.pool.submit(_compile, kernel, grid, device, *like)


@contextlib.contextmanager
def compile_only() -> Iterator[None]:
    """Inside a ``with`` block, this thread's launches compile their kernels and do not run them.

    Their outputs keep the values they had. On exit, all are compiled. One after the other, the kernels of a training
    step take half a minute; Triton's compiler releases Python's lock for most of that. A kernel that cannot be compiled
    raises when it is launched.
    """
    if not config.INTERPRETED:
        # Initialized on first use, which must not be in several threads at once.
        _ = triton.runtime.driver.active
    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    _local.pool = pool
    try:
        # Backward launches would come from autograd's threads.
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _local.pool = None
        pool.shutdown()


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _standin(value: Any) -> Any:
    """For tensors, tensors without memory; Triton compiles for dtypes and for addresses that are multiples of 16."""
    if isinstance(value, Tensor):
        return value.new_empty(0, device="meta")
    if type(value) is tuple:
        return tuple(map(_standin, value))
    return value


def _compile(kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: Any, named: dict[str, Any]) -> None:
    with _on(device):
        kernel.warmup(*arguments, grid=grid, **named)
