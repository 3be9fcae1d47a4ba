"""Weights from elsewhere, by any of the names they go by."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from net import checkpoint, weights
from net.alexnet import AlexNet, alexnet
from net.errors import DataError

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


def test_one_tensor_under_two_names_is_refused() -> None:
    source = state()
    source["module.conv1.weight"] = source["conv1.weight"]
    with pytest.raises(DataError, match=r"two of the source's tensors mean conv1\.weight"):
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
