"""Weights from other programs, with their parameter names."""

import dataclasses
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from net.analysis.trained import open_trained
from net.common.device import peak_memory_mib
from net.common.errors import DataError
from net.data.augmentation import centre_crop
from net.model import weights
from net.model.alexnet import AlexNet, alexnet
from net.model.config import VARIANTS
from net.training import checkpoint

#: torchvision's names, in the order of the layers.
TORCHVISION = ("features.0", "features.3", "features.6", "features.8", "features.10")
TORCHVISION += ("classifier.1", "classifier.4", "classifier.6")


def model(seed: int = 0, variant: str = "digits") -> AlexNet:
    torch.manual_seed(seed)
    return alexnet(variant)


def state(seed: int = 1) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model(seed).named_parameters()}


def same(network: AlexNet, tensors: dict[str, Tensor]) -> bool:
    return all(torch.equal(parameter, tensors[name]) for name, parameter in network.named_parameters())


@pytest.mark.parametrize(
    "rename",
    [
        lambda layer, kind: f"{layer}.{kind}",
        lambda layer, kind: f"module.{layer}.{kind}",
        lambda layer, kind: f"_orig_mod.module.{layer}.{kind}",
        lambda layer, kind: f"{layer}_{kind[0]}_0",
        lambda layer, kind: f"{layer}_{kind}",
        lambda layer, kind: f"{layer}.{0 if kind == 'weight' else 1}",
        lambda layer, kind: f"{TORCHVISION[(int(layer[-1]) - 1) % 8]}.{kind}",
    ],
    ids=["own", "distributed", "compiled", "onnx", "underscore", "caffe", "torchvision"],
)
def test_names_from_elsewhere(rename) -> None:  # type: ignore[no-untyped-def]
    source = state()
    renamed = {rename(*name.split(".")): tensor for name, tensor in source.items()}
    network = model()
    report = weights.load_weights(network, renamed)
    assert same(network, source)
    assert len(report.loaded) == 16
    assert report.problems() == ""


def test_files(tmp_path: Path) -> None:
    source = model(1)
    weights.save(tmp_path / "model.safetensors", source.state_dict(), {"network": source.config.to_dict()})
    tensors, metadata = weights.read(tmp_path / "model.safetensors")
    assert metadata == {"network": source.config.to_dict()}
    assert set(tensors) == {name for name, _ in source.named_parameters()}
    checkpoint.save(tmp_path / "step.pt", {"model": dict(source.state_dict()), "metadata": {}})
    for path in (tmp_path / "model.safetensors", str(tmp_path / "step.pt")):
        network = model()
        weights.load_weights(network, path)
        assert same(network, state())


def test_channels_last_weights_are_saved_in_the_usual_layout(tmp_path: Path) -> None:
    source = model(1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights.save(tmp_path / "model.safetensors", source.state_dict(), {})
    network = model()
    weights.load_weights(network, tmp_path / "model.safetensors")
    assert same(network, state())


def test_what_does_not_match_is_said_and_nothing_changes() -> None:
    source = state()
    del source["conv3.bias"]
    source["fc8.weight"] = torch.zeros(100, 256)
    source["norm.weight"] = torch.zeros(3)
    network = model()
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    with pytest.raises(DataError) as refused:
        weights.load_weights(network, source)
    for part in (
        "fc8.weight is [100, 256] instead of [10, 256]",
        "missing: conv3.bias",
        "not in the network: norm.weight",
    ):
        assert part in str(refused.value)
    assert same(network, before)
    report = weights.load_weights(network, source, strict=False)
    assert report.missing == ("conv3.bias",)
    assert report.unexpected == ("norm.weight",)
    assert report.mismatched == (("fc8.weight", (10, 256), (100, 256)),)
    assert len(report.loaded) == 14
    assert torch.equal(network.get_parameter("conv1.weight"), source["conv1.weight"])
    assert torch.equal(network.get_parameter("conv3.bias"), before["conv3.bias"])


@pytest.mark.parametrize("part", ["module", "model", "_orig_mod", "net", "_fsdp_wrapped_module"])
def test_what_a_network_was_wrapped_in_is_seen_through_wherever_it_stands(part: str) -> None:
    """pytorch/examples wraps only AlexNet's features: features.module.0.weight."""
    for pattern in (f"{part}.{{}}.{{}}", f"{{}}.{part}.{{}}", f"{part}.{{}}.{part}.{{}}"):
        renamed = {pattern.format(*name.split(".")): tensor for name, tensor in state().items()}
        network = model()
        weights.load_weights(network, renamed)
        assert same(network, state())
    collide = {**state(), f"conv1.{part}.weight": torch.zeros(1)}
    with pytest.raises(DataError, match=r"two tensors of the source map to conv1\.weight"):
        weights.load_weights(model(), collide)


WRAPPED = {
    "plain": lambda tensors: tensors,
    "training checkpoint": lambda tensors: {"epoch": 3, "arch": "alexnet", "state_dict": tensors, "best": 56.5},
    "model_state_dict": lambda tensors: {"model_state_dict": tensors, "optimizer": {"param_groups": [{"lr": 0.1}]}},
    "twice": lambda tensors: {"model": {"state_dict": tensors}},
    "ordered": OrderedDict,
    "parameters": lambda tensors: {name: nn.Parameter(tensor) for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=list(WRAPPED))
def test_state_dicts_that_torch_save_wrote(tmp_path: Path, wrapped, legacy: bool) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "other.pth"
    torch.save(wrapped(state()), path, _use_new_zipfile_serialization=not legacy)
    network = model()
    weights.load_weights(network, path)
    assert same(network, state())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1], "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        ({}, "holds no state dict"),
        ({1: torch.zeros(3)}, "holds no state dict"),
        (
            {"conv1.weight": torch.full((3,), float("nan"))},
            "conv1.weight holds infinite or NaN weights",
        ),
    ],
    ids=str,
)
def test_files_of_torch_save_without_weights(tmp_path: Path, content: object, says: str) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(DataError, match=rf"other\.pth.*{says}"):
        weights.read(tmp_path / "other.pth")


def test_a_whole_model_is_told_to_save_its_state_dict(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "other.pth")
    with pytest.raises(DataError, match=r"references torch\.nn\.modules\.linear\.Linear; save a model\'s state_dict"):
        weights.read(tmp_path / "other.pth")


def torchvision_s() -> nn.Module:
    """torchvision's AlexNet with 16 instead of 4096 features."""

    def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, size, stride, 2 if size > 3 else 1), nn.ReLU()]

    pool = nn.MaxPool2d(3, 2)
    model = nn.Module()
    model.features = nn.Sequential(
        *convolution(3, 64, 11, 4), pool, *convolution(64, 192, 5), pool, *convolution(192, 384, 3),
        *convolution(384, 256, 3), *convolution(256, 256, 3), pool,
    )  # fmt: skip
    hidden = [nn.Dropout(), nn.Linear(9216, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 16), nn.ReLU()]
    model.classifier = nn.Sequential(*hidden, nn.Linear(16, 10))
    return model.eval()


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_torchvision_s_weights_give_torchvision_s_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    """Its pixels are normalized, in [0, 1]; ours are mean-subtracted, in 0..255 units."""
    narrow = tuple(dataclasses.replace(layer, features=16) for layer in VARIANTS["one_weird_trick"].hidden)
    monkeypatch.setitem(VARIANTS, "one_weird_trick", dataclasses.replace(VARIANTS["one_weird_trick"], hidden=narrow))
    torch.manual_seed(0)
    theirs = torchvision_s()
    if ending == "pth":
        # As saved by pytorch/examples.
        names = {name.replace("features.", "features.module."): tensor for name, tensor in theirs.state_dict().items()}
        torch.save({"state_dict": names, "arch": "alexnet", "epoch": 90}, tmp_path / "alexnet.pth")
    else:
        save_file(theirs.state_dict(), tmp_path / "alexnet.safetensors")
    trained = open_trained(str(tmp_path / f"alexnet.{ending}"), torch.device("cpu"))
    assert "torchvision's AlexNet" in capsys.readouterr().out
    assert trained.mean is None
    assert trained.mean_rgb == pytest.approx((123.675, 116.28, 103.53))
    assert trained.network.classes == 10
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalized = (pixels.permute(0, 3, 1, 2) / 255 - mean) / deviation
    ours = centre_crop(pixels, trained.colour_image(224), 224)[:, 0]
    with torch.no_grad():
        expected = theirs.classifier(theirs.features(normalized).flatten(1))
        torch.testing.assert_close(trained.model(ours), expected, rtol=1e-4, atol=1e-5)
    # A run initialized from the file gets the same weights; a state dict is loaded unconverted.
    network = alexnet("one_weird_trick", classes=10)
    weights.load_weights(network, tmp_path / f"alexnet.{ending}")
    assert torch.equal(network.get_parameter("conv1.weight"), trained.model.get_parameter("conv1.weight"))
    weights.load_weights(network, theirs.state_dict())
    assert torch.equal(network.get_parameter("conv1.weight"), theirs.features[0].weight)


@pytest.mark.timeout(60)
def test_a_small_file_that_names_millions_of_classes(tmp_path: Path) -> None:
    """Shapes are compared before a network of that size is allocated: it would take 6 GB."""
    config = {**model().config.to_dict(), "classes": 6_000_000, "hidden": []}
    content = {"model": {}, "metadata": {"network": config, "classes": None, "data_path": None}}
    checkpoint.save(tmp_path / "a.pt", {**content, "mean_image": torch.zeros(2, 2, 3)})
    weights.save(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, content["metadata"])
    for name in ("a.pt", "a.safetensors"):
        before = peak_memory_mib(torch.device("cpu"))
        with pytest.raises(DataError, match=f"{name}: weights do not fit variant digits"):
            open_trained(str(tmp_path / name), torch.device("cpu"))
        assert peak_memory_mib(torch.device("cpu")) < before + 200


@pytest.mark.parametrize(
    "text", ["5", "[]", "{", "[" * 100_000, '{"network": 5}', '{"network": {"classes": %s}}' % (9**400)]
)
def test_metadata_that_are_none(tmp_path: Path, text: str) -> None:
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "a.safetensors", {"alexnet": text})
    with pytest.raises(DataError, match=r"a\.safetensors: its network metadata is invalid"):
        open_trained(str(tmp_path / "a.safetensors"), torch.device("cpu"))


def test_one_tensor_under_two_names_is_refused() -> None:
    source = state()
    source["module.conv1.weight"] = source["conv1.weight"]
    with pytest.raises(DataError, match=r"two tensors of the source map to conv1\.weight"):
        weights.load_weights(model(), source)


@pytest.mark.parametrize(("name", "content"), [("a.safetensors", b"junk"), ("a.safetensors", b""), ("a.pt", b"junk")])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        weights.read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=name):
        weights.read(tmp_path / name)


def test_foreign_safetensors_file(tmp_path: Path) -> None:
    save_file(
        {
            f"{layer}.{kind}": state()[f"{ours}.{kind}"]
            for layer, ours in zip(
                TORCHVISION, ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"), strict=True
            )
            for kind in ("weight", "bias")
        },
        tmp_path / "foreign.safetensors",
    )
    network = model()
    weights.load_weights(network, tmp_path / "foreign.safetensors")
    assert same(network, state())
