"""Training steps of whole networks, ours and the alternatives a user has."""

from collections.abc import Iterator
from typing import Any

import torch

import kernels
from net.model.alexnet import AlexNet, Stage
from net.model.forms import untuned, use

from ..cells import updates
from ..measure.records import Row, time_columns
from ..subjects.cases import DTYPES, failure, many_variants
from ..subjects.network import build_any
from ..subjects.steps import Step, prepared, timed
from .run import Job, Rows, Run


def ahead(run: Run) -> Iterator[Job]:
    yield from stage_jobs(run)
    yield from (compiling(run, step) for step in updates(run.scale) if run.scale.toy or step.mode)


def stage_jobs(run: Run) -> Iterator[Job]:
    """Jobs that compile the kernels of the network's stages, one per stage; in sequence they take half a minute."""
    model = build_any(run.scale.network, torch.device("cpu"))
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

        def job(stage: Any = stage, shape: tuple[int, ...] = (run.scale.images, count, *size)) -> None:
            input = torch.randn(shape, device=run.device).to(DTYPES[run.scale.dtype], memory_format=torch.channels_last)
            bias = torch.zeros(shape[1], device=run.device, requires_grad=True)
            with kernels.implementation(run.scale.ours):
                stage.run(input.requires_grad_(), bias).sum().backward()

        yield f"kernels of {name}", job


def rows(run: Run) -> Rows:
    """Steps back to back without synchronization, and synchronized steps."""
    yield from (measured(run, step) for step in updates(run.scale))


def compiling(run: Run, step: Step) -> Job:
    """The job that compiles a step, by its name."""

    def job() -> None:
        with kernels.implementation(step.implementation), many_variants():
            prepared(step, run.device)[0]()

    return step.name, job


def measured(run: Run, step: Step) -> Row:
    """The row of a step, or why there is none."""
    described, work = step.describe()
    run.say(f"measuring {step.name}")
    try:
        with kernels.implementation(step.implementation), many_variants():
            seconds, more = timed(step, run.device, run.samples)
    except Exception as error:  # Any error becomes the row's status.
        return {**described, "status": failure(error)}
    columns = {**time_columns(seconds), **more}
    median = columns["median_us"]
    rate = round(step.images / median * 1e6, 1)
    return {**described, **columns, "images_per_s": rate, **work.columns(median, step.dtype, run.ceilings())}
