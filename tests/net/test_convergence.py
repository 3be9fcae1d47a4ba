"""Training with this package's operators equals training with PyTorch's own."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import aten
from net.data import digits
from net.model.alexnet import AlexNet, alexnet
from net.training.config import TrainConfig
from net.training.recipe import PaperSGD, Schedule, parameter_groups

STEPS = 20
BATCH = 8


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    """Mean-subtracted digits, [BATCH, 3, 32, 32] in float64, and labels, for each step."""
    data = digits.load()
    order = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.train.images).permute(0, 3, 1, 2).double() - torch.from_numpy(data.mean).permute(
        2, 0, 1
    )
    labels = torch.from_numpy(data.train.labels)
    return [(images[part], labels[part]) for part in order.split(BATCH)[:STEPS]]


def network(dtype: torch.dtype) -> AlexNet:
    """The paper's layers for 32x32 images, with both towers; LRN's window sums are as large as k."""
    torch.manual_seed(0)
    return alexnet("digits", dropout=0.0, lrn_alpha=0.05).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def train(
    model: AlexNet, implementation: str, batches: list[tuple[Tensor, Tensor]], compiled: bool = False
) -> list[Tensor]:
    """The loss of each batch's update, then the final weights."""
    model = copy.deepcopy(model)
    recipe = TrainConfig()
    optimizer = PaperSGD(parameter_groups(model, recipe), recipe.lr, recipe.momentum, recipe.weight_decay)
    Schedule(recipe).apply(optimizer)
    dtype = model.fc8.weight.dtype  # type: ignore[union-attr]
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model
    losses = []
    with kernels.implementation(implementation):
        for images, labels in batches:
            optimizer.zero_grad()
            images = images.to(dtype).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(forward(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return [torch.stack(losses), *(parameter.detach() for parameter in model.parameters())]


def gradients(model: AlexNet, implementation: str, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss and gradients of one step, in float64."""
    parameters = list(model.parameters())
    images = images.to(parameters[0].dtype).contiguous(memory_format=torch.channels_last)
    with kernels.implementation(implementation):
        loss = F.cross_entropy(model(images).float() if images.dtype != torch.float64 else model(images), labels)
        found = torch.autograd.grad(loss, parameters)
    return [tensor.detach().double() for tensor in (loss, *found)]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference between corresponding tensors, relative to the tensor's norm."""
    return max(
        float((one.double() - other.double()).norm() / other.double().norm())
        for one, other in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.compiles, pytest.mark.timeout(900)])]
)
def test_in_float64_nothing_but_rounding_differs(batches: list[tuple[Tensor, Tensor]], compiled: bool) -> None:
    model = network(torch.float64)
    ours, theirs = (train(model, *how) for how in (("auto", batches[:10], compiled), ("aten", batches[:10])))
    assert ours[0][-1] < ours[0][0], "it learns"
    assert distance(ours, theirs) < 1e-9


def test_the_first_step_in_float32(batches: list[tuple[Tensor, Tensor]]) -> None:
    """Within the sum of 32 half ulps for each of eight layers, and not much further from float64 than PyTorch."""
    exact = gradients(network(torch.float64), "aten", *batches[0])
    ours, theirs = (gradients(network(torch.float32), name, *batches[0]) for name in ("reference", "aten"))
    assert distance(ours, exact) < 8 * 32 * 2**-24
    assert distance(ours, exact) < 2 * distance(theirs, exact)


def test_the_first_step_in_bfloat16(batches: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not much further from float64, with the same weights, than PyTorch's operators.

    Those run in float32 and round once, too, because PyTorch's own normalization does not support bfloat16 on a CPU.
    """
    model = network(torch.bfloat16)
    images = batches[0][0].bfloat16().double()
    exact = gradients(copy.deepcopy(model).double(), "aten", images, batches[0][1])
    ours = gradients(model, "reference", images, batches[0][1])
    forward = aten.forward

    def in_float32(input: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
        return forward(input.float(), None if bias is None else bias.float(), *parts).to(input.dtype)

    monkeypatch.setattr(aten, "forward", in_float32)
    theirs = gradients(model, "aten", images, batches[0][1])
    assert 2**-9 < distance(ours, exact) < 1.25 * distance(theirs, exact)


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_float32_drifts_no_further_than_pytorch_from_itself(batches: list[tuple[Tensor, Tensor]]) -> None:
    """After 20 updates, compared with PyTorch's own operators started from weights perturbed by rounding."""
    model = network(torch.float32)
    theirs = train(model, "aten", batches)
    drifts = []
    for seed in range(3):
        other = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter *= 1 + 2**-24 * torch.randn(parameter.shape, generator=generator)
        drifts.append(distance(train(other, "aten", batches), theirs))
    torch.set_num_threads(1)
    drifts.append(distance(train(model, "aten", batches), theirs))
    torch.set_num_threads(2)
    ours = distance(train(model, "reference", batches), theirs)
    assert 0 < ours <= max(drifts), (ours, drifts)
