"""Stages 1 and 2 in a user's own program, alone and with busy processes running: ``python -m bench.contention``.

This project's commands limit OpenMP's spinning and make the C library keep freed memory. Other programs that import
:mod:`kernels` do neither, and machines are often shared. So the measurement runs in
:mod:`bench.subjects.user_program`, which changes no setting. A busy process is an endless loop.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from net.common import cli
from net.common.fields import at_least, flag, flag_name

from .measure.environment import ROOT
from .measure.records import time_columns, write
from .subjects.user_program import IMPLEMENTATIONS, SHAPES

DESCRIPTION = (
    "Time stages 1 and 2, forward and backward, as another program would run them: alone, and with two processes "
    "running that keep cores busy."
)
#: Environment variables that user programs do not set.
UNSET = (
    "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "OMP_DYNAMIC", "OMP_PROC_BIND", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY",
    "KMP_BLOCKTIME", "KMP_AFFINITY", "MKL_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_",
    "KERNELS_IMPLEMENTATION", "TRITON_INTERPRET",
)  # fmt: skip
BUSY = (0, 2)
#: Implementations that compile nothing.
EAGER = ("auto, eager", "aten, eager")
#: Ends when its parent process ends, even if the parent is killed.
LOOP = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    sum(range(100_000))"
#: Rounds of each implementation: minimum, maximum, and the seconds after which no further round starts.
ROUNDS = (3, 7, 4.0)
#: Time limits in seconds: of a process's first call, which may compile, and of later ones.
FIRST_LIMIT, LIMIT = 300.0, 30.0
Say = Callable[[str], None]


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Run ``count`` processes that each keep a core busy."""
    command = [sys.executable, "-c", LOOP, str(os.getpid())]
    # This process handles Ctrl-C.
    loops = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


class Program:
    """A :mod:`bench.subjects.user_program`, started on the first request."""

    def __init__(self, images: int) -> None:
        self.images = images
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._called: set[str] = set()

    def ask(self, what: str, name: str) -> dict[str, Any]:
        """The answer to ``time`` or ``scratch``.

        Raises:
            TimeoutError: there was none in time; the process was killed, and the next call starts another.
            RuntimeError: the process has ended.
        """
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        limit = LIMIT if name in self._called else FIRST_LIMIT
        self._called.add(name)
        try:
            print(f"{what} {name}", file=self._process.stdin, flush=True)
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise TimeoutError(f"stopped after {limit:.0f} s") from None
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self.close()
            raise RuntimeError(f"failed: exit status {status}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in UNSET}
        # Silences the profiler's messages.
        environment["KINETO_LOG_LEVEL"] = "99"
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.subjects.user_program", str(self.images)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        answers: queue.Queue[str] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                answers.put(line)
            answers.put("")

        threading.Thread(target=read, daemon=True).start()
        self._process, self._answers, self._called = process, answers, set()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Cell:
    """Measurements of one implementation with a number of busy processes running."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.columns: dict[str, Any] = {}
        self.status = ""

    def wants_more(self) -> bool:
        least, most, seconds = ROUNDS
        if self.status or len(self.times) >= most:
            return False
        return len(self.times) < least or sum(self.times) < seconds


def measure(names: Sequence[str], images: int, say: Say) -> Iterator[dict[str, Any]]:
    """Rows of the suite ``contention``, those without busy processes first, each with its ``times`` in seconds.

    Implementations run interleaved. One that exceeds its time limit, or ends the process, has a ``status`` instead.

    Args:
        names: of :data:`bench.subjects.user_program.IMPLEMENTATIONS`.
        images: the batch size.
        say: called with a line of progress.
    """
    with Program(images) as program:
        for count in BUSY:
            beside = f"with {count} busy processes" if count else "alone"
            cells = {name: _Cell() for name in names}

            def ask(name: str, what: str, cell: _Cell) -> dict[str, Any]:
                try:
                    return program.ask(what, name)
                except (TimeoutError, RuntimeError) as error:
                    cell.status = str(error)
                    return {}

            if not count:
                for name, cell in cells.items():
                    say(f"{name}: first call" + ("" if name in EAGER else ", which compiles"))
                    ask(name, "time", cell)
            with busy(count):
                for name, cell in cells.items():
                    if not cell.status:
                        ask(name, "time", cell)
                turn = 0
                while any(cell.wants_more() for cell in cells.values()):
                    turn += 1
                    say(f"{beside}: round {turn} of at most {ROUNDS[1]}")
                    for name, cell in cells.items():
                        if cell.wants_more() and (answer := ask(name, "time", cell)):
                            cell.times.append(answer["seconds"])
                            cell.columns["threads"] = answer["threads"]
            for name, cell in cells.items():
                if len(cell.times) >= ROUNDS[0]:
                    # It failed later, but there are enough times.
                    cell.status = ""
                if not count and not cell.status:
                    cell.columns |= ask(name, "scratch", _Cell())
                yield _row(name, images, count, cell)


def _row(name: str, images: int, count: int, cell: _Cell) -> dict[str, Any]:
    format = str(IMPLEMENTATIONS[name][2]).removeprefix("torch.").removesuffix("_format")
    row: dict[str, Any] = {
        "suite": "contention",
        "case": "stages 1 + 2",
        "implementation": name,
        "mode": "forward_backward",
        "shape": " + ".join("x".join(map(str, (images, *shape))) for shape in SHAPES),
        "dtype": "float32",
        "memory_format": format,
        "images": images,
        "busy_processes": count,
    }
    if cell.status:
        return {**row, "status": cell.status}
    columns = time_columns(cell.times)
    rate = round(images / columns["median_us"] * 1e6, 1)
    return {**row, **columns, "images_per_s": rate, **cell.columns, "times": cell.times}


@dataclass(frozen=True)
class ContentionConfig:
    """The flags of ``python -m bench.contention``."""

    quick: bool = flag(False, "eager implementations only")
    images: int = flag(16, "batch size", metavar="N")
    record: bool = flag(False, "append the rows to reports/data")

    def __post_init__(self) -> None:
        at_least(self, 1, "images", called=flag_name)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians in milliseconds with 20th and 80th percentiles, quiet and busy, and the speedup over aten: eager compared
    with eager, compiled with compiled."""
    by = {(row["implementation"], row["busy_processes"]): row for row in rows}
    titles = ["implementation"]
    for count in BUSY:
        beside = f"with {count} busy processes" if count else "alone"
        titles += [f"{beside}: ms", "p20 to p80", "x aten, same mode"]
    titles += ["scratch MiB", "% of input"]
    lines = []
    for name in dict.fromkeys(row["implementation"] for row in rows):
        line: list[object] = [name]
        rival = "aten, eager" if name in EAGER else "aten, compiled"
        for count in BUSY:
            row, other = by.get((name, count), {}), by.get((rival, count), {})
            if "median_us" not in row:
                line += [row.get("status", "-"), "-", "-"]
                continue
            ratio = f"{other['median_us'] / row['median_us']:.2f}" if "median_us" in other else "-"
            spread = f"{row['p20_us'] / 1e3:,.1f} to {row['p80_us'] / 1e3:,.1f}"
            line += [f"{row['median_us'] / 1e3:,.1f}", spread, ratio]
        line += [by.get((name, 0), {}).get(key, "-") for key in ("scratch_mib", "scratch_percent_of_input")]
        lines.append(line)
    return str(tabulate(lines, titles, disable_numparse=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    config = cli.resolve(cli.given(ContentionConfig, "bench.contention", DESCRIPTION, arguments), ContentionConfig)
    names = EAGER if config.quick else tuple(IMPLEMENTATIONS)
    begin = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - begin:5.1f} s  {what}", flush=True)

    say(f"starting a program with {config.images} images")
    rows = list(measure(names, config.images, say))
    print(f"forward and backward, float32, {config.images} images, {rows[0].get('threads', '-')} threads")
    print(table(rows))
    if config.record:
        rows = [{key: value for key, value in row.items() if key != "times"} for row in rows]
        print(f"recorded {len(rows)} rows in {write(rows)}")
    return int(any("status" in row for row in rows))


if __name__ == "__main__":
    cli.run(main)
