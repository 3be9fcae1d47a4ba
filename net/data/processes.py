"""Worker processes that end in order: on Ctrl-C, and when the process that hands out the work is killed."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Windows has the second only.
    from multiprocessing.context import ForkServerContext, SpawnContext


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def context(*modules: str) -> "ForkServerContext | SpawnContext":
    """Where processes come from that ignore Ctrl-C, which reaches a whole group: who hands out the work stops it.

    Args:
        modules: imported once for all of them. Where there is no fork, as on Windows, each imports what it needs.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    result = multiprocessing.get_context("forkserver")
    result.set_forkserver_preload(list(modules))
    with _without_interrupts():
        forkserver.ensure_running()
    return result


def pool(workers: int, module: str, start: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    """Processes that are handed one task after the other, from :func:`context`.

    Args:
        workers: processes.
        module: imported once for all of them.
        start: called in each before its first task.
    """
    return ProcessPoolExecutor(workers, context(module), _start, (start,))


def _start(also: Callable[[], None] | None) -> None:
    end_with_parent()
    if also is not None:
        also()


def end_with_parent() -> None:
    """Have this process end when the one that hands out the work is killed; it would work for nobody."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
