"""Training steps of whole networks, ours and the alternatives a user has."""

from collections.abc import Iterator
from typing import Any

import torch

import kernels
from net.model.alexnet import AlexNet, Convolution, Stage, concatenate
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
    for convolution, name in model.trunk:
        if convolution is None or name is None:
            continue
        before, stage = model.get_submodule(convolution), model.get_submodule(name)
        assert isinstance(before, Convolution)
        assert isinstance(stage, Stage)
        if not {"lrn", "pool"} & set(stage.operations):
            continue
        channels, *size = shapes[name]
        # The convolution leaves the towers in one joint tensor or in separate ones.
        tensors = 1 if before.together else model.config.towers
        shape = (run.scale.images, channels // tensors, *size)

        def job(stage: Any = stage, shape: tuple[int, ...] = shape, tensors: int = tensors) -> None:
            dtype = DTYPES[run.scale.dtype]
            made = [torch.randn(shape, device=run.device) for _ in range(tensors)]
            towers = [each.to(dtype, memory_format=torch.channels_last).requires_grad_() for each in made]
            bias = torch.zeros(tensors * shape[1], device=run.device, requires_grad=True)
            with kernels.implementation(run.scale.ours):
                outputs = stage(towers, bias, concatenate)
                torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

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
