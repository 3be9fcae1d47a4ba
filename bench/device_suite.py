"""Measure a device, most important results first: ``python -m bench.device_suite``.

The suite is designed for a GPU that is available for minutes. Parts run in the order given, each in its own process
with a share of the time; unused time goes to later parts. A row is written as soon as it is measured. Before anything
is timed, several processes compile what the parts need. On a CPU the same parts run at toy sizes, as a smoke test.

A part is a module of :mod:`bench.suite`. This process does not import torch, and leaves the device to the parts.
"""

import argparse
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

from net.common import cli
from net.common.cli import Parser, spin_briefly
from net.common.fields import at_least, flag_name
from net.data.processes import available_cores
from net.model.config import VARIANTS

from .measure.environment import ROOT, commit
from .suite.processes import Command
from .suite.rows import add_row, read_rows
from .suite.summary import summary

DESCRIPTION = (
    "Measure a GPU within a time budget, the most valuable figures first. On a CPU the same parts run at toy sizes, to "
    "see that they run."
)


class Part(NamedTuple):
    """A part of the suite.

    Attributes:
        module: of :mod:`bench.suite`.
        share: its share of the time, in seconds of the default budget.
        most: the maximum seconds it may take.
        limited: whether its rows are compared with the ceilings.
        timed: whether it measures times, so that nothing else may run meanwhile.
        ahead: whether it has something to compile or write before anything is timed.
    """

    module: str
    share: float
    most: float = float("inf")
    limited: bool = False
    timed: bool = True
    ahead: bool = False


#: The default order. With AHEAD's the shares add up to the default budget.
PARTS = {
    "gate": Part("gate", 110, most=130, timed=False),
    "ceilings": Part("ceilings", 15),
    "profile": Part("profile", 50, ahead=True),
    "layers": Part("layers", 30, limited=True),
    "steps": Part("steps", 100, limited=True, ahead=True),
    "train": Part("train", 50, limited=True, ahead=True),
    "kernels": Part("operators", 55, limited=True, ahead=True),
    "choices": Part("choices", 20, ahead=True),
    "inference": Part("inference", 20, limited=True, ahead=True),
    "input": Part("loading", 10),
    "parallel": Part("ranks", 15),
    "autotune": Part("autotune", 5, most=90, limited=True),
    "full_gate": Part("full_gate", 400, timed=False),
}
DEFAULT = tuple(name for name in PARTS if name != "full_gate")
#: Compiling ahead, which runs concurrently with the gate if the gate comes first.
AHEAD = Part("ahead", 110, most=120, timed=False)
BUDGET = 480.0
#: A part does not start with fewer seconds than this.
FEWEST = 4.0
OUTPUT = Path("runs") / "device-suite"


def parser() -> argparse.ArgumentParser:
    """The command line; flags that begin with --child are for child processes."""
    result = Parser(prog="python -m bench.device_suite", description=DESCRIPTION)
    result.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=DEFAULT,
        metavar="PART",
        help=f"parts to run, in this order; all but full_gate by default: {', '.join(PARTS)}",
    )
    result.add_argument(
        "--budget-s", type=float, default=BUDGET, metavar="SECONDS", help="time for all parts (%(default)g)"
    )
    result.add_argument(
        "--output", type=Path, default=OUTPUT, metavar="DIR", help="folder of the record and the traces (%(default)s)"
    )
    result.add_argument("--batch-size", type=int, metavar="N", help="128 by default on a GPU, 2 on a CPU")
    result.add_argument(
        "--network",
        choices=VARIANTS,
        metavar="NAME",
        help=f"paper by default on a GPU, digits on a CPU; one of {', '.join(VARIANTS)}",
    )
    for name in ("--child", "--child-folder", "--child-limit"):
        result.add_argument(name, help=argparse.SUPPRESS)
    return result


class Suite:
    """One run: its parts, its time, and the folder in which its processes share the rows measured so far."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.begin = time.monotonic()
        # Shared by all runs on a machine, so that a second run finds what the first one compiled.
        caches = Path(tempfile.gettempdir()) / f"device-suite-{os.getuid()}"
        self.environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            # Otherwise the first JAX process takes most of the device's memory.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        self.running: list[Command] = []
        #: Parts that were cut off, and failures.
        self.notes: list[str] = []
        self.problems: list[str] = []

    @property
    def left(self) -> float:
        return float(self.begin + self.options.budget_s - time.monotonic())

    def parts(self) -> list[str]:
        """The parts to run: the named ones, and the ceilings before the first part that needs them."""
        names = list(dict.fromkeys(self.options.parts))
        first = next((number for number, name in enumerate(names) if PARTS[name].limited), None)
        if first is not None and "ceilings" not in names:
            names.insert(first, "ceilings")
        return names

    def start(self, child: str, limit: float, **variables: str) -> Command:
        """Start a process for a part."""
        command = [sys.executable, "-m", "bench.device_suite", "--child", child, "--child-folder", str(self.folder)]
        command += ["--child-limit", f"{limit:.1f}", "--output", str(self.options.output.absolute())]
        for flag, value in (("--batch-size", self.options.batch_size), ("--network", self.options.network)):
            command += [flag, str(value)] if value is not None else []
        started = Command([*command, "--parts", *self.parts()], {**self.environment, **variables}, ROOT)
        self.running.append(started)
        return started

    def finish(self, name: str, command: Command, limit: float) -> None:
        """Wait for a part, and stop it at its time limit."""
        status = command.wait(limit)
        self.running.remove(command)
        if status is None:
            self.notes.append(f"{name} was stopped after {limit:.0f} s")
            if name in ("gate", "full_gate"):
                add_row(self.folder, {"suite": "gate", "case": name, "status": f"stopped after {limit:.0f} s"})
        elif status:
            self.problems.append(f"{name} failed, see above")

    def run(self) -> None:
        """Compile ahead, then run one part after another."""
        names = self.parts()
        shares = {name: PARTS[name].share for name in names}
        compiled = any(PARTS[name].ahead for name in names)
        beside = names[0] if compiled and not PARTS[names[0]].timed else None
        if beside:
            # Compiling runs concurrently; the suite waits for the longer of the two.
            shares[beside] = max(0.0, shares[beside] - AHEAD.share)
        ahead = self.limit(AHEAD, AHEAD.share, sum(shares.values())) if compiled else 0.0
        compiling = self.compile(ahead)
        if beside is None:
            self.wait(compiling, ahead)
        for number, name in enumerate(names):
            part = PARTS[name]
            rest = sum(shares[other] for other in names[number + 1 :])
            limit = self.limit(part, part.share, rest)
            if limit < FEWEST:
                print(f"--- {name} is not begun: {max(0.0, self.left):.0f} s are left", flush=True)
                self.notes.append(f"{name} was not begun")
                continue
            print(
                f"--- {name}: at most {limit:.0f} s; {self.left:.0f} of {self.options.budget_s:.0f} s left", flush=True
            )
            self.finish(name, self.start(name, limit), limit)
            if name == beside:
                self.wait(compiling, ahead)

    def limit(self, part: Part, share: float, rest: float) -> float:
        """Seconds for a part with this share, if later parts have ``rest`` in total."""
        return min(part.most, self.left * share / (share + rest))

    def compile(self, limit: float) -> list[Command]:
        """Start the processes that compile."""
        if limit < FEWEST:
            return []
        # Each starts its own compilers, so a few processes keep the cores busy.
        count = max(1, min(6, available_cores() * 3 // 8))
        print(f"--- compiling in {count} processes: at most {limit:.0f} s", flush=True)
        return [self.start("ahead", limit, TORCHINDUCTOR_COMPILE_THREADS="2") for _ in range(count)]

    def wait(self, compiling: list[Command], limit: float) -> None:
        """Wait for the processes that compile."""
        for command in compiling:
            self.finish("compiling ahead", command, limit)
        # Autotuning timed kernel variants while other processes used the device. Keep the compiled variants; the first
        # process that has the device to itself times them again.
        for path in Path(self.environment["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.best_config"):
            path.unlink(missing_ok=True)

    def stop(self) -> None:
        for command in self.running:
            command.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parser().parse_args(arguments)
    at_least(options, 0, "budget_s", called=flag_name)
    at_least(options, 1, "batch_size", called=flag_name)
    if not commit():
        parser().error("a record names the commit it measures: run this in a git checkout, or set SOURCE_COMMIT")
    if options.child:
        return child(options)
    with tempfile.TemporaryDirectory(prefix="device-suite-") as folder:
        suite = Suite(options, Path(folder))
        before = signal.signal(signal.SIGTERM, _leave)
        try:
            suite.run()
        except (KeyboardInterrupt, SystemExit):
            suite.problems.append("interrupted")
        finally:
            # However this ends, no process may keep using the device.
            suite.stop()
            signal.signal(signal.SIGTERM, before)
        rows = read_rows(Path(folder))
    print(summary(rows))
    for note in suite.notes:
        print(f"note: {note}")
    recorded = sum("machine" in row for row in rows)
    print(f"{recorded} rows in {options.output} after {time.monotonic() - suite.begin:.0f} s", flush=True)
    if any(row.get("suite") == "gate" and row["status"].startswith("failed") for row in rows):
        suite.problems.append("the gate failed: rows that depend on it say so")
    if suite.problems:
        print("error: " + "; ".join(suite.problems), file=sys.stderr)
    return 1 if suite.problems else 0


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def child(options: argparse.Namespace) -> int:
    """Run one part, in its own process."""
    begin = time.monotonic()
    # As the commands do, before torch is imported.
    spin_briefly()
    from .suite import run as running

    run = running.started(options, begin)
    if options.child == "ahead":
        from .suite.ahead import work

        work(run, [PARTS[name].module for name in options.parts])
        return 0
    part = importlib.import_module(f"{__package__}.suite.{PARTS[options.child].module}")
    try:
        running.record(run, part.rows(run))
    except Exception:  # The part has failed; its measurements so far are written.
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    cli.run(main)
