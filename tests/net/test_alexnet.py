"""The network against plain PyTorch, variant by variant."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from net.model.alexnet import AlexNet, alexnet
from net.model.config import VARIANTS, AlexNetConfig, network

#: Hidden layers small enough for float64.
SMALL_HIDDEN = [{"name": "fc6", "features": 32}, {"name": "fc7", "features": 24}]
#: A small input whose last feature maps are larger than one pixel, and for which conv1 needs a row and column of zeros.
SMALL = 98


def small(variant: str, **fields: object) -> AlexNet:
    """A variant at a small image size in float64 and evaluation mode, with random biases."""
    torch.manual_seed(0)
    model = alexnet(variant, image_size=SMALL, classes=7, hidden=SMALL_HIDDEN, **fields).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
            else:
                parameter.normal_(0, math.sqrt(2 / parameter[0].numel()))
    return model


def pixels(size: int = SMALL, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 50


def normalize(x: Tensor, groups: int, alpha: float, k: float) -> Tensor:
    """Section 3.3 with PyTorch's operator, group by group."""
    return torch.cat([F.local_response_norm(part, 5, alpha, 0.75, k) for part in x.chunk(groups, 1)], 1)


def dense(model: AlexNet, x: Tensor, f: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
    p = dict(model.named_parameters())
    x = f(F.linear(x.flatten(1), p["fc6.weight"], p["fc6.bias"]))
    x = f(F.linear(x, p["fc7.weight"], p["fc7.bias"]))
    return F.linear(x, p["fc8.weight"], p["fc8.bias"])


def convolve(model: AlexNet, name: str, x: Tensor, **options: int) -> Tensor:
    p = dict(model.named_parameters())
    return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **options)


def paper(model: AlexNet, x: Tensor, f: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
    """Sections 3.1 to 3.5 with grouped convolutions."""
    missing = -(SMALL - 11) % 4
    x = f(convolve(model, "conv1", F.pad(x, (0, missing, 0, missing)), stride=4))
    x = F.max_pool2d(normalize(x, 2, 5e-4, 2.0), 3, 2)
    x = f(convolve(model, "conv2", x, padding=2, groups=2))
    x = F.max_pool2d(normalize(x, 2, 5e-4, 2.0), 3, 2)
    x = f(convolve(model, "conv3", x, padding=1))
    x = f(convolve(model, "conv4", x, padding=1, groups=2))
    x = F.max_pool2d(f(convolve(model, "conv5", x, padding=1, groups=2)), 3, 2)
    return dense(model, x, f)


def caffe(model: AlexNet, x: Tensor) -> Tensor:
    """bvlc_alexnet's prototxt: k=1, alpha / 5, windows across the groups."""
    x = F.relu(convolve(model, "conv1", x, stride=4))
    x = F.max_pool2d(normalize(x, 1, 1e-4, 1.0), 3, 2)
    x = F.relu(convolve(model, "conv2", x, padding=2, groups=2))
    x = F.max_pool2d(normalize(x, 1, 1e-4, 1.0), 3, 2)
    x = F.relu(convolve(model, "conv3", x, padding=1))
    x = F.relu(convolve(model, "conv4", x, padding=1, groups=2))
    x = F.max_pool2d(F.relu(convolve(model, "conv5", x, padding=1, groups=2)), 3, 2)
    return dense(model, x)


def original_code(model: AlexNet, x: Tensor) -> Tensor:
    """layers-145.cfg of the 2012 program."""
    missing = -(SMALL - 11) % 4
    x = convolve(model, "conv1", F.pad(x, (0, missing, 0, missing)), stride=4)
    x = F.relu(F.max_pool2d(normalize(x, 2, 1e-4, 2.0), 3, 2))
    x = normalize(F.relu(convolve(model, "conv2", x, padding=2, groups=2)), 2, 1e-4, 2.0)
    within = F.conv2d((x * x).flatten(0, 1)[:, None], torch.ones(1, 1, 5, 5, dtype=x.dtype), padding=2)
    x = x * (1 + 0.001 / 25 * within.view_as(x)) ** -0.75
    x = F.max_pool2d(x, 3, 2)
    x = F.relu(convolve(model, "conv3", x, padding=1))
    x = F.relu(convolve(model, "conv4", x, padding=1, groups=2))
    x = F.relu(F.max_pool2d(convolve(model, "conv5", x, padding=1, groups=2), 3, 2))
    return dense(model, x)


def sixth_conv(model: AlexNet, x: Tensor) -> Tensor:
    missing = -(SMALL - 11) % 4
    x = F.relu(convolve(model, "conv1", F.pad(x, (0, missing, 0, missing)), stride=4))
    x = F.max_pool2d(normalize(x, 2, 5e-4, 2.0), 3, 2)
    x = F.relu(convolve(model, "conv2", x, padding=2, groups=2))
    x = F.max_pool2d(normalize(x, 2, 5e-4, 2.0), 3, 2)
    x = F.relu(convolve(model, "conv3", x, padding=1))
    x = F.relu(convolve(model, "conv4", x, padding=1, groups=2))
    x = F.max_pool2d(F.relu(convolve(model, "conv5", x, padding=1, groups=2)), 3, 2)
    return dense(model, F.relu(convolve(model, "conv6", x, padding=1)))


@pytest.mark.parametrize("written_out", [paper, caffe, original_code, sixth_conv], ids=lambda item: item.__name__)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_is_the_network_written_out(
    written_out: Callable[[AlexNet, Tensor], Tensor], memory_format: torch.memory_format
) -> None:
    model = small(written_out.__name__)
    images = pixels()
    expected = written_out(model, images)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
    logits = model(images.contiguous(memory_format=memory_format))
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)
    found = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    for (name, _), ours, theirs in zip(model.named_parameters(), found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item(), msg=name)
    assert expected.std() > 0.01


def test_tanh_takes_the_place_of_every_relu() -> None:
    model = small("paper", activation="tanh")
    with torch.no_grad():
        for parameter in model.parameters():
            # So that tanh is neither linear nor saturated.
            parameter.mul_(0.5)
    torch.testing.assert_close(model(pixels() / 50), paper(model, pixels() / 50, torch.tanh), rtol=1e-11, atol=1e-11)


def test_one_weird_trick_is_torchvision_s() -> None:
    layers = [
        nn.Sequential(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        nn.Sequential(nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        nn.Sequential(nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten()),
    ]
    model = small("one_weird_trick")
    parameters = list(model.parameters())
    size = model.config.layers()[-3].input_shape[0]
    head = nn.Sequential(nn.Linear(size, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 7))
    plain = nn.Sequential(*layers, head).double()
    for target, source in zip(plain.parameters(), parameters, strict=True):
        target.data.copy_(source)
    torch.testing.assert_close(model(pixels()), plain(pixels()))


def test_cifar10_is_cuda_convnet_s() -> None:
    """layers-conv-local-11pct.cfg: ceil-mode pooling gives 16x16 and 8x8 maps."""
    model = alexnet("cifar10").double().eval()
    p = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough for the normalization to matter.
            parameter.normal_(0, 2 / math.sqrt(parameter[0].numel()))
    x = pixels(32)
    for name, padding, pooled in (("conv1", 2, True), ("conv2", 2, True), ("conv3", 1, False), ("conv4", 1, False)):
        x = F.relu(F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=padding))
        if pooled:
            x = F.max_pool2d(normalize(x, 1, 1e-3, 1.0), 3, 2, ceil_mode=True)
    assert x.shape == (2, 32, 8, 8)
    torch.testing.assert_close(model(pixels(32)), F.linear(x.flatten(1), p["fc5.weight"], p["fc5.bias"]))


def test_a_tower_sees_nothing_of_the_other_before_conv3() -> None:
    model = small("paper")
    first = [parameter for name, parameter in model.named_parameters() if name.startswith(("conv1", "conv2"))]
    taken: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[list[Tensor], object]) -> None:
        taken["pool2"] = torch.cat(inputs[0], 1)

    model.get_submodule("conv3").register_forward_pre_hook(keep)
    images = pixels()
    model(images)
    before = taken["pool2"]
    with torch.no_grad():
        for parameter in first:
            parameter[: len(parameter) // 2] *= 1.5
    model(images)
    after = taken["pool2"]
    assert not torch.equal(after[:, :128], before[:, :128])
    assert torch.equal(after[:, 128:], before[:, 128:])


@pytest.mark.parametrize(
    "fields",
    [
        {"activation": "tanh"},
        {"lrn": False},
        {"overlapping_pooling": False},
        {"towers": 1},
        {"exchange": False},
        {"without": ("conv1",)},
        {"without": ("conv2", "conv4")},
        {"without": ("conv5",)},
        {"dropout": 0.0},
        {"dropout_position": "input"},
    ],
    ids=str,
)
def test_every_ablation_learns(fields: dict[str, object]) -> None:
    """Forward and backward run, and every parameter has a nonzero gradient."""
    torch.manual_seed(0)
    model = alexnet("digits", **fields)
    images = torch.randn(8, 3, 32, 32) * 60
    F.cross_entropy(model(images), torch.arange(8)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_without_exchange_only_the_last_layer_mixes_the_towers() -> None:
    model = small("paper", exchange=False)
    images = pixels()
    before = model.features(images)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("fc8"):
                parameter[: len(parameter) // 2] *= 1.5
    after = model.features(images)
    assert after.shape == (2, 24)
    assert not torch.equal(after[:, :12], before[:, :12])
    assert torch.equal(after[:, 12:], before[:, 12:])


def test_initialization_is_section_5_s() -> None:
    torch.manual_seed(0)
    model = alexnet("paper", classes=100)
    for name, parameter in model.named_parameters():
        layer, kind = name.split(".")
        if kind == "bias":
            expected = 1.0 if layer in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0.0
            assert (parameter == expected).all(), name
        else:
            # The standard errors of mean and standard deviation of n draws are 0.01 / sqrt(n) and 0.01 / sqrt(2 n).
            bound = 5 * 0.01 / math.sqrt(parameter.numel())
            assert abs(parameter.mean().item()) < bound, name
            assert abs(parameter.std().item() - 0.01) < bound, name


#: Initializations other than the paper's standard deviation of 0.01, by layer: (standard deviation, bias); None is
#: PyTorch's default.
STARTS: dict[str, dict[str, tuple[float, float] | None]] = {
    "half": {},
    "original_code": {"conv3": (0.03, 0.0), "conv4": (0.03, 1.0), "conv5": (0.03, 1.0)},
    "one_weird_trick": dict.fromkeys(("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")),
    "caffe": {
        **dict.fromkeys(("conv2", "conv4", "conv5"), (0.01, 0.1)),
        **dict.fromkeys(("fc6", "fc7"), (0.005, 0.1)),
    },
    "sixth_conv": {"conv6": (0.01, 1.0)},
    "cifar10": {"conv1": (0.0001, 0.0), "conv2": (0.01, 0.0), "conv3": (0.04, 0.0), "conv4": (0.04, 0.0)},
    "alexnet32": {
        "conv1": (0.003, 0.0),
        **dict.fromkeys(("conv2", "conv3", "conv4", "conv5", "fc6", "fc7"), (0.05, 0.0)),
    },
}


@pytest.mark.parametrize("variant", list(STARTS))
def test_every_variant_starts_as_its_source(variant: str) -> None:
    torch.manual_seed(0)
    # The width of the dense layers does not matter here, and drawing 4096 takes seconds.
    hidden = [{**item, "features": 32} for item in VARIANTS[variant].to_dict()["hidden"]]
    model = alexnet(variant, classes=16, hidden=hidden)
    paper_bias = dict.fromkeys(("conv2", "conv4", "conv5", "fc6", "fc7"), 1.0)
    for name in {name.split(".")[0] for name, _ in model.named_parameters()}:
        start = STARTS[variant].get(name, (0.01, paper_bias.get(name, 0.0)))
        weight, bias = model.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.bias")
        if start is None:
            bound = 1 / math.sqrt(weight[0].numel())
            assert 0.99 * bound < weight.abs().max() <= bound, name
            assert 0.5 * bound < bias.abs().max() <= bound, name
            assert abs(weight.std().item() - bound / math.sqrt(3)) < 0.02 * bound, name
        else:
            assert (bias == start[1]).all(), name
            assert abs(weight.std().item() / start[0] - 1) < 5 / math.sqrt(2 * weight.numel()), name


def test_seed_decides_the_weights() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return alexnet("digits").get_parameter("conv1.weight").detach()

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_grouped_layout() -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in alexnet("paper", classes=10).named_parameters()}
    assert shapes["conv1.weight"] == (96, 3, 11, 11)
    assert shapes["conv2.weight"] == (256, 48, 5, 5)
    assert shapes["conv3.weight"] == (384, 256, 3, 3)
    assert shapes["conv4.weight"] == (384, 192, 3, 3)
    assert shapes["conv5.weight"] == (256, 192, 3, 3)
    assert shapes["fc6.weight"] == (4096, 9216)


def test_features_are_the_last_hidden_activations() -> None:
    model = small("paper")
    features = model.features(pixels())
    assert features.shape == (2, 24)
    assert (features >= 0).all()
    torch.testing.assert_close(
        F.linear(features, model.get_parameter("fc8.weight"), model.get_parameter("fc8.bias")), model(pixels())
    )


def test_dropout_drops_and_keeps_the_expectation() -> None:
    model = small("paper").train()
    torch.manual_seed(0)
    features = model.features(pixels(count=2).repeat(8, 1, 1, 1))
    dropped = (features == 0).double().mean().item()
    assert dropped > 0.5
    assert not torch.equal(features[0], features[2])


class Thrice(nn.Module):
    """Replaces dropout to show where it is applied."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


@pytest.mark.parametrize(("variant", "position"), [("paper", "output"), ("one_weird_trick", "input")])
def test_dropout_stands_where_it_does_in_the_source(variant: str, position: str) -> None:
    """The paper drops outputs of fc6 and fc7; torchvision drops their inputs, and leaves the features whole."""
    model = small(variant).train()
    assert isinstance(model.dropout, nn.Dropout)
    assert model.dropout.p == 0.5
    model.dropout = Thrice()  # type: ignore[assignment]
    p = dict(model.named_parameters())
    maps: dict[str, Tensor] = {}
    model.get_submodule("stage5").register_forward_hook(
        lambda module, inputs, output: maps.update(x=torch.cat(output, 1).flatten(1))
    )
    features = model.features(pixels())
    x = maps["x"]
    for name in ("fc6", "fc7"):
        x = 3 * x if position == "input" else x
        x = F.relu(F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"]))
        x = 3 * x if position == "output" else x
    torch.testing.assert_close(features, x)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((2, 3, 31, 32), r"images must have shape \[N, 3, 32, 32\]"),
        ((2, 1, 32, 32), r"got \[2, 1, 32, 32\]"),
        ((3, 32, 32), r"got \[3, 32, 32\]"),
    ],
)
def test_other_shapes_are_refused(shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        alexnet("digits")(torch.zeros(shape))


def test_integer_pixels_are_refused() -> None:
    with pytest.raises(TypeError, match=r"floating-point.*got torch\.uint8"):
        alexnet("digits")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_an_empty_batch_gives_no_logits() -> None:
    assert alexnet("digits").eval()(torch.zeros(0, 3, 32, 32)).shape == (0, 10)


@pytest.mark.parametrize(
    "backend",
    [
        # Dynamo alone finds graph breaks; opcheck covers the rest of tracing.
        "eager",
        pytest.param("aot_eager", marks=pytest.mark.slow),
        pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.compiles]),
    ],
)
def test_compiles_without_a_break(backend: str) -> None:
    torch.manual_seed(0)
    # They add no case: conv1 has the same stage as conv2, and conv5 reads the same as conv4.
    without = ("conv2", "conv4") if backend == "eager" else ()
    model = alexnet("digits", dropout=0.0, without=without)
    images = torch.randn(4, 3, 32, 32) * 60
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for forward in (model, compiled):
        model.zero_grad()
        logits = forward(images)
        F.cross_entropy(logits, torch.arange(4)).backward()
        results.append([logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])  # type: ignore[union-attr]
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-4 * eager.abs().max().item())


def test_exports_with_any_batch_size() -> None:
    model = alexnet("digits").eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (torch.zeros(3, 3, 32, 32),), dynamic_shapes={"images": {0: batch}})
    images = torch.randn(5, 3, 32, 32) * 60
    torch.testing.assert_close(exported.module()(images), model(images))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_parameters_are_as_many_as_the_configuration_says(variant: str) -> None:
    with torch.device("meta"):
        model = AlexNet(VARIANTS[variant])
        size = VARIANTS[variant].image_size
        assert model(torch.zeros(2, 3, size, size)).shape == (2, VARIANTS[variant].classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == VARIANTS[variant].parameters


def test_shapes_are_those_of_the_configuration() -> None:
    model = alexnet("paper", image_size=SMALL, hidden=SMALL_HIDDEN, classes=7)
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str, output: list[Tensor]) -> None:
        shapes[name] = (sum(part.shape[1] for part in output), *output[0].shape[2:])

    for layer in model.config.layers():
        module = model.get_submodule(layer.name)
        module.register_forward_hook(lambda module, inputs, output, name=layer.name: keep(name, output))
    model(torch.zeros(1, 3, SMALL, SMALL))
    assert {layer.name: layer.output_shape for layer in model.config.layers()} == shapes


def test_the_paper_s_network_learns_a_batch() -> None:
    """A full forward pass, backward pass and update at the paper's image size; batch size 128 is in the benchmarks."""
    torch.manual_seed(0)
    model = AlexNet(network("paper"))
    loss = F.cross_entropy(model(torch.randn(2, 3, 224, 224) * 50), torch.tensor([3, 500]))
    loss.backward()
    assert 2 < loss.item() < 20
    before = model.get_parameter("fc6.weight")[0, :5].clone()
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert not torch.equal(before, model.get_parameter("fc6.weight")[0, :5])


def test_configuration_is_kept() -> None:
    assert isinstance(alexnet("digits").config, AlexNetConfig)
