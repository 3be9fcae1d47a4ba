"""``torch.compile(fullgraph=True)`` of operators, modules and networks: no graph breaks with static or dynamic shapes
and numbers, and no needless recompilation for another batch size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernels
from net.model.alexnet import alexnet

NUMBERS = (5, 1e-3, 0.75, 2.0)
OPERATORS: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "local_response_norm": (kernels.local_response_norm, NUMBERS),
    "relu_local_response_norm": (kernels.relu_local_response_norm, NUMBERS),
    "max_pool2d": (kernels.max_pool2d, (3, 2, 1)),
    "relu_max_pool2d": (kernels.relu_max_pool2d, (3, 2, 1)),
    "relu_lrn_max_pool2d": (kernels.relu_lrn_max_pool2d, NUMBERS),
    "LocalResponseNorm": (kernels.LocalResponseNorm(*NUMBERS), ()),
    "ReLULocalResponseNorm": (kernels.ReLULocalResponseNorm(*NUMBERS), ()),
    "MaxPool2d": (kernels.MaxPool2d(3, 2), ()),
    "ReLUMaxPool2d": (kernels.ReLUMaxPool2d(3, 2), ()),
    "ReLULRNMaxPool2d": (kernels.ReLULRNMaxPool2d(*NUMBERS), ()),
}
SHAPES = ("static", "dynamic", "automatic", "mark_dynamic")
MODES = ("default", "reduce-overhead", "max-autotune")


def check(run: Callable[..., Tensor], arguments: tuple[Any, ...], images: Tensor, shapes: str, **options: Any) -> int:
    """Compile ``run`` and compare with eager at batch sizes from 2 to that of ``images``; returns the number of
    compilations."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    dynamic = {"static": False, "dynamic": True}.get(shapes)
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, **options)
    for count in range(2, len(images) + 1):
        input = images[:count].clone().requires_grad_()
        if shapes == "mark_dynamic":
            torch._dynamo.mark_dynamic(input, 0)
        results = []
        for each in (compiled, run):
            output = each(input, *arguments)
            results.append((output, *torch.autograd.grad(output.square().sum(), input)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def stage_images() -> Tensor:
    return torch.randn(4, 8, 9, 9, generator=torch.Generator().manual_seed(0))


def test_numbers_may_be_symbols() -> None:
    """Checks all arguments of one operator; the other operators and kinds of shapes are slow tests. Each new number
    recompiles."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = kernels.relu_lrn_max_pool2d
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    for count, numbers in ((2, NUMBERS), (3, NUMBERS), (3, (3, 0.5, 1, 2.0))):
        input = stage_images()[:count]
        torch.testing.assert_close(compiled(input, *numbers), run(input, *numbers))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_and_modules(name: str, shapes: str) -> None:
    compilations = check(*OPERATORS[name], stage_images(), shapes, backend="aot_eager")
    assert compilations == {"static": 3, "automatic": 2}.get(shapes, 1)


def digits() -> nn.Module:
    torch.manual_seed(0)
    return alexnet("digits", dropout=0.0)


def fused() -> nn.Module:
    chain = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(*NUMBERS), nn.MaxPool2d(3, 2))
    return kernels.fuse(nn.Sequential(nn.Sequential(*chain), nn.Flatten()))


@pytest.mark.slow
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("network", [digits, fused])
def test_networks(network: Callable[[], nn.Module], shapes: str) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    check(network(), (), images, shapes, backend="eager")


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, shapes: str) -> None:
    """Graph breaks occur before Inductor, so one operator stands for all."""
    check(*OPERATORS["relu_lrn_max_pool2d"], stage_images(), shapes, mode=mode)


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("shapes", SHAPES[:2])
@pytest.mark.parametrize("mode", MODES)
def test_whole_networks_in_each_mode(mode: str, shapes: str) -> None:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    check(digits(), (), images, shapes, mode=mode)
