"""Compiles or writes what the parts need before anything is timed, in several concurrent processes.

Each process goes through the jobs of all parts in order and does those that no other process has begun. The others find
its compiled code in the caches of Inductor and Triton on disk.
"""

import importlib
import time
from collections.abc import Iterable

import torch

from ..subjects.cases import failure
from .run import Job, Run


def jobs(run: Run, parts: Iterable[str]) -> list[Job]:
    """The jobs of parts, those of the first part first; parts may share some."""
    found: dict[str, Job] = {}
    for part in parts:
        module = importlib.import_module(f"{__package__}.{part}")
        for name, job in module.ahead(run) if hasattr(module, "ahead") else ():
            found.setdefault(name, (name, job))
    return list(found.values())


def work(run: Run, parts: Iterable[str]) -> None:
    """Do the jobs that no other process has begun, until the time is up."""
    todo = jobs(run, parts)
    for number, (name, job) in enumerate(todo):
        if run.left <= 0:
            run.say("the time is up: anything not compiled yet will be compiled when it is measured")
            return
        try:
            (run.folder / f"job-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        begin = time.perf_counter()
        try:
            job()
            said = "done"
        except Exception as error:  # It will fail again when it is measured, and is recorded there.
            said = failure(error)
        torch._dynamo.reset()
        if run.cuda:
            torch.cuda.empty_cache()
        run.say(f"ahead, {number + 1} of {len(todo)}: {name}: {said} in {time.perf_counter() - begin:.1f} s")
