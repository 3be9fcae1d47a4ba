"""The state shared by the parts of one run: the device, the sizes, the time, and the rows measured so far."""

import argparse
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from net.common.allocator import keep_freed_memory
from net.data.processes import available_cores

from ..cells import Scale
from ..measure import ceilings as ceilings_module
from ..measure.ceilings import Ceilings
from ..measure.environment import describe
from ..measure.implementations import ours
from ..measure.records import write
from .rows import Row, add_row, complete, read_rows

Rows = Generator[Row, None, None]
#: Name and function of a job that runs before anything is timed.
Job = tuple[str, Callable[[], object]]
#: Columns shown in a progress line.
FIGURES = {
    "median_us": "{:,.1f} us",
    "us_per_step": "{:,.1f} us a step",
    "images_per_s": "{:,.0f} images/s",
    "gb_per_s": "{:,.0f} GB/s",
    "gflop_per_s": "{:,.0f} GFLOP/s",
    "percent_of_limit": "{:.0f} % of the limit",
    "percent_of_step": "{:.1f} % of the step",
    "status": "{}",
    "unverified": "({})",
}
#: Cases of the gate's first row, and of the memory checker, for which only a failure counts.
FIRST, CHECKER = "two stages, repeated", "compute-sanitizer"


@dataclass
class Run:
    """One part's view of the run.

    Attributes:
        device: where it runs.
        scale: batch and network; toy sizes where there is no GPU.
        folder: of the run; thrown away at its end.
        output: of the record.
        limit: seconds that the part has.
        begin: when the part began, by ``time.monotonic``.
    """

    device: torch.device
    scale: Scale
    folder: Path
    output: Path
    limit: float
    begin: float = field(default_factory=time.monotonic)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def samples(self) -> int:
        return 3 if self.scale.toy else 30

    @property
    def left(self) -> float:
        """The part's remaining seconds."""
        return self.begin + self.limit - time.monotonic()

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"{time.monotonic() - self.begin:6.1f} of {self.limit:.0f} s  {text}", flush=True)

    def rows(self) -> list[Row]:
        """The rows measured so far in this run."""
        return read_rows(self.folder)

    def ceilings(self) -> Ceilings | None:
        """The ceilings measured in this run; None unless there are a copy and a product in float32."""
        measured = [row for row in self.rows() if row.get("suite") == "ceilings" and "median_us" in row]
        found = {row["case"] if row["case"] == "copy" else row["dtype"] for row in measured}
        return ceilings_module.ceilings(measured) if {"copy", "float32"} <= found else None


def started(options: argparse.Namespace, begin: float) -> Run:
    """The run of a part's process, from the suite's command line."""
    cuda = torch.cuda.is_available()
    if cuda:
        # Graphs cannot be captured on the default stream.
        torch.cuda.set_stream(torch.cuda.Stream())
    keep_freed_memory()
    network, images = options.network or ("paper" if cuda else "digits"), options.batch_size or (128 if cuda else 2)
    return Run(
        torch.device("cuda" if cuda else "cpu"),
        Scale("cuda" if cuda else "cpu", images, network, toy=not cuda),
        folder=Path(options.child_folder),
        output=options.output,
        # Leave time to end by itself rather than in the middle of a row.
        limit=0.97 * float(options.child_limit),
        begin=begin,
    )


def record(run: Run, rows: Rows) -> None:
    """Write rows as they arrive, until there are no more or the time is up."""
    if run.scale.toy:
        run.say("no GPU here: toy sizes, as a smoke test; python -m pytest --benchmark-only measures a CPU")
    reason = unverified(run)
    while run.left > 0:
        row = next(rows, None)
        if row is None:
            return
        if reason and depends_on_stages(row):
            row = {**row, "unverified": reason}
        write([row], run.output)
        add_row(run.folder, {**describe(), **row})
        # A step's kernels are printed as a table.
        if row.get("kernel", "sum") == "sum":
            run.say(line(row))
    rows.close()
    run.say("the time is up")


def line(row: Row) -> str:
    """A row in a line of progress."""
    words = [
        str(row[key]) for key in ("case", "kernel", "layer", "implementation", "mode", "dtype", "shape") if key in row
    ]
    for key, text in FIGURES.items():
        if key in row:
            words.append(text.format(row[key]))
    return "  ".join(words)


def cores() -> int:
    """Cores that this process may use."""
    return available_cores()


def depends_on_stages(row: Mapping[str, Any]) -> bool:
    """Whether a row times the operators that the gate checks, alone or within something larger."""
    if row.get("suite") in ("ceilings", "input", "gate"):
        return False
    if row.get("suite") == "layers":
        return str(row["case"]).startswith("stage")
    return ours(row)


def unverified(run: Run) -> str:
    """Why rows for this project's operators are unverified; empty if they are verified.

    A run without a gate uses the newest gate of the same kernels, machine and versions in the same folder.
    """
    gates = [row for row in run.rows() if row.get("suite") == "gate"]
    if not gates:
        machine = describe()
        same = ("machine", "torch", "triton", "kernels_code")
        for path in sorted(run.output.glob("*.jsonl")):
            for row in complete(path.read_text()):
                if row.get("suite") == "gate" and all(row.get(key) == machine[key] for key in same):
                    # The first row of a gate replaces an earlier gate.
                    gates = [row] if row["case"] == FIRST else [*gates, row]
    # A memory checker that ran out of time tells nothing.
    statuses = [
        str(row["status"]) for row in gates if row["case"] != CHECKER or str(row["status"]).startswith("failed")
    ]
    if any(status.startswith("failed") for status in statuses):
        return "gate failed"
    if not statuses:
        return "gate not run"
    return "" if len(statuses) > 1 and all(status == "passed" for status in statuses) else "gate not finished"
