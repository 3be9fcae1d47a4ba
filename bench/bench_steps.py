"""Whole training steps and inference: the paper's network, its rivals, and a digits run from its first line."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import kernels
from net import runs, train
from net.config import VARIANTS
from net.device import autocast, peak_memory_mib

from .cases import many_variants
from .ceilings import Ceilings
from .network import PRECISIONS, build, images_and_labels, update_step, whole_work
from .roofline import Work, layers

Row = Callable[..., None]
GPU = torch.cuda.is_available()
#: Network, implementation, how it is compiled, dtype, images.
UPDATES = [
    ("paper", "aten", "eager", "float32", 16),
    ("paper", "auto", "eager", "float32", 16),
    ("paper", "aten", "compiled", "float32", 16),
    ("paper", "auto", "compiled", "float32", 16),
    ("paper", "auto", "compiled", "bfloat16", 16),
    ("one_weird_trick", "aten", "compiled", "float32", 16),
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
    ("paper", "auto", "compiled", "float32", 16),
    ("paper", "auto", "eager", "float32", 1),
]
if GPU:
    FORWARDS = [
        ("paper", implementation, "reduce-overhead", "bfloat16", images)
        for images in (1, 128, 1024)
        for implementation in ("auto", "aten")
    ]


def marked(cells: list[tuple[str, str, str, str, int]]) -> list[object]:
    return [
        pytest.param(*cell, marks=[] if cell[2] == "eager" and (GPU or cell[4] < 128) else [pytest.mark.long])
        for cell in cells
    ]


def _compiled(model: torch.nn.Module, how: str) -> Callable[[Tensor], Tensor]:
    if how == "eager":
        return model
    torch._dynamo.reset()
    return torch.compile(model, mode="default" if how == "compiled" else how, dynamic=False)


def _first_calls(make: Callable[[], Callable[[], object]], how: str) -> tuple[Callable[[], object], dict[str, float]]:
    """A call, and how long its first time took: compiled from nothing, and once more with what was kept on disk."""
    times = []
    for _ in range(1 if how == "eager" else 2):
        call = make()
        begin = time.perf_counter()
        call()
        times.append(round(time.perf_counter() - begin, 2))
    return call, dict(zip(("first_call_s", "first_call_warm_s"), times, strict=False))


def _launched(call: Callable[[], object]) -> dict[str, int]:
    """Kernels that a call launches on a GPU."""
    if not GPU:
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return {"kernels_launched": sum(event.device_type.name == "CUDA" for event in profile.events())}


@pytest.mark.parametrize(("network", "implementation", "how", "dtype", "images"), marked(UPDATES))
def test_update(
    benchmark: BenchmarkFixture,
    row: Row,
    device: torch.device,
    ceilings: Ceilings,
    network: str,
    implementation: str,
    how: str,
    dtype: str,
    images: int,
) -> None:
    """Forward, backward and update."""
    model = build(network, device)
    batch = images_and_labels(network, images, device)
    with kernels.implementation(implementation), many_variants():
        call, columns = _first_calls(lambda: update_step(model, _compiled(model, how), *batch, dtype), how)
        launched = _launched(call)
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        benchmark.pedantic(call, rounds=5 if images > 16 and not GPU else 10, warmup_rounds=2)
    row(
        suite="steps",
        case=f"update of {network}",
        implementation=f"{implementation}, {how}",
        mode="train_step",
        shape=f"{images}x3x{VARIANTS[network].image_size}x{VARIANTS[network].image_size}",
        dtype=dtype,
        memory_format="channels_last",
        images=images,
        work=whole_work(network, images, dtype),
        **({"peak_mib": round(peak_memory_mib(device))} if GPU else {}),
        **launched,
        **columns,
    )


@pytest.mark.parametrize(("network", "implementation", "how", "dtype", "images"), marked(FORWARDS))
def test_inference(
    benchmark: BenchmarkFixture,
    row: Row,
    device: torch.device,
    ceilings: Ceilings,
    network: str,
    implementation: str,
    how: str,
    dtype: str,
    images: int,
) -> None:
    """Logits without a gradient."""
    model = build(network, device).eval()
    batch, _ = images_and_labels(network, images, device)

    def make() -> Callable[[], object]:
        forward = _compiled(model, how)

        def infer() -> Tensor:
            with torch.inference_mode(), autocast(PRECISIONS[dtype], device):
                return forward(batch)

        return infer

    with kernels.implementation(implementation), many_variants():
        call, columns = _first_calls(make, how)
        benchmark.pedantic(call, rounds=10, warmup_rounds=2)
    width = torch.float32.itemsize if dtype == "float32" else torch.bfloat16.itemsize
    work = Work(0, 0)
    for layer in layers(VARIANTS[network], images, width).values():
        work += layer["inference"]
    row(
        suite="steps",
        case=f"inference of {network}",
        implementation=f"{implementation}, {how}",
        mode="inference",
        shape=f"{images}x3x{VARIANTS[network].image_size}x{VARIANTS[network].image_size}",
        dtype=dtype,
        memory_format="channels_last",
        images=images,
        work=work,
        **columns,
    )


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
