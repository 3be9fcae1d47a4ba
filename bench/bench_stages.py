"""The paper's stages 1 and 2 (bias, ReLU, normalization by tower, pooling), forward and backward, and rivals."""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import kernels
from net.alexnet import Stage
from net.config import VARIANTS

from .cases import CPU_FORMAT, FORMATS
from .memory import kept_bytes

Row = Callable[..., None]
BATCH = 16
#: What is measured: the implementation chosen, and whether ``torch.compile`` compiles the caller. ``compiled`` is
#: PyTorch's own operators compiled, ``traced`` our formula in the caller's graph.
IMPLEMENTATIONS = {
    "aten": ("aten", False),
    "compiled": ("aten", True),
    "reference": ("reference", False),
    "inductor": ("inductor", False),
    "traced": ("auto", True),
}


@pytest.mark.parametrize(
    ("implementation", "memory_format"),
    [
        pytest.param(name, format, marks=[pytest.mark.long] if compiled or name == "inductor" else [])
        for name, (_, compiled) in IMPLEMENTATIONS.items()
        for format in ("contiguous", "channels_last")
        if format == "channels_last" or name in CPU_FORMAT
    ],
)
def test_paper_stages(benchmark: BenchmarkFixture, row: Row, implementation: str, memory_format: str) -> None:
    """Both stages as the network calls them, a tower at a time, on the CPU in float32."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    plan = VARIANTS["paper"]
    stages, tensors = [], []
    for layer, convolution in zip(plan.layers()[1:4:2], plan.convolutions, strict=False):
        stages.append(Stage(plan, plan.operations(convolution)))
        channels, rows, columns = layer.input_shape
        tower = torch.randn(BATCH, channels // plan.towers, rows, columns) * 20
        towers = [tower.clone(memory_format=FORMATS[memory_format]).requires_grad_() for _ in range(plan.towers)]
        tensors.append((towers, torch.randn(channels, requires_grad=True)))

    def forward() -> list[Tensor]:
        return [
            output
            for stage, (towers, bias) in zip(stages, tensors, strict=True)
            for output in stage(towers, bias, lambda towers: torch.cat(towers, 1))
        ]

    chosen, compile_caller = IMPLEMENTATIONS[implementation]
    run = torch.compile(forward) if compile_caller else forward
    with kernels.implementation(chosen):
        gradients = [torch.randn_like(output) for output in run()]
        benchmark.pedantic(lambda: torch.autograd.backward(run(), gradients), rounds=15, warmup_rounds=3)
        kept = kept_bytes(run, ())
    row(
        suite="kernels",
        case="stages 1 and 2, forward and backward",
        implementation=implementation,
        mode="forward_backward",
        shape=f"{BATCH}x96x55x55 and {BATCH}x256x27x27",
        dtype="float32",
        memory_format=memory_format,
        saved_mib=round(kept / 2**20, 2),
    )
