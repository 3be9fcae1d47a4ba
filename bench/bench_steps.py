"""Whole training steps and inference: the paper's network, its rivals, and a complete digits run."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import kernels
from net import train
from net.training import runs

from .cells import here, inference, updates
from .measure.ceilings import Ceilings, lacking
from .measure.memory import kept_bytes
from .measure.timing import Call, synchronized
from .subjects.cases import DTYPES, many_variants
from .subjects.network import images_and_labels, training_loss
from .subjects.steps import Step, prepared, timed

Row = Callable[..., None]
Together = Callable[..., list[dict[str, Any]]]
Say = Callable[[str], None]
SCALE = here()
#: On a CPU: minimum and maximum rounds of a task's networks, and the approximate seconds per network.
ROUNDS = (3, 10)
SECONDS = 4.0
#: On a GPU: the number of steps timed back to back.
SAMPLES = 30
#: Seconds per step, and its other columns.
Times = tuple[list[float], dict[str, Any]]


def marked() -> list[object]:
    """The cells of :func:`test_step`; ``--quick`` omits compiled ones and, on a CPU, large batches."""

    def long(cell: Step) -> bool:
        return bool(cell.mode) or (cell.images > SCALE.images and not SCALE.cuda)

    def marks(cell: Step) -> list[pytest.MarkDecorator]:
        ahead = [pytest.mark.ahead("step", *cell)] if cell.mode else []
        return [*ahead, *([pytest.mark.long] if long(cell) else [])]

    return [pytest.param(*cell, marks=marks(cell)) for cell in (*updates(SCALE), *inference(SCALE))]


class Rival(NamedTuple):
    """A network after its first calls: the call, its operators' implementation, and columns from the first calls."""

    call: Call
    implementation: str
    columns: dict[str, float]

    def __call__(self) -> None:
        with kernels.implementation(self.implementation), many_variants():
            self.call()


def ready(step: Step, device: torch.device) -> Rival:
    """A network, built and called for the first time, which compiles it or reads it from Inductor's cache."""
    with kernels.implementation(step.implementation), many_variants():
        call, model = prepared(step, device)
        begin = synchronized()
        call()
        # Compiled networks have been compiled ahead. How long that took depends on what compiled alongside.
        columns = {"first_call_warm_s" if step.mode else "first_call_s": round(synchronized() - begin, 2)}
        if step.what == "update" and not step.mode:
            # The parameters exist anyway.
            images, labels = images_and_labels(step.network, step.images, device)
            kept = kept_bytes(lambda: training_loss(model, images, labels, step.dtype), list(model.parameters()))
            columns["saved_mib"] = round(kept / 2**20, 1)
    return Rival(call, step.implementation, columns)


@cache
def in_turns(steps: tuple[Step, ...], device: torch.device, say: Say) -> dict[Step, Times | Exception]:
    """Measurements of networks interleaved on a CPU, by cell; or the error."""
    what = f"{steps[0].what} of {steps[0].images} images in {steps[0].dtype}"
    rivals: dict[Step, Rival] = {}
    found: dict[Step, Times | Exception] = {}
    for step in steps:
        say(f"{what}: the first of {step.network}, {step.implementation}, {step.how}")
        try:
            rivals[step] = ready(step, device)
        except Exception as error:  # Only its own benchmark fails; the others continue.
            found[step] = error
    for step, rival in rivals.items():
        if step.mode:
            # Compiling the next network has reset this network's compiled code.
            rival()
    times: dict[Step, list[float]] = {step: [] for step in rivals}
    rounds, round_seconds = ROUNDS[1], 0.0
    while rivals and (done := len(times[next(iter(rivals))])) < rounds:
        left = f", about {round_seconds * (rounds - done):.0f} s left" if done else ""
        say(f"{what}: {len(rivals)} interleaved, round {done + 1} of at most {rounds}{left}")
        for step, rival in rivals.items():
            begin = synchronized()
            rival()
            times[step].append(synchronized() - begin)
        round_seconds = sum(each[0] for each in times.values())
        rounds = max(ROUNDS[0], min(ROUNDS[1], round(SECONDS * len(rivals) / round_seconds)))
    return found | {step: (times[step], rival.columns) for step, rival in rivals.items()}


def on_a_gpu(step: Step, device: torch.device, say: Say) -> Times:
    """Measured as in the device suite: steps back to back, one network after another."""
    say(step.name)
    with kernels.implementation(step.implementation), many_variants():
        return timed(step, device, SAMPLES)


@pytest.mark.parametrize(Step._fields, marked())
@pytest.mark.usefixtures("compiled_ahead")
def test_step(
    together: Together,
    replay: Callable[[list[float]], None],
    row: Row,
    device: torch.device,
    ceilings: Ceilings,
    say: Say,
    what: str,
    network: str,
    implementation: str,
    how: str,
    dtype: str,
    images: int,
) -> None:
    """An update is forward, backward and the optimizer; inference is logits without a gradient. On a CPU, networks with
    the same images and dtype run interleaved."""
    step = Step(what, network, implementation, how, dtype, images)
    described, work = step.describe()
    row(**described, work=work)
    if reason := lacking(DTYPES[dtype], device):
        row(status=reason)
        pytest.skip(reason)
    if SCALE.cuda:
        times, columns = on_a_gpu(step, device, say)
    else:
        cells = together(test_step, {"what": what, "dtype": dtype, "images": images})
        found = in_turns(tuple(Step(**cell) for cell in cells), device, say)[step]
        if isinstance(found, Exception):
            raise found
        times, columns = found
    replay(times)
    row(**columns)


@pytest.mark.slow
def test_digits_run(benchmark: BenchmarkFixture, row: Row, tmp_path: Path) -> None:
    """``python -m net.train`` without flags, from start to finish."""
    status = benchmark.pedantic(train.main, (["--output-dir", str(tmp_path / "run")],), rounds=1)
    assert status == 0
    last = runs.read_metrics(tmp_path / "run")[-1]
    row(
        suite="steps",
        case="digits, a whole run",
        mode="train",
        shape="64x3x32x32",
        dtype="float32",
        updates=last["step"],
        top1_accuracy_percent=round(100 - last["top1_error_percent"], 2),
    )
