"""Worker processes that exit cleanly on Ctrl-C, and when their parent process is killed."""

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
    """A multiprocessing context for workers that ignore Ctrl-C, which reaches the whole group; the parent stops them.

    Args:
        modules: imported once for all workers. Without fork, as on Windows, each worker imports what it needs.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    result = multiprocessing.get_context("forkserver")
    result.set_forkserver_preload(list(modules))
    with _without_interrupts():
        forkserver.ensure_running()
    return result


def pool(workers: int, *modules: str, start: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    """A pool of processes from :func:`context` that take one task after another.

    Args:
        workers: number of processes.
        modules: imported once for all of them.
        start: called in each before its first task.
    """
    return ProcessPoolExecutor(workers, context(*modules), _start, (start,))


def _start(also: Callable[[], None] | None) -> None:
    end_with_parent()
    if also is not None:
        also()


def end_with_parent() -> None:
    """Make this process exit when its parent is killed."""
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
