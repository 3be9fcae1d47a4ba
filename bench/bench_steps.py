"""Whole training steps and inference: the paper's network, its rivals, and a digits run from its first line."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import kernels
from net import train
from net.common.device import peak_memory_mib
from net.training import runs

from .cases import DTYPES, many_variants
from .ceilings import Ceilings, lacking
from .memory import kept_bytes
from .network import build, describe_step, images_and_labels, inference_step, training_loss, update_step
from .timing import Call, kernels_launched, synchronized

Row = Callable[..., None]
Together = Callable[..., list[dict[str, Any]]]
Say = Callable[[str], None]
GPU = torch.cuda.is_available()
#: Rounds of a task's networks, and seconds that they share, so many for each: a batch of 64 takes a CPU several.
ROUNDS = (3, 10)
SECONDS = 5.0
#: Network, implementation, how it is compiled, dtype, images. To compile the whole network takes two cores a minute and
#: a half; on a CPU that is done for one rival and for ours.
UPDATES = [
    ("paper", "aten", "eager", "float32", 16),
    ("paper", "auto", "eager", "float32", 16),
    ("paper", "aten", "compiled", "float32", 16),
    ("paper", "auto", "compiled", "float32", 16),
    ("paper", "auto", "eager", "bfloat16", 16),
    ("one_weird_trick", "aten", "eager", "float32", 16),
    ("paper", "aten", "eager", "float32", 64),
    ("paper", "auto", "eager", "float32", 64),
]
if GPU:
    UPDATES = [
        (network, implementation, how, dtype, images)
        for images in (128, 256, 1024)
        for dtype in ("bfloat16", "float32")
        for network, implementation, how in (
            ("paper", "auto", "reduce-overhead"),
            ("paper", "aten", "reduce-overhead"),
            ("paper", "auto", "eager"),
            ("paper", "aten", "eager"),
            ("one_weird_trick", "aten", "reduce-overhead"),
        )
    ]
#: Inference: network, implementation, how, dtype, images.
FORWARDS = [
    ("paper", "aten", "eager", "float32", 16),
    ("paper", "auto", "eager", "float32", 16),
    ("paper", "auto", "eager", "float32", 1),
]
if GPU:
    FORWARDS = [
        ("paper", implementation, "reduce-overhead", "bfloat16", images)
        for images in (1, 128, 1024)
        for implementation in ("auto", "aten")
    ]


def marked() -> list[object]:
    """The cells of :func:`test_step`; ``--quick`` leaves out those that are compiled, and on a CPU large batches."""
    cells = [("update", *cell) for cell in UPDATES] + [("inference", *cell) for cell in FORWARDS]
    return [
        pytest.param(*cell, marks=[] if cell[3] == "eager" and (GPU or cell[5] < 64) else [pytest.mark.long])
        for cell in cells
    ]


def _compiled(model: torch.nn.Module, how: str) -> Callable[[Tensor], Tensor]:
    if how == "eager":
        return model
    return torch.compile(model, mode="default" if how == "compiled" else how, dynamic=False)


class Rival(NamedTuple):
    """A network whose first calls are over, what they showed, and whose operators it calls."""

    call: Call
    implementation: str
    columns: dict[str, float]

    def __call__(self) -> None:
        with kernels.implementation(self.implementation), many_variants():
            self.call()


def _ready(task: tuple[str, str, int], name: tuple[str, str, str], device: torch.device) -> Rival:
    """A network, built and called for the first time: compiled from nothing, and once more with what is on disk."""
    what, dtype, images = task
    network, implementation, how = name
    batch, labels = images_and_labels(network, images, device)
    others = torch.cuda.memory_allocated() if GPU else 0

    def make() -> tuple[Call, Callable[[], int] | None]:
        model = build(network, device)
        if what == "inference":
            return inference_step(_compiled(model.eval(), how), batch, dtype), None
        forward = _compiled(model, how)
        # Of what is kept for backward the parameters are no part: they are there anyway.
        count = partial(kept_bytes, lambda: training_loss(forward, batch, labels, dtype), list(model.parameters()))
        return update_step(model, forward, batch, labels, dtype), count

    times = []
    with kernels.implementation(implementation), many_variants():
        for _ in range(1 if how == "eager" else 2):
            if how != "eager":
                # Or the second one finds what is in memory. Rivals compiled before are called once more later.
                torch._dynamo.reset()
            call, kept = make()
            begin = synchronized()
            call()
            times.append(round(synchronized() - begin, 2))
        columns = dict(zip(("first_call_s", "first_call_warm_s"), times, strict=False))
        if GPU:
            # The second call may record a graph, which takes the memory that later ones replay in.
            torch.cuda.reset_peak_memory_stats()
            call()
            call()
            columns["peak_mib"] = round(peak_memory_mib(device) - others / 2**20)
            columns["kernels_launched"] = kernels_launched(call)
        if kept is not None and how == "eager":
            columns["saved_mib"] = round(kept() / 2**20, 1)
    return Rival(call, implementation, columns)


@cache
def measured(
    task: tuple[str, str, int], names: tuple[tuple[str, str, str], ...], device: torch.device, say: Say
) -> dict[tuple[str, str, str], tuple[list[float], dict[str, float]] | Exception]:
    """Seconds of one step of each network, sampled in turns, and what else is known of it; or why it has none."""
    what = f"{task[0]} of {task[2]} images in {task[1]}"
    rivals: dict[tuple[str, str, str], Rival] = {}
    found: dict[tuple[str, str, str], tuple[list[float], dict[str, float]] | Exception] = {}
    for name in names:
        compiles = "" if name[2] == "eager" else ", which takes a minute or two to compile"
        say(f"{what}: the first of {', '.join(name)}{compiles}")
        try:
            rivals[name] = _ready(task, name, device)
        except Exception as error:  # It fails its own benchmark; the others go on.
            found[name] = error
    for name, rival in rivals.items():
        if name[2] != "eager":
            # What is compiled anew may record a graph with the second call, which is none of the times.
            for _ in range(3 if GPU else 1):
                rival()
    times: dict[tuple[str, str, str], list[float]] = {name: [] for name in rivals}
    rounds, round_seconds = ROUNDS[1], 0.0
    while rivals and (done := len(times[next(iter(rivals))])) < rounds:
        left = f", about {round_seconds * (rounds - done):.0f} s left" if done else ""
        say(f"{what}: {len(rivals)} in turns, round {done + 1} of at most {rounds}{left}")
        for name, rival in rivals.items():
            begin = synchronized()
            rival()
            times[name].append(synchronized() - begin)
        round_seconds = sum(each[0] for each in times.values())
        rounds = max(ROUNDS[0], min(ROUNDS[1], round(SECONDS * len(rivals) / round_seconds)))
    return found | {name: (times[name], rival.columns) for name, rival in rivals.items()}


@pytest.mark.parametrize(("what", "network", "implementation", "how", "dtype", "images"), marked())
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
    """An update is forward, backward and the optimizer; inference is logits without a gradient. Networks with the same
    images and dtype take turns."""
    described, work = describe_step(what, network, implementation, how, dtype, images)
    row(**described, work=work)
    if reason := lacking(DTYPES[dtype], device):
        row(status=reason)
        pytest.skip(reason)
    task = {"what": what, "dtype": dtype, "images": images}
    names = tuple((cell["network"], cell["implementation"], cell["how"]) for cell in together(test_step, task))
    found = measured((what, dtype, images), names, device, say)[network, implementation, how]
    if isinstance(found, Exception):
        raise found
    times, columns = found
    replay(times)
    row(**columns)


@pytest.mark.slow
def test_digits_run(benchmark: BenchmarkFixture, row: Row, tmp_path: Path) -> None:
    """``python -m net.train`` without flags, from its first line to its last."""
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
