"""Whole training steps and inference: the paper's network, its rivals, and a digits run from its first line."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import kernels
from net import runs, train
from net.device import peak_memory_mib

from .cases import many_variants
from .ceilings import Ceilings
from .memory import kept_bytes
from .network import build, describe_step, images_and_labels, inference_step, training_loss, update_step
from .timing import Call, kernels_launched, synchronized

Row = Callable[..., None]
GPU = torch.cuda.is_available()
#: Network, implementation, how it is compiled, dtype, images. To compile the whole network takes two cores a minute and
#: a half; on a CPU that is done for one rival and for ours.
UPDATES = [
    ("paper", "aten", "eager", "float32", 16),
    ("paper", "auto", "eager", "float32", 16),
    ("paper", "aten", "compiled", "float32", 16),
    ("paper", "auto", "compiled", "float32", 16),
    ("paper", "auto", "eager", "bfloat16", 16),
    ("one_weird_trick", "aten", "eager", "float32", 16),
    ("paper", "aten", "eager", "float32", 128),
    ("paper", "auto", "eager", "float32", 128),
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
        pytest.param(*cell, marks=[] if cell[3] == "eager" and (GPU or cell[5] < 128) else [pytest.mark.long])
        for cell in cells
    ]


def _compiled(model: torch.nn.Module, how: str) -> Callable[[Tensor], Tensor]:
    if how == "eager":
        return model
    torch._dynamo.reset()
    return torch.compile(model, mode="default" if how == "compiled" else how, dynamic=False)


def _first_calls(
    make: Callable[[], tuple[Call, Callable[[], int] | None]], how: str
) -> tuple[Call, Callable[[], int] | None, dict[str, float]]:
    """What is made, and how long its first call took: compiled from nothing, and once more with what is on disk."""
    times = []
    for _ in range(1 if how == "eager" else 2):
        call, kept = make()
        begin = synchronized()
        call()
        times.append(round(synchronized() - begin, 2))
    return call, kept, dict(zip(("first_call_s", "first_call_warm_s"), times, strict=False))


@pytest.mark.parametrize(("what", "network", "implementation", "how", "dtype", "images"), marked())
def test_step(
    benchmark: BenchmarkFixture,
    row: Row,
    device: torch.device,
    ceilings: Ceilings,
    what: str,
    network: str,
    implementation: str,
    how: str,
    dtype: str,
    images: int,
) -> None:
    """An update is forward, backward and the optimizer; inference is logits without a gradient."""
    batch, labels = images_and_labels(network, images, device)

    def make() -> tuple[Call, Callable[[], int] | None]:
        model = build(network, device)
        if what == "inference":
            return inference_step(_compiled(model.eval(), how), batch, dtype), None
        forward = _compiled(model, how)
        # Of what is kept for backward the parameters are no part: they are there anyway.
        count = partial(kept_bytes, lambda: training_loss(forward, batch, labels, dtype), list(model.parameters()))
        return update_step(model, forward, batch, labels, dtype), count

    with kernels.implementation(implementation), many_variants():
        call, kept, columns = _first_calls(make, how)
        if GPU:
            columns["kernels_launched"] = kernels_launched(call)
            torch.cuda.reset_peak_memory_stats()
        benchmark.pedantic(
            call, rounds=3 if images > 16 and not GPU else 10, warmup_rounds=1 if images > 16 and not GPU else 2
        )
        if GPU:
            columns["peak_mib"] = round(peak_memory_mib(device))
        if kept is not None and how == "eager":
            columns["saved_mib"] = round(kept() / 2**20, 1)
    described, work = describe_step(what, network, implementation, how, dtype, images)
    row(**described, work=work, **columns)


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
