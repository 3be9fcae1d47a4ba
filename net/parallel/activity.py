"""What a process has done so far, seen from one of its threads: by that, a hung process is told from a patient one."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROCESSES = Path("/proc")
#: The share of the time for which a process that does nothing may compute all the same: its other threads look around.
IDLE_SHARE = 0.01
#: Bytes that it may read and write all the same.
IDLE_BYTES = 64 * 1024


class Activity(NamedTuple):
    """Seconds of computing; bytes read from and written to storage."""

    seconds: float
    transferred: int

    def idle_since(self, before: "Activity", seconds: float) -> bool:
        """Whether next to nothing was done in these ``seconds``. The end of a child may take its share away; that is
        something done."""
        computed, transferred = abs(self.seconds - before.seconds), abs(self.transferred - before.transferred)
        return computed < IDLE_SHARE * seconds and transferred < IDLE_BYTES


def activity() -> Activity | None:
    """That of this process and its descendants, such as packers and compilers; the calling thread's own is left out.

    Returns:
        None where the system does not tell. Linux does, in ``/proc``, where its lists of children are not left out.
    """
    here = PROCESSES / str(os.getpid())
    if not (here / "task" / here.name / "children").exists():
        return None
    try:
        seconds = time.process_time() - time.thread_time() + _seconds(here)[1]
        transferred = _transferred(here)
        for child in _descendants(here):
            # One that ended since it was listed is in its parent's sum.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                seconds += sum(_seconds(child))
                transferred += _transferred(child)
    except OSError:
        return None
    return Activity(seconds, transferred)


def _descendants(process: Path) -> Iterator[Path]:
    # Threads and processes may end while they are listed.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in (process / "task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for child in (thread / "children").read_text().split():
                    yield PROCESSES / child
                    yield from _descendants(PROCESSES / child)


def _seconds(process: Path) -> tuple[float, float]:
    """Its own seconds, and those of its children that it has seen end."""
    # The name before the last parenthesis may have spaces in it.
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    user, system, children_user, children_system = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields[11:15])
    return user + system, children_user + children_system


def _transferred(process: Path) -> int:
    lines = dict(line.split(": ") for line in (process / "io").read_text().splitlines())
    return int(lines["read_bytes"]) + int(lines["write_bytes"])
