"""Where a training step's time goes, kernel by kernel."""

import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import kernels
from net.common.files import atomic_write

from ..cells import profiled as profiled_steps
from ..measure.records import Row, time_columns
from ..measure.timing import chained_seconds
from ..subjects.cases import failure, many_variants
from ..subjects.network import plan_of
from ..subjects.steps import Step, prepared
from . import steps
from .run import Job, Rows, Run
from .summary import between
from .trace import Event, Launch, Line, Shapes, launches, table, updates, with_layers

#: Steps that count, and warm-up steps before them: the profiler may lose the first kernels of a trace.
COUNTED, BEFORE = 10, 3
#: Number of printed lines of the table.
PRINTED = 40


def uncaptured(cell: Step) -> Step:
    """The same kernels, each launched by the host."""
    return cell._replace(how=cell.how.replace("recorded", "unrecorded"))


def ahead(run: Run) -> Iterator[Job]:
    yield from steps.stage_jobs(run)
    for cell in profiled_steps(run.scale):
        if run.scale.toy or cell.mode:
            # The uncaptured step runs the same compiled code.
            yield steps.compiling(run, cell)


def rows(run: Run) -> Rows:
    """For each network, one row per kernel and layer, the most expensive first, and one for their sum."""
    for cell in profiled_steps(run.scale):
        described = {**cell.describe()[0], "suite": "profile"}
        run.say(f"profiling {cell.name}")
        try:
            with kernels.implementation(cell.implementation), many_variants():
                found, columns = profiled(run, cell)
        except Exception as error:  # Any error becomes the row's status, and the other networks continue.
            yield {**described, "kernel": "sum", "status": failure(error)}
            continue
        print(text(cell.name, found, columns), flush=True)
        wall = columns["wall_us"]
        for line in found:
            yield {
                **described,
                "kernel": line.kernel,
                "layer": line.layer,
                "launches_per_step": round(line.launches, 2),
                "us_per_step": round(line.microseconds, 2),
                "percent_of_step": round(100 * line.microseconds / wall, 2),
            }
        yield {**described, "kernel": "sum", **columns}


def profiled(run: Run, cell: Step) -> tuple[list[Line], dict[str, Any]]:
    """The kernels of a step, and their sum."""
    shapes = Shapes(plan_of(cell.network), cell.images)
    # Uncaptured first: a profiler that has recorded kernels before the first capture also sees those of graphs
    # (PyTorch pull request 100441). An empty session is said to have the same effect, but left other processes
    # without any kernels.
    call, _ = prepared(uncaptured(cell), run.device)
    for _ in range(3 if run.cuda else 1):
        call()
    events = traced(run, call, 1 + BEFORE if run.cuda else 1, f"{cell.network}-{cell.implementation}-uncaptured")
    known = launches(events, shapes)
    if run.cuda:
        known = next(iter(updates(known, 1)), [])
    known = placed(shapes, known)
    replayed: list[list[Launch]] = []
    if run.cuda:
        del call
        call, _ = prepared(cell, run.device)
    wall = time_columns(chained_seconds(call, run.samples, warmup=10 if run.cuda else 1))["median_us"]
    if run.cuda:
        events = traced(run, call, BEFORE + COUNTED, f"{cell.network}-{cell.implementation}")
        replayed = updates(launches(events, shapes), COUNTED)
    if not known and not replayed:
        raise RuntimeError("the profiler saw no kernels")
    captured = bool(replayed)
    found: list[Launch] = []
    for update in replayed or [known]:
        found += placed(shapes, with_layers(update, known))
    lines = table(found, len(replayed) or 1)
    total = sum(line.microseconds for line in lines)
    columns: dict[str, Any] = {
        "launches_per_step": round(sum(line.launches for line in lines), 2),
        "us_per_step": round(total, 2),
        "wall_us": wall,
        # None where kernels overlap.
        **({"gaps_us": round(wall - total, 2)} if wall >= total else {}),
        "percent_of_step": round(100 * total / wall, 2),
    }
    if run.cuda:
        columns |= {"updates": len(replayed) or 1, "captured": captured}
    return lines, columns


def placed(shapes: Shapes, update: list[Launch]) -> list[Launch]:
    """The kernels of a step, each in one layer."""
    layers = shapes.placed(update)
    return [launch._replace(layers=frozenset({layer})) for launch, layer in zip(update, layers, strict=True)]


def traced(run: Run, call: Callable[[], object], count: int, name: str) -> list[Event]:
    """The events of calls, on a GPU with a marker before each and after the last; keeps the trace for Perfetto."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        for _ in range(count):
            mark(run)
            call()
        mark(run)
        if run.cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(plain))
        content = plain.read_bytes()
    run.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(run.output / f"trace-{name}.json.gz") as file:
        file.write(gzip.compress(content, 5))
    events: list[Event] = json.loads(content)["traceEvents"]
    return events


def mark(run: Run) -> None:
    """A kernel that nothing else launches."""
    if run.cuda:
        torch.cuda._sleep(1)


def text(name: str, found: list[Line], columns: Row) -> str:
    """The table that is printed."""
    lines = [name, f"  {'us a step':>10} {'%':>5} {'launches':>8}  {'layer':9} kernel"]
    wall = columns["wall_us"]
    for line in found[:PRINTED]:
        share = 100 * line.microseconds / wall
        lines.append(
            f"  {line.microseconds:>10,.1f} {share:>5.1f} {line.launches:>8,.1f}  {line.layer:9} {line.kernel}"
        )
    if rest := found[PRINTED:]:
        microseconds, count = sum(line.microseconds for line in rest), sum(line.launches for line in rest)
        share = 100 * microseconds / wall
        lines.append(f"  {microseconds:>10,.1f} {share:>5.1f} {count:>8,.1f}  {len(rest)} more kernels")
    lines.append(
        f"  {columns['us_per_step']:,.1f} us in {columns['launches_per_step']:,.0f} kernels of {wall:,.1f} us from one "
        f"update to the next; {between(columns)}"
    )
    by_layer: dict[str, float] = {}
    for line in found:
        by_layer[line.layer] = by_layer.get(line.layer, 0.0) + line.microseconds
    shares = [
        f"{layer} {microseconds:,.0f}" for layer, microseconds in sorted(by_layer.items(), key=lambda item: -item[1])
    ]
    lines.append("  by layer, us: " + ", ".join(shares))
    return "\n".join(lines)
