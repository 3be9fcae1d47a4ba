"""Updates and inference of whole networks, and of those that a user would pick instead."""

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from net.model.alexnet import AlexNet, Stage
from net.model.forms import untuned, use

from ..cases import DTYPES, failure, many_variants
from ..network import (
    TORCHVISION,
    build_any,
    describe_step,
    images_and_labels,
    inference_step,
    training_step,
    update_step,
)
from ..records import Row, time_columns
from ..roofline import Work
from ..timing import chained_seconds, wall_seconds
from .run import Job, Rows, Run


class Cell(NamedTuple):
    """What is measured: ``what`` is update or inference.

    ``how`` is eager or a mode of ``torch.compile``, with ``, recorded`` behind it where the whole update is recorded as
    a CUDA graph, as net.train does; ``recorded`` alone is the eager network's, and ``unrecorded`` the same kernels
    launched by the host.
    """

    what: str
    network: str
    implementation: str
    how: str
    dtype: str
    images: int

    def describe(self) -> tuple[Row, Work]:
        return describe_step(self.what, self.network, self.implementation, self.how, self.dtype, self.images)

    @property
    def mode(self) -> str:
        """The mode of ``torch.compile``; empty where nothing is compiled."""
        mode, _, _ = self.how.partition(", ")
        return "" if mode in ("eager", "recorded", "unrecorded") else mode

    @property
    def name(self) -> str:
        return f"{self.what} of {self.network}, {self.implementation}, {self.how}, {self.dtype}, {self.images}"


def cells(run: Run) -> list[Cell]:
    """Updates, in order of value."""
    network, ours, compiled, dtype, images = run.network, run.ours, run.compiled, run.dtype, run.images
    if run.toy:
        pairs = ((ours, run.best), ("aten", compiled))
        return [Cell("update", network, name, how, dtype, images) for name, how in pairs]
    large = 1024
    best = "max-autotune-no-cudagraphs, recorded"
    found = [
        Cell("update", network, ours, "recorded", dtype, images),
        Cell("update", network, ours, "recorded", dtype, large),
        Cell("update", network, "aten", compiled, dtype, images),
    ]
    torchvision = importlib.util.find_spec("torchvision") is not None
    if torchvision:
        found += [Cell("update", TORCHVISION, "aten", how, dtype, images) for how in (compiled, best)]
    found += [
        Cell("update", network, "aten", compiled, dtype, large),
        Cell("update", network, ours, "recorded", "float32", images),
    ]
    if torchvision:
        found += [Cell("update", TORCHVISION, "aten", how, dtype, large) for how in (compiled, best)]
    found += [
        Cell("update", network, ours, "eager", dtype, images),
        Cell("update", network, "aten", "eager", dtype, images),
        Cell("update", network, ours, compiled, dtype, images),
        Cell("update", network, "aten", compiled, "float32", images),
        Cell("update", "one_weird_trick", "aten", compiled, dtype, images),
    ]
    return found


def ahead(run: Run) -> Iterator[Job]:
    yield from stage_jobs(run)
    yield from (compiling(run, cell) for cell in cells(run) if run.toy or cell.mode)


def stage_jobs(run: Run) -> Iterator[Job]:
    """Compile the kernels of the network's stages, a job for each: one after the other they take half a minute."""
    model = build_any(run.network, torch.device("cpu"))
    assert isinstance(model, AlexNet)
    use(model, untuned(model, run.device))
    shapes = {layer.name: layer.input_shape for layer in model.config.layers()}
    for _, name in model.trunk:
        if name is None:
            continue
        stage = model.get_submodule(name)
        assert isinstance(stage, Stage)
        if not {"lrn", "pool"} & set(stage.operations):
            continue
        channels, *size = shapes[name]
        count = channels if stage.joint > 1 or stage.across_towers else channels // model.config.towers

        def job(stage: Any = stage, shape: tuple[int, ...] = (run.images, count, *size)) -> None:
            input = torch.randn(shape, device=run.device).to(DTYPES[run.dtype], memory_format=torch.channels_last)
            bias = torch.zeros(shape[1], device=run.device, requires_grad=True)
            with kernels.implementation(run.ours):
                stage.run(input.requires_grad_(), bias).sum().backward()

        yield f"kernels of {name}", job


def rows(run: Run) -> Rows:
    """Updates chained without a synchronisation, and synchronised ones beside."""
    yield from (measured(run, cell) for cell in cells(run))


def compiling(run: Run, cell: Cell) -> Job:
    """The job that compiles a cell, by its name."""

    def job() -> None:
        with kernels.implementation(cell.implementation), many_variants():
            prepared(run, cell)[0]()

    return cell.name, job


def compiled(model: Any, mode: str) -> Callable[[Tensor], Tensor]:
    """A network, called eagerly or compiled from nothing but what is on disk."""
    torch._dynamo.reset()
    return torch.compile(model, mode=mode, dynamic=False) if mode else model


def prepared(run: Run, cell: Cell) -> tuple[Callable[[], object], torch.nn.Module]:
    """The call that is measured, and its network."""
    model = build_any(cell.network, run.device).train(cell.what == "update")
    forward = compiled(model, cell.mode)
    images, labels = images_and_labels(cell.network, cell.images, run.device)
    if cell.how.endswith("recorded"):
        record = run.cuda and not cell.how.endswith("unrecorded")
        return training_step(model, forward, images, labels, cell.dtype, record=record), model
    if cell.what == "update":
        return update_step(model, forward, images, labels, cell.dtype), model
    return inference_step(forward, images, cell.dtype), model


def measured(run: Run, cell: Cell) -> Row:
    """The row of a cell, or why there is none."""
    described, work = cell.describe()
    run.say(f"measuring {cell.name}")
    try:
        with kernels.implementation(cell.implementation), many_variants():
            columns = times(run, cell)
    except Exception as error:  # Whatever it is becomes the row's status.
        return {**described, "status": failure(error)}
    median = columns["median_us"]
    rate = round(cell.images / median * 1e6, 1)
    return {**described, **columns, "images_per_s": rate, **work.columns(median, cell.dtype, run.ceilings())}


def times(run: Run, cell: Cell) -> dict[str, Any]:
    """The columns that are measured of a cell."""
    begin = time.perf_counter()
    call, _ = prepared(run, cell)
    call()
    if not run.cuda:
        return {**time_columns(wall_seconds(call, run.samples, 1))}
    torch.cuda.synchronize()
    first = round(time.perf_counter() - begin, 1)
    torch.cuda.reset_peak_memory_stats()
    # The second call may record a graph.
    columns: dict[str, Any] = time_columns(chained_seconds(call, run.samples, warmup=10))
    synchronized = time_columns(wall_seconds(call, run.samples))["median_us"]
    peak = round(torch.cuda.max_memory_allocated() / 2**20)
    return {**columns, "synchronized_us": synchronized, "peak_mib": peak, "first_call_warm_s": first}
