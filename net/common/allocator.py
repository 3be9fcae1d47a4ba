"""The C library's memory allocator. Does not import torch."""

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Have glibc reuse the memory of freed tensors instead of returning it to the system.

    By default glibc unmaps every large tensor when it is freed, and each new one faults its pages in again: a third of
    a training step on a CPU. Does nothing without glibc.
    """
    # On Windows, CDLL(None) raises.
    with contextlib.suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)
