"""Worker threads for eager calls on a CPU: as many as ``torch.get_num_threads()``, started when first needed.

Inside a worker, PyTorch's operators run single-threaded.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from . import private

_lock = threading.Lock()
_workers: ThreadPoolExecutor | None = None
_count = 0


def _forget() -> None:
    """A forked process does not inherit the threads."""
    global _lock, _workers
    _lock, _workers = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _begin() -> None:
    # A thread adopts the process's number of threads when it first reads it; only then can it set its own.
    torch.get_num_threads()
    torch.set_num_threads(1)


def _started(count: int) -> ThreadPoolExecutor:
    """The workers, all of them running."""
    global _workers, _count
    if _workers is None or _count != count:
        if _workers is not None:
            _workers.shutdown(wait=False)
        _workers, _count = ThreadPoolExecutor(count, "kernels", _begin), count
        all_started = threading.Barrier(count)
        try:
            for started in [_workers.submit(all_started.wait) for _ in range(count)]:
                started.result()
        except BaseException:
            # If the system refuses to start a thread, the others would wait for it forever.
            all_started.abort()
            _workers = None
            raise
        # A thread's own setting also becomes the default for threads started later.
        torch.set_num_threads(count)
    return _workers


def run(work: Callable[[], None], most: int) -> None:
    """Call ``work`` on every worker, at most ``most`` times, without recording gradients; wait for all to return.

    With a single worker, call it in this thread.

    Raises:
        the first exception of ``work``.
    """
    inference = torch.is_inference_mode_enabled()

    def call() -> None:
        # Disable reverse and forward mode here, because gradient modes are per thread.
        with torch.inference_mode() if inference else torch.no_grad(), private.without_forward_mode():
            work()

    count = torch.get_num_threads()
    if min(count, most) < 2:
        call()
        return
    with _lock:
        workers = _started(count)
        running: list[Future[None]] = [workers.submit(call) for _ in range(min(count, most))]
    # Wait for all: one still running would write to results that the caller believes finished.
    for one in running:
        one.exception()
    for one in running:
        one.result()
