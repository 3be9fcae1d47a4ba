"""Networks of other people's making, fused: their outputs, gradients and weights after training, and what is left."""

import copy
import itertools
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import kernels

WHOLE, NORMALIZED, POOLED = "relu_lrn_max_pool2d", "relu_local_response_norm", "relu_max_pool2d"
LRN, POOL = "local_response_norm", "max_pool2d"
#: Windows whose sums are about as large as k, so that a wrong one shows.
WINDOW: dict[str, Any] = {"size": 5, "alpha": 0.5, "beta": 0.75, "k": 2.0}


class PaperAcross(nn.Module):
    """The paper's network with windows across its towers, all modules, ReLUs in place, as torchvision writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 11, 4), nn.ReLU(inplace=True), nn.LocalResponseNorm(**WINDOW), nn.MaxPool2d(3, 2),
            nn.Conv2d(8, 16, 5, padding=2, groups=2), nn.ReLU(inplace=True), nn.LocalResponseNorm(**WINDOW),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(12, 12, 3, padding=1, groups=2), nn.ReLU(inplace=True),
            nn.Conv2d(12, 8, 3, padding=1, groups=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(6, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class PaperTowers(nn.Module):
    """The paper's network with windows inside the towers: PyTorch's normalization knows no groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 11, 4)
        self.conv2 = nn.Conv2d(8, 16, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(16, 12, 3, padding=1)
        self.conv4 = nn.Conv2d(12, 12, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(12, 8, 3, padding=1, groups=2)
        self.fc6, self.fc7 = nn.Linear(8, 6), nn.Linear(6, 5)

    def normalize(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        return torch.cat([F.local_response_norm(one, **WINDOW), F.local_response_norm(two, **WINDOW)], 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(self.normalize(F.relu(conv(x))), 3, 2)
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = F.max_pool2d(F.relu(self.conv5(x)), 3, 2).flatten(1)
        x = F.relu(self.fc6(F.dropout(x, training=self.training)))
        return self.fc7(F.dropout(x, training=self.training))


class TowerNorm(nn.Module):
    """Chunks in a loop, which no trace goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LocalResponseNorm(**WINDOW)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(part) for part in x.chunk(2, 1)], 1)


class PaperTowerModules(PaperAcross):
    def __init__(self) -> None:
        super().__init__()
        self.features[2], self.features[6] = TowerNorm(), TowerNorm()


class CaffeNet(nn.Module):
    """Pooling in front of normalization; one ReLU and one pooling module serve all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 11, 4), nn.Conv2d(8, 12, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(12, 8, 3, padding=1)
        self.relu, self.pool, self.norm = nn.ReLU(), nn.MaxPool2d(3, 2), nn.LocalResponseNorm(**WINDOW)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.pool(self.relu(self.conv1(x))))
        x = self.norm(self.pool(self.relu(self.conv2(x))))
        return self.fc(self.pool(self.relu(self.conv3(x))).flatten(1))


class Inception(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(channels, 2, 1), nn.ReLU(True))
        self.three = nn.Sequential(
            nn.Conv2d(channels, 2, 1), nn.ReLU(True), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(True)
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(channels, 2, 1), nn.ReLU(True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.pool(x)], 1)


class GoogLeNet(nn.Module):
    """The first version's stem, poolings with ceil_mode, and a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(True), nn.MaxPool2d(3, 2, ceil_mode=True), nn.LocalResponseNorm(**WINDOW),
            nn.Conv2d(8, 8, 1), nn.ReLU(True), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(True),
            nn.LocalResponseNorm(**WINDOW), nn.MaxPool2d(3, 2, ceil_mode=True),
        )  # fmt: skip
        self.block, self.fc = Inception(12), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.dropout(self.block(self.stem(x)).mean((2, 3)), 0.4, self.training))


class ZFNet(nn.Module):
    """Padded poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.LocalResponseNorm(4, 0.5, 0.6, 1.0),
            nn.Conv2d(8, 12, 5, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.LocalResponseNorm(4, 0.5, 0.6, 1.0),
        )  # fmt: skip
        self.fc = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.features(x), 1))


NETWORKS: tuple[tuple[type[nn.Module], list[str]], ...] = (
    (PaperAcross, [WHOLE, WHOLE, POOLED]),
    (PaperTowers, [LRN, LRN, POOL, LRN, LRN, POOL, POOLED]),
    (PaperTowerModules, [POOL, POOL, POOLED, LRN, LRN]),
    (CaffeNet, [POOLED, LRN, POOLED, LRN, POOLED]),
    (GoogLeNet, [POOLED, LRN, WHOLE, POOL]),
    (ZFNet, [POOLED, LRN, POOLED, LRN]),
)


def images(size: int = 67, count: int = 3) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2


def made(network: Callable[[], nn.Module], input: Tensor | None = None) -> nn.Module:
    """In float64, with biases that count."""
    torch.manual_seed(0)
    model = network().double()
    if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
        model(images() if input is None else input)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.1, 0.5)
    return model


def kinds(fused: nn.Module) -> list[str]:
    return [line.split(" -> ")[1] for line in fused.replaced]  # type: ignore[union-attr]


def results(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of inputs and parameters; what is drawn is always the same."""
    inputs = tuple(input.detach().clone().requires_grad_() for input in inputs)
    torch.manual_seed(2)
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(3)
    total = sum((output * torch.randn(output.shape, generator=generator).to(output)).sum() for output in outputs)
    wanted = [*inputs, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    return [*outputs, *torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)]


def assert_same(ours: nn.Module, theirs: nn.Module, *inputs: Tensor, tolerance: float = 1e-12) -> None:
    for one, other in zip(results(ours, *inputs), results(theirs, *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("network", "expected"), NETWORKS, ids=lambda item: getattr(item, "__name__", ""))
def test_a_network_fused_is_the_network(network: type[nn.Module], expected: list[str], training: bool) -> None:
    model = made(network).train(training)
    fused = kernels.fuse(model, images())
    assert kinds(fused) == expected
    assert isinstance(fused, network)
    assert_same(fused, model, images())
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(one is other for one, other in zip(fused.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("network", [network for network, _ in NETWORKS])
def test_training_and_checkpoints(network: type[nn.Module]) -> None:
    """Three updates by an optimizer that was made for the unfused model, and weights that go both ways."""
    plain = made(network)
    model = made(network)
    optimizers = [torch.optim.SGD(net.parameters(), 0.05, momentum=0.9) for net in (plain, model)]
    fused = kernels.fuse(model)
    for net, optimizer in zip((plain, fused), optimizers, strict=True):
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            F.cross_entropy(net(images()), torch.tensor([0, 3, 4])).backward()
            optimizer.step()
    start = made(network).state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    assert all((value != start[name]).any() for name, value in plain.state_dict().items())
    other = made(network)
    other.load_state_dict(fused.state_dict())
    fused.load_state_dict(start)
    assert list(start) == list(fused.state_dict())
    assert_same(kernels.fuse(other).eval(), plain.eval(), images())
    assert_same(fused.eval(), made(network).eval(), images())


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    fused = kernels.fuse(made(PaperTowerModules))
    line = TowerNorm.forward.__code__.co_firstlineno + 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[:5] == [f"fused: {line}" for line in fused.replaced]  # type: ignore[union-attr]
    assert fused.replaced == [
        "features.3 -> max_pool2d",
        "features.7 -> max_pool2d",
        "features.12.bias, features.13, features.14 -> relu_max_pool2d",
        "features.2.norm.local_response_norm -> local_response_norm",
        "features.6.norm.local_response_norm -> local_response_norm",
    ]
    for index, note in zip((2, 6), printed[5:], strict=True):
        assert note.startswith(f"not traced: features.{index} (TowerNorm): Proxy object cannot be iterated")
        assert note.endswith(f" (test_fuse.py:{line})")
    assert "(features): FusedSequential(" in repr(fused)


def test_the_original_is_as_it_was() -> None:
    model = made(PaperAcross)
    before = {name: (module, type(module), set(module.__dict__)) for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    fused = kernels.fuse(model, images())
    after = {name: (module, type(module), set(module.__dict__)) for name, module in model.named_modules()}
    assert after == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    fused.eval()
    assert all(module.training for module in model.modules())
    assert torch.equal(fused(images()), fused(images())), "nothing is dropped"
    assert not torch.equal(fused.train()(images()), fused(images()))
    assert {module.training for module in fused.modules()} == {True}


# One chain


class Chain(nn.Module):
    """``run`` on the output of a convolution; functions see the modules as ``self``."""

    def __init__(self, run: Callable[[Any, Tensor], Any], conv: nn.Module | None = None) -> None:
        super().__init__()
        self.run = run
        self.conv = nn.Conv2d(3, 6, 3) if conv is None else conv
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.norm, self.pool = nn.LocalResponseNorm(**WINDOW), nn.MaxPool2d(3, 2)
        self.indices = nn.MaxPool2d(2, return_indices=True)
        self.batch_norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def functional(self: Any, x: Tensor) -> Tensor:
    x = F.conv2d(x, self.conv.weight, self.conv.bias, stride=2)
    return torch.max_pool2d(F.local_response_norm(x.relu(), 4, k=0.5, alpha=0.3), [2, 3], ceil_mode=True)


def keywords(self: Any, x: Tensor) -> Tensor:
    x = F.conv2d(input=x, weight=self.conv.weight, bias=self.conv.bias)
    return F.max_pool2d(input=F.local_response_norm(input=F.relu(input=x), size=3), kernel_size=2, stride=(2, 1))


def skip_of_relu(self: Any, x: Tensor) -> Tensor:
    x = self.relu(self.conv(x))
    return self.pool(self.norm(x)) + x[:, :, 1:7, 1:7]


def skip_of_norm(self: Any, x: Tensor) -> Tensor:
    x = self.norm(self.relu(self.conv(x)))
    return self.pool(x) + x[:, :, 1:7, 1:7]


def skip_of_convolution(self: Any, x: Tensor) -> Tensor:
    x = self.conv(x)
    return self.pool(self.norm(self.relu(x))) + x[:, :, 1:7, 1:7]


def in_place_under_a_skip(self: Any, x: Tensor) -> Tensor:
    x = self.conv(x)
    return self.pool(self.norm(self.relu_(x))) + x[:, :, 1:7, 1:7]


def in_place_on_a_view(self: Any, x: Tensor) -> Tensor:
    x = self.conv(x)
    return F.max_pool2d(x[:, :3].relu_(), 3, 2) + x[:, :3, 1:7, 1:7]


def in_place_unused(self: Any, x: Tensor) -> Tensor:
    x = self.conv(x)
    F.relu(x, inplace=True)
    return self.pool(x)


def changed_behind_the_relu(self: Any, x: Tensor) -> Tensor:
    x = self.conv(x)
    active = self.relu(x)
    x.mul_(-1)
    return self.pool(active) + x[:, :, 1:7, 1:7]


def dropped_in_place(self: Any, x: Tensor) -> Tensor:
    x = self.pool(self.relu(self.conv(x)))
    return F.dropout(x.flatten(1), 0.5, self.training, inplace=True)


def added_to(self: Any, x: Tensor) -> Tensor:
    x = self.pool(self.relu(self.conv(x)))
    identity = x
    x += 1
    return x * identity


def added_to_another(self: Any, x: Tensor) -> Tensor:
    x = self.pool(torch.relu_(self.batch_norm(x[:, [0] * 6])))
    out = self.norm(x)
    out += x
    return out.relu_()


def written_after_normalization(self: Any, x: Tensor) -> Tensor:
    x = self.conv(x)
    active = self.relu(x)
    x.mul_(-1)
    return self.pool(self.norm(active)) + x[:, :, 1:7, 1:7]


def normalized_and_written(self: Any, x: Tensor) -> Tensor:
    return self.pool(self.norm(self.relu(self.conv(x)))).mul_(2)


def pool_with_indices(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x, indices = self.indices(self.norm(self.relu(self.conv(x))))
    y, more = F.max_pool2d(x, 2, return_indices=True)
    return x, (indices.to(x) * x).sum() + (more.to(y) * y).sum()


def shared_convolution(self: Any, x: Tensor) -> Tensor:
    first = self.pool(self.relu_(self.conv(x)))
    second = self.conv(x * 2)
    return first + self.norm(second)[:, :, 1:7, 1:7]


def twice_the_same(self: Any, x: Tensor) -> Tensor:
    return self.pool(self.relu_(self.conv(x))) + self.pool(self.relu_(self.conv(-x)))


def pool_of_a_computed_size(self: Any, x: Tensor) -> Tensor:
    x = self.relu(self.conv(x))
    return F.max_pool2d(x, x.shape[-1]) + self.pool(x) + F.max_pool2d(x, 2, ceil_mode=x.shape[-1] > 100)


WHOLE_LINE = "conv.bias, relu, norm, pool -> " + WHOLE
CASES: tuple[tuple[Callable[[Any, Tensor], Any], list[str]], ...] = (
    (lambda self, x: self.pool(self.norm(self.relu(self.conv(x)))), [WHOLE_LINE]),
    (lambda self, x: self.pool(self.norm(self.relu_(self.conv(x)))), [WHOLE_LINE.replace("relu,", "relu_,")]),
    (lambda self, x: self.norm(self.relu(self.conv(x))), ["conv.bias, relu, norm -> " + NORMALIZED]),
    (lambda self, x: self.pool(self.relu(self.conv(x))), ["conv.bias, relu, pool -> " + POOLED]),
    (lambda self, x: self.pool(self.norm(self.conv(x))), ["norm -> " + LRN, "pool -> " + POOL]),
    (lambda self, x: self.norm(self.pool(self.conv(x))), ["pool -> " + POOL, "norm -> " + LRN]),
    (lambda self, x: self.pool(torch.relu(self.batch_norm(self.conv(x)))), ["relu, pool -> " + POOLED]),
    (lambda self, x: self.pool(self.conv(x).relu_()), ["conv.bias, relu_, pool -> " + POOLED]),
    (lambda self, x: self.pool(torch.relu_(self.batch_norm(x[:, [0] * 6]))), ["relu_, pool -> " + POOLED]),
    (lambda self, x: self.pool(F.relu(self.conv(x) + 1, True)), ["relu, pool -> " + POOLED]),
    (lambda self, x: self.norm(F.avg_pool2d(self.relu(self.conv(x)), 3, 2)), ["norm -> " + LRN]),
    (lambda self, x: self.pool(F.dropout(self.relu(self.conv(x)), 0.0)), ["pool -> " + POOL]),
    (lambda self, x: F.max_pool2d(F.relu(self.conv(x)), 3, 1, 1, 2), ["conv.bias, relu, max_pool2d -> " + POOLED]),
    (functional, ["conv.bias, relu, local_response_norm, max_pool2d -> " + WHOLE]),
    (keywords, ["conv.bias, relu, local_response_norm, max_pool2d -> " + WHOLE]),
    (skip_of_relu, ["norm -> " + LRN, "pool -> " + POOL]),
    (skip_of_norm, ["conv.bias, relu, norm -> " + NORMALIZED, "pool -> " + POOL]),
    (skip_of_convolution, ["relu, norm, pool -> " + WHOLE]),
    (in_place_under_a_skip, ["norm -> " + LRN, "pool -> " + POOL]),
    (in_place_on_a_view, ["max_pool2d -> " + POOL]),
    (in_place_unused, ["pool -> " + POOL]),
    (changed_behind_the_relu, ["relu, pool -> " + POOLED]),
    (dropped_in_place, ["pool -> " + POOL]),
    (added_to, ["pool -> " + POOL]),
    (added_to_another, ["relu_, pool -> " + POOLED, "norm -> " + LRN]),
    (written_after_normalization, ["norm -> " + LRN, "pool -> " + POOL]),
    (normalized_and_written, [WHOLE_LINE]),
    (pool_with_indices, ["conv.bias, relu, norm -> " + NORMALIZED]),
    (shared_convolution, ["conv.bias, relu_, pool -> " + POOLED, "norm -> " + LRN]),
    (twice_the_same, ["conv.bias, relu_, pool -> " + POOLED] * 2),
    (pool_of_a_computed_size, ["pool -> " + POOL]),
)  # fmt: skip


@pytest.mark.parametrize(("run", "lines"), CASES, ids=lambda item: getattr(item, "__name__", ""))
def test_chains(run: Callable[[Any, Tensor], Any], lines: list[str]) -> None:
    model = made(lambda: Chain(run))
    fused = kernels.fuse(model, images(15))
    assert fused.replaced == lines
    assert_same(fused, model, images(15))


def whole(self: Any, x: Tensor) -> Tensor:
    return self.pool(self.norm(self.relu(self.conv(x))))


def hooked() -> nn.Module:
    conv = nn.Conv2d(3, 6, 3)
    conv.register_forward_hook(lambda module, inputs, output: output * 2)
    return conv


@pytest.mark.parametrize(
    ("conv", "takes_bias"),
    [
        (lambda: nn.Conv2d(3, 6, 3, padding="same", dilation=2), True),
        (lambda: nn.Conv2d(3, 6, 3, (2, 1), (1, 0), groups=3), True),
        (lambda: nn.Conv2d(3, 6, 3, bias=False), False),
        (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), False),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), False),
        (lambda: nn.ConvTranspose2d(3, 6, 3), False),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)), False),
        (hooked, False),
    ],
)
def test_convolutions(conv: Callable[[], nn.Module], takes_bias: bool) -> None:
    model = made(lambda: Chain(whole, conv()))
    fused = kernels.fuse(model, images(15))
    assert fused.replaced == [WHOLE_LINE if takes_bias else WHOLE_LINE.removeprefix("conv.bias, ")]
    assert_same(fused, model, images(15))


def test_convolutions_of_other_dimensions() -> None:
    """Normalization takes any; the bias of a convolution goes along only where it is 2-d."""
    for conv, size in ((nn.Conv1d, (15,)), (nn.Conv3d, (5, 4, 6))):
        model = made(lambda conv=conv: nn.Sequential(conv(3, 6, 3), nn.ReLU(), nn.LocalResponseNorm(**WINDOW)))  # type: ignore[misc]
        fused = kernels.fuse(model)
        assert fused.replaced == ["1, 2 -> " + NORMALIZED]
        assert_same(fused, model, torch.randn(2, 3, *size, dtype=torch.float64))


def test_a_hook_keeps_its_module() -> None:
    model = made(lambda: Chain(whole))
    seen: list[tuple[nn.Module, Tensor]] = []
    for name in ("relu", "pool"):
        getattr(model, name).register_forward_hook(lambda module, inputs, output: seen.append((module, output)))
    model.register_forward_hook(lambda module, inputs, output: seen.append((module, output)))
    expected = model(images(15))
    fused = kernels.fuse(model)
    assert fused.replaced == ["norm -> " + LRN, "pool.max_pool2d -> " + POOL]
    seen_before = [tensor for _, tensor in seen]
    seen.clear()
    torch.testing.assert_close(fused(images(15)), expected)
    assert [module for module, _ in seen] == [fused.relu, fused.pool, fused]
    for (_, ours), theirs in zip(seen, seen_before, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_a_hook_holds_is_written_to_as_before() -> None:
    """An in-place ReLU writes to the output of the convolution, which the hook keeps."""
    model = made(lambda: Chain(lambda self, x: self.pool(self.relu_(self.conv(x)))))
    seen: list[Tensor] = []
    model.conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    fused = kernels.fuse(model)
    assert fused.replaced == ["pool -> " + POOL]
    fused(images(15))
    assert seen[0].min() == 0


def test_one_image_without_a_batch() -> None:
    image = images(15)[0]
    pooled = made(lambda: Chain(lambda self, x: self.pool(self.relu(self.conv(x)))))
    assert_same(kernels.fuse(pooled, image), pooled, image)
    with pytest.raises(ValueError, match="fails on example_input: relu_lrn_max_pool2d: input must have 4 dimensions"):
        kernels.fuse(made(lambda: Chain(whole)), image)
    # PyTorch takes the rows for channels, of which there are as many here as the bias has elements.
    normalized = made(lambda: Chain(lambda self, x: self.norm(self.relu(self.conv(x)))))
    normalized(images(8)[0])
    with pytest.raises(ValueError, match="convolution's input must have 4 dimensions"):
        kernels.fuse(normalized, images(8)[0])


# What cannot be traced


class Flow(nn.Module):
    """A forward that depends on values, around a Sequential that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.LocalResponseNorm(**WINDOW), nn.MaxPool2d(2)))
        self.norm = nn.LocalResponseNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        x = -x if x.sum() > 0 else x
        for layer in self.features:
            assert isinstance(layer, nn.Module)
        return self.norm(self.features(x))


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2) if x.sum() > 0 else x


class Around(nn.Module):
    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inner, self.again, self.conv = inner(), None, nn.Conv2d(6, 4, 1)
        self.again = self.inner

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.conv(self.inner(x) + self.again(x))), 2)


def test_around_and_below_what_cannot_be_traced(capsys: pytest.CaptureFixture[str]) -> None:
    inside = [
        "{0}features.0.bias, {0}features.1, {0}features.2, {0}features.3 -> " + WHOLE,
        "{0}norm.local_response_norm -> " + LRN,
    ]
    flow = made(Flow)
    fused = kernels.fuse(flow, images(15))
    assert fused.replaced == [line.format("") for line in inside]
    assert_same(fused, flow, images(15))
    assert "not traced: the model (Flow): symbolically traced variables cannot" in capsys.readouterr().out
    around = made(lambda: Around(Flow))
    fused = kernels.fuse(around, images(15))
    assert fused.replaced == ["conv.bias, relu, max_pool2d -> " + POOLED, *(line.format("inner.") for line in inside)]
    assert fused.inner is fused.again
    assert_same(fused, around, images(15))
    assert_same(pickle.loads(pickle.dumps(fused)), around, images(15))


def test_models_that_are_wrapped() -> None:
    plain = made(lambda: Chain(whole))
    for wrap in (nn.DataParallel, lambda model: torch.compile(model, backend="eager")):
        fused = kernels.fuse(wrap(plain))
        assert kinds(fused) == [WHOLE]
        assert_same(fused, plain, images(15))
    traced = fx.symbolic_trace(plain)
    fused = kernels.fuse(traced, images(15))
    for other in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(other).__name__.startswith("FusedGraphModule")
        assert_same(other, traced, images(15))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got function"):
        kernels.fuse(whole)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"conv\.weight has no shape yet; run the model once first"):
        kernels.fuse(Chain(whole, nn.LazyConv2d(6, 3)))
    with pytest.raises(ValueError, match=r"no relu, local_response_norm or max_pool2d to replace in Sequential$"):
        kernels.fuse(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AvgPool2d(2)))
    with pytest.raises(
        ValueError, match=r"in Branch; not traced: the model \(Branch\): .* control flow \(test_fuse.py:"
    ):
        kernels.fuse(Branch())
    script = torch.jit.trace(made(lambda: Chain(whole)), images(15))
    with pytest.raises(ValueError, match=r"not traced: the model \(TorchScript\)"):
        kernels.fuse(script)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="fuse what it was made of and wrap the result"):
            kernels.fuse(nn.parallel.DistributedDataParallel(made(PaperAcross)))
        wrapped = nn.parallel.DistributedDataParallel(kernels.fuse(made(CaffeNet)))
        assert_same(wrapped, made(CaffeNet), images())
    finally:
        torch.distributed.destroy_process_group()


def test_an_example_finds_out_what_tracing_missed() -> None:
    def chance(self: Any, x: Tensor) -> Tensor:
        return whole(self, x) * random.random()

    model = made(lambda: Chain(chance))
    kernels.fuse(model)
    with pytest.raises(ValueError, match=r"on example_input the fused model is off by [^ ]*, where .* is allowed"):
        kernels.fuse(model, (images(15),))

    def writes_and_draws(self: Any, x: Tensor) -> Tensor:
        return F.dropout(whole(self, x.sub_(1))) / 0

    input = images(15)
    kernels.fuse(made(lambda: Chain(writes_and_draws)), input)
    assert torch.equal(input, images(15))
    limits = itertools.count(1)
    cut = made(lambda: Chain(lambda self, x: whole(self, x)[: next(limits)]))
    with pytest.raises(ValueError, match=r"gives \(1, 6, 6, 6\) instead of \(2, 6, 6, 6\)"):
        kernels.fuse(cut, images(15))


# How a fused model is used


def test_copies_and_pickles(tmp_path: Path) -> None:
    model = made(CaffeNet).eval()
    fused = kernels.fuse(model)
    torch.save(fused, tmp_path / "fused.pt")
    for other in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(tmp_path / "fused.pt", weights_only=False),
    ):
        assert type(other).__name__ == "FusedCaffeNet"
        assert other.replaced == fused.replaced
        assert not other.training
        assert other.conv1.weight is not fused.conv1.weight
        with torch.no_grad():
            other.conv1.bias.add_(1)
        changed = copy.deepcopy(model)
        changed.load_state_dict(other.state_dict())
        assert_same(other, changed, images())
        forward = type(other).forward
        assert kernels.relu_max_pool2d in forward.__globals__.values(), "fused still"


def test_compiled_exported_and_called_with_other_parameters() -> None:
    model = made(lambda: Chain(lambda self, x: F.dropout(whole(self, x), training=self.training)))
    fused = kernels.fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_same(compiled, model, images(15))  # type: ignore[arg-type]
    model.eval()
    fused.eval()
    batch = {"x": {0: torch.export.Dim("batch", max=64)}}
    exported = torch.export.export(fused, (images(15),), dynamic_shapes=batch).module()
    input = images(15, 5)
    torch.testing.assert_close(exported(input), model(input), rtol=1e-12, atol=1e-12)
    parameters = {name: value * 2 for name, value in model.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(fused, parameters, (input,)),
        torch.func.functional_call(model, parameters, (input,)),
    )


@pytest.mark.parametrize("network", [CaffeNet, PaperAcross, GoogLeNet])
def test_channels_last(network: type[nn.Module]) -> None:
    model = made(network).eval()
    fused = kernels.fuse(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_same(fused, made(network).eval(), images().contiguous(memory_format=torch.channels_last))


def test_another_device() -> None:
    fused = kernels.fuse(made(PaperAcross)).to("meta")
    assert fused(images().to("meta")).shape == (3, 5)
    assert fused.to_empty(device="cpu").eval()(images()).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and KERNELS_TEST=gpu")
@pytest.mark.parametrize("network", [PaperAcross, CaffeNet, GoogLeNet])
def test_on_a_gpu(network: type[nn.Module]) -> None:
    model = made(network).eval()
    # PyTorch's own gradients on a GPU are not deterministic, and neither are its matrix products unless it is told so.
    torch.use_deterministic_algorithms(False)
    fused = kernels.fuse(model).cuda()
    assert_same(fused, made(network).eval().cuda(), images().cuda(), tolerance=1e-9)
    moved = made(network).eval().float().cuda()
    kernels.fuse(moved, images().float().cuda())


def test_autocast_keeps_the_half_type() -> None:
    model = made(lambda: Chain(whole)).float()
    fused = kernels.fuse(model)
    input = images(15).float()
    exact = model(input)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = model(input), fused(input)
    assert (theirs.dtype, ours.dtype) == (torch.float32, torch.bfloat16)
    # Inputs, weights and the convolution's output are rounded to 8 bits; 27 products of like size make a sum.
    torch.testing.assert_close(ours.float(), exact, rtol=0, atol=4 * 2**-8 * exact.abs().max().item())


def test_gradients_of_gradients() -> None:
    model = made(
        lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(True), nn.LocalResponseNorm(**WINDOW), nn.MaxPool2d(2))
    )
    fused = kernels.fuse(model)
    assert kinds(fused) == [WHOLE]
    input = torch.randn(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(fused, input)


def test_frozen_batch_statistics_and_buffers_are_shared() -> None:
    model = made(lambda: Chain(lambda self, x: self.pool(self.relu(self.batch_norm(self.conv(x))))))
    fused = kernels.fuse(model)
    before = model.batch_norm.running_mean.clone()
    fused(images(15))
    assert not torch.equal(model.batch_norm.running_mean, before)
    assert fused.batch_norm.running_mean is model.batch_norm.running_mean
    fused.batch_norm.eval()
    after = model.batch_norm.running_mean.clone()
    fused(images(15))
    assert torch.equal(model.batch_norm.running_mean, after)
