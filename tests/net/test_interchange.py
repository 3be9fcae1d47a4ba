"""ONNX export and import, torch.export and AOTInductor: equal logits, and errors for unsupported files."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from net.analysis.trained import open_trained
from net.common.errors import DataError
from net.data import digits
from net.data.augmentation import ten_crops
from net.data.decode import decode
from net.data.sources import packed_size
from net.model import onnx_import, weights
from net.model.alexnet import AlexNet, alexnet
from net.model.config import VARIANTS, network
from net.training import checkpoint
from net.training.evaluation import probabilities
from tests.commands import ROOT, Done, one_line, run_here
from tests.pictures import picture

#: ONNX Runtime sums in another order than PyTorch; relative to the largest logit.
CLOSE = 2e-5

onnx_installed = pytest.mark.skipif(
    any(__import__("importlib.util").util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
    reason="needs onnx and onnxruntime, which the extra test has",
)


def lively(variant: str = "digits", seed: int = 0, **fields: Any) -> AlexNet:
    """A network whose logits depend on every layer: those of an untrained one hardly differ between images."""
    torch.manual_seed(seed)
    model = alexnet(variant, **fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(0, 0.1)
    return model


def save(folder: Path, model: AlexNet) -> Path:
    """Save a checkpoint of ``model``, as a run on the digits does."""
    data = digits.load()
    metadata = {"network": model.config.to_dict(), "classes": list(data.classes), "data_path": None}
    mean = torch.from_numpy(data.mean)
    path = checkpoint.path_of(folder / "checkpoints", 5)
    checkpoint.save(path, {"model": dict(model.state_dict()), "metadata": metadata, "mean_image": mean})
    return path


def export(model: AlexNet, output: Path, form: str) -> Done:
    return run_here("net.export", save(output.parent / "run", model), "--format", form, output)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(logits)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    scale = expected.abs().max()
    assert expected.std(0).max() > 0.02 * scale, "the logits do not depend on the image"
    assert (actual - expected).abs().max() < CLOSE * scale


def kinds(path: Path) -> list[str]:
    import onnx

    return [node.op_type for node in onnx.load(path).graph.node]


CASES: dict[str, dict[str, Any]] = {
    "paper's order": {},
    "across towers": {"lrn_across_towers": True, "lrn_k": 1.0},
    "one tower": {"towers": 1},
    "no exchange": {"exchange": False},
    "no lrn, no overlap": {"lrn": False, "overlapping_pooling": False},
    "tanh, ceil": {"activation": "tanh", "pool_ceil_mode": True},
    "without": {"without": ("conv1", "conv4")},
    "size 3": {"lrn_size": 3, "lrn_alpha": 0.01, "lrn_beta": 0.5},
    "program of 2012": {"original": True},
}


def case(name: str) -> AlexNet:
    fields = dict(CASES[name])
    if not fields.pop("original", False):
        return lively(lrn_alpha=fields.pop("lrn_alpha", 0.02), **fields)
    # Its order of operations, both normalizations and conv1's padding, at a small size.
    operations = {layer.name: list(layer.then) for layer in VARIANTS["original_code"].convolutions}
    layers = VARIANTS["digits"].to_dict()["convolutions"]
    changed = [{**layer, "then": operations[layer["name"]]} for layer in layers]
    changed[0] |= {"stride": 2, "padding": 0, "ceil_mode": True}
    return lively(convolutions=changed, image_size=48, lrn_alpha=0.02)


@onnx_installed
@pytest.mark.parametrize("name", CASES)
def test_onnx_runtime_says_the_same(tmp_path: Path, name: str) -> None:
    model = case(name)
    done = export(model, tmp_path / "network.onnx", "onnx")
    assert done.returncode == 0, done.stderr
    images = torch.randn(3, 3, model.config.image_size, model.config.image_size) * 60
    with torch.no_grad():
        assert_same(run_onnx(tmp_path / "network.onnx", images), model(images))
    if name == "paper's order":
        used = kinds(tmp_path / "network.onnx")
        assert (used.count("LRN"), used.count("Split"), used.count("Concat")) == (4, 2, 2)
    # And back.
    trained = open_trained(str(tmp_path / "network.onnx"), torch.device("cpu"))
    assert trained.network == model.config
    assert trained.classes == digits.load().classes
    for name, parameter in model.named_parameters():
        assert torch.equal(trained.model.get_parameter(name), parameter)


@onnx_installed
def test_ten_crops_in_onnx_runtime(tmp_path: Path) -> None:
    model = lively(seed=1, image_size=28)
    assert export(model, tmp_path / "network.onnx", "onnx").returncode == 0
    data = digits.load()
    crops = ten_crops(torch.from_numpy(data.val.images[:8]), torch.from_numpy(data.mean), 28)
    output = F.softmax(run_onnx(tmp_path / "network.onnx", crops.flatten(0, 1)), 1).view(8, 10, 10).mean(1)
    with torch.no_grad():
        assert_same(output, probabilities(model, crops, "fp32", torch.channels_last))


@onnx_installed
def test_an_onnx_file_is_evaluated_as_its_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path / "run", lively())
    assert run_here("net.export", path, tmp_path / "network.onnx").returncode == 0
    rows = []
    for source in (tmp_path / "network.onnx", path):
        done = run_here("net.evaluate", source, "--output", tmp_path / "e.json")
        assert done.returncode == 0, done.stderr
        rows += json.loads((tmp_path / "e.json").read_text())["results"]
    assert [row["loss"] for row in rows] == [rows[0]["loss"]] * 2


def caffe_graph(path: Path, *, padded: bool = False, spoil: Any = None) -> dict[str, Tensor]:
    """A small network in the layout of bvlc_alexnet in ONNX, node by node; returns its weights, which read BGR.

    ``padded``: for images whose feature maps have an even number of rows, padded by one at the end before pooling.
    """
    from onnx import TensorProto, helper, numpy_helper

    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, shape in (
        ("conv1", (8, 3, 11, 11)),
        ("conv2", (16, 4, 5, 5)),
        ("conv3", (12, 16, 3, 3)),
        ("conv4", (12, 6, 3, 3)),
        ("conv5", (8, 6, 3, 3)),
        ("fc6", (20, 32 if padded else 8)),
        ("fc7", (20, 20)),
        ("fc8", (7, 20)),
    ):
        tensors[f"{name}_w_0"] = torch.randn(shape) * float(np.prod(shape[1:])) ** -0.5
        tensors[f"{name}_b_0"] = torch.randn(shape[0]) * 0.1
    nodes: list[Any] = []

    def add(kind: str, name: str, weights: str = "", **attributes: Any) -> None:
        inputs = [
            nodes[-1].output[0] if nodes else "data_0",
            *([f"{weights}_w_0", f"{weights}_b_0"] if weights else []),
        ]
        inputs += ["shape"] if kind == "Reshape" else []
        nodes.append(helper.make_node(kind, inputs, [name], **attributes))

    lrn = {"size": 5, "alpha": 0.05, "beta": 0.75, "bias": 1.0}
    pool = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, int(padded), int(padded)]}
    add("Conv", "conv1_1", "conv1", strides=[4, 4], kernel_shape=[11, 11])
    add("Relu", "conv1_2")
    add("LRN", "norm1_1", **lrn)
    add("MaxPool", "pool1_1", **pool)
    add("Conv", "conv2_1", "conv2", group=2, pads=[2, 2, 2, 2])
    add("Relu", "conv2_2")
    add("LRN", "norm2_1", **lrn)
    add("MaxPool", "pool2_1", **pool)
    for number in (3, 4, 5):
        add("Conv", f"conv{number}_1", f"conv{number}", group=1 if number == 3 else 2, pads=[1, 1, 1, 1])
        add("Relu", f"conv{number}_2")
    add("MaxPool", "pool5_1", **pool)
    add("Reshape", "OC2_DUMMY_0")
    for number in (6, 7):
        add("Gemm", f"fc{number}_1", f"fc{number}", transB=1)
        add("Relu", f"fc{number}_2")
        add("Dropout", f"fc{number}_3")
    add("Gemm", "fc8_1", "fc8", transB=1)
    if spoil is not None:
        spoil(nodes, tensors)
    initializers = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
    initializers.append(numpy_helper.from_array(np.array([0, -1]), "shape"))
    value, images = helper.make_tensor_value_info, 71 if padded else 67
    graph = helper.make_graph(
        nodes,
        "bvlc_alexnet",
        [value("data_0", TensorProto.FLOAT, ["N", 3, images, images])],
        [value(nodes[-1].output[0], TensorProto.FLOAT, ["N", 7])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return tensors


@onnx_installed
@pytest.mark.parametrize("padded", [False, True])
def test_caffe_s_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str], padded: bool) -> None:
    path = tmp_path / "bvlc.onnx"
    tensors = caffe_graph(path, padded=padded)
    trained = open_trained(str(path), torch.device("cpu"))
    assert "converted from BGR to RGB" in capsys.readouterr().out
    config = trained.network
    assert (config.variant, config.lrn_k, config.lrn_alpha, config.lrn_across_towers) == (
        "caffe",
        1.0,
        pytest.approx(0.05),
        True,
    )
    assert config.pool_ceil_mode == padded
    model = trained.model
    images = torch.randn(4, 3, config.image_size, config.image_size) * 60
    with torch.no_grad():
        expected = run_onnx(path, images.flip(1))
        assert_same(model(images), expected)
        # LRN across groups matters, and so does the order of the channels.
        wrong = AlexNet(dataclasses.replace(config, lrn_across_towers=False)).eval()
        weights.load_weights(wrong, model.state_dict())
        assert (wrong(images) - expected).abs().max() > 1e-3 * expected.abs().max()
        assert (model(images.flip(1)) - expected).abs().max() > 1e-2 * expected.abs().max()
        # The same from a state dict in Caffe's order. Its memory format differs, and may change the order of sums.
        other = AlexNet(config).eval()
        weights.load_weights(other, onnx_import.from_bgr(tensors))
        for name, parameter in model.named_parameters():
            assert torch.equal(other.get_parameter(name), parameter), name
        assert_same(other(images), model(images))


@onnx_installed
def test_the_whole_caffe_network_is_the_variant(tmp_path: Path) -> None:
    """The published file: 224x224 images, its last pooling padded so that fc6 reads 6x6 maps."""
    from onnx import TensorProto, helper

    from net.model.onnx_import import _walk

    config = VARIANTS["caffe"]
    model = alexnet("caffe").to("meta")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    nodes, value = [], "data"
    for layer in config.convolutions:
        attributes = {"strides": [layer.stride] * 2, "pads": [layer.padding] * 4}
        attributes["group"] = 2 if layer.reads == "tower" and layer.name != "conv1" else 1
        nodes.append(
            helper.make_node("Conv", [value, f"{layer.name}.weight", f"{layer.name}.bias"], [layer.name], **attributes)
        )
        value = layer.name
        for operation in layer.then:
            kind = {"activation": "Relu", "lrn": "LRN", "pool": "MaxPool"}[operation]
            attributes = {"lrn": {"size": 5, "alpha": 1e-4, "beta": 0.75, "bias": 1.0}}.get(operation, {})
            if operation == "pool":
                end = int(layer.name == "conv5")
                attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, end, end]}
            nodes.append(helper.make_node(kind, [value], [f"{layer.name}/{operation}"], **attributes))
            value = f"{layer.name}/{operation}"
    for name in ("fc6", "fc7", "fc8"):
        nodes.append(helper.make_node("Gemm", [value, f"{name}.weight", f"{name}.bias"], [name], transB=1))
        value = name
        if name != "fc8":
            nodes.append(helper.make_node("Relu", [value], [f"{name}/relu"]))
            value = f"{name}/relu"
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    for size, expected in ((224, 227), (227, 227)):
        data = helper.make_tensor_value_info("data", TensorProto.FLOAT, [1, 3, size, size])
        chain, rows = _walk(Path("bvlc.onnx"), helper.make_graph(nodes, "g", [data], []), nodes, tensors)
        assert rows == size
        found = chain.fitting(rows)
        assert found.image_size == expected
        assert [(layer.kind, layer.output_shape, layer.groups) for layer in found.layers()] == [
            (layer.kind, layer.output_shape, layer.groups) for layer in config.layers()
        ]
        for name in (
            "lrn_k",
            "lrn_alpha",
            "lrn_size",
            "lrn_beta",
            "lrn_across_towers",
            "overlapping_pooling",
            "towers",
        ):
            assert getattr(found, name) == pytest.approx(getattr(config, name))
        assert [layer.then for layer in found.convolutions] == [layer.then for layer in config.convolutions]


def converted(path: Path, style: str) -> None:
    """Rewrite a file as converters do: weights that are no initializers, half precision, MatMul and Add."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    weights = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    before: list[Any] = []
    if style == "external":
        onnx.save(model, path, save_as_external_data=True, location="beside.bin", size_threshold=1024)
        return
    if style == "constants":
        before = [helper.make_node("Constant", [], [item.name], value=item) for item in graph.initializer]
        del graph.initializer[:]
    elif style == "identities":
        for item in graph.initializer:
            before.append(helper.make_node("Identity", [f"{item.name}/stored"], [item.name]))
            item.name += "/stored"
    elif style == "transposed":
        name = "fc6_w_0"
        graph.initializer.remove(next(item for item in graph.initializer if item.name == name))
        graph.initializer.append(numpy_helper.from_array(weights[name].T.copy().reshape(-1), f"{name}/flat"))
        sizes = numpy_helper.from_array(np.array(weights[name].T.shape), f"{name}/sizes")
        graph.initializer.append(sizes)
        before = [
            helper.make_node("Reshape", [f"{name}/flat", f"{name}/sizes"], [f"{name}/columns"]),
            helper.make_node("Transpose", [f"{name}/columns"], [name], perm=[1, 0]),
        ]
    elif style == "zero bias":
        graph.initializer.remove(next(item for item in graph.initializer if item.name == "fc8_b_0"))
        graph.initializer.append(numpy_helper.from_array(np.array([7]), "seven"))
        before = [helper.make_node("ConstantOfShape", ["seven"], ["fc8_b_0"])]
    elif style == "half":
        for item in graph.initializer:
            if item.data_type == TensorProto.FLOAT:
                item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float16), item.name))
        before = [helper.make_node("Cast", ["data_0"], ["half"], to=TensorProto.FLOAT16)]
        graph.node[0].input[0] = "half"
        graph.node[-1].output[0] = "half_logits"
        graph.node.append(helper.make_node("Cast", ["half_logits"], ["fc8_1"], to=TensorProto.FLOAT))
    elif style == "products":
        nodes = []
        for node in graph.node:
            if node.op_type == "Gemm":
                data, weight, bias = node.input
                nodes += [
                    helper.make_node("Transpose", [weight], [f"{weight}/T"], perm=[1, 0]),
                    helper.make_node("MatMul", [data, f"{weight}/T"], [f"{node.output[0]}/product"]),
                    helper.make_node("Add", [bias, f"{node.output[0]}/product"], list(node.output)),
                ]
            else:
                nodes.append(node)
        del graph.node[:]
        before = nodes
    nodes = [*before, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


STYLES = ("constants", "identities", "transposed", "zero bias", "half", "products", "external")


@onnx_installed
@pytest.mark.parametrize("style", STYLES)
def test_what_converters_write(tmp_path: Path, style: str) -> None:
    path = tmp_path / "bvlc.onnx"
    caffe_graph(path)
    converted(path, style)
    model = open_trained(str(path), torch.device("cpu")).model
    images = torch.randn(4, 3, 67, 67) * 60
    expected = run_onnx(path, images.flip(1))
    with torch.no_grad():
        actual = model(images)
    if style == "half":
        # Half-precision activations have 11 significant bits.
        assert (actual - expected).abs().max() < 0.01 * expected.abs().max()
    else:
        assert_same(actual, expected)


@onnx_installed
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda tensor: setattr(tensor, "data_type", 99), "damaged or not an ONNX file"),
        (lambda tensor: setattr(tensor, "raw_data", tensor.raw_data[:-4]), "damaged or not an ONNX file"),
        (lambda tensor: tensor.dims.__setitem__(0, 2**40), "damaged or not an ONNX file"),
        (lambda tensor: tensor.dims.__setitem__(0, -1), "damaged or not an ONNX file"),
    ],
    ids=["type", "short", "large", "negative"],
)
def test_tensors_that_are_not_what_they_say(tmp_path: Path, spoil: Any, says: str) -> None:
    import onnx

    path = tmp_path / "bvlc.onnx"
    caffe_graph(path)
    model = onnx.load(path)
    spoil(model.graph.initializer[0])
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=rf"bvlc\.onnx.*{says}"):
        weights.read(path)


@onnx_installed
@pytest.mark.parametrize("location", ["../secret.bin", "pipe", "/etc/passwd", "nowhere"])
@pytest.mark.timeout(60)
def test_data_beside_the_file(tmp_path: Path, location: str) -> None:
    import onnx

    (tmp_path / "secret.bin").write_bytes(bytes(10**6))
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    caffe_graph(folder / "bvlc.onnx")
    model = onnx.load(folder / "bvlc.onnx")
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    (folder / "bvlc.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=r"outside of the model's folder|is a pipe|does not exist"):
        weights.read(folder / "bvlc.onnx")


@onnx_installed
@pytest.mark.parametrize("sizes", [[2**40], [2**20, 2**20], [-1], [2**62, 4]])
@pytest.mark.timeout(60)
def test_constants_larger_than_memory(tmp_path: Path, sizes: list[int]) -> None:
    import onnx
    from onnx import helper, numpy_helper

    path = tmp_path / "bvlc.onnx"
    caffe_graph(path)
    model = onnx.load(path)
    nodes = [helper.make_node("ConstantOfShape", ["sizes"], ["large"]), *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.array(sizes), "sizes"))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=r"bvlc\.onnx: operator ConstantOfShape \(output large\): .* makes a tensor"):
        weights.read(path)


@onnx_installed
def test_caffe_s_networks_are_asked_with_a_colour(tmp_path: Path) -> None:
    """Their files hold no mean image; its colour is known, and given by a flag."""
    caffe_graph(tmp_path / "bvlc.onnx")
    picture(0, 0, 90, 80).save(tmp_path / "a.png")
    answers = []
    for colour in ((), ("--mean-rgb", 123, 117, 104), ("--mean-rgb", 0, 0, 0)):
        done = run_here("net.predict", tmp_path / "bvlc.onnx", tmp_path / "a.png", "--json", *colour)
        if not colour:
            one_line(
                Done(done.returncode, "", done.stderr.splitlines()[-1]), 1, "bvlc.onnx holds no mean image to subtract",
                "--mean-rgb R G B", "were trained with 123 117 104",
            )  # fmt: skip
            continue
        assert done.returncode == 0, done.stderr
        answers.append([item["probability"] for item in json.loads(done.stdout)["predictions"][0]["top"]])
    trained = open_trained(str(tmp_path / "bvlc.onnx"), torch.device("cpu"), (123.0, 117.0, 104.0))
    pixels = torch.from_numpy(decode(tmp_path / "a.png", packed_size(67)))[None].float()
    low = (packed_size(67) - 67) // 2
    crop = (pixels - torch.tensor([123.0, 117.0, 104.0]))[:, low : low + 67, low : low + 67].permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = trained.model(crop).softmax(1).topk(5).values[0].tolist()
    assert answers[0] == pytest.approx(expected, rel=1e-4)
    assert answers[1] != pytest.approx(expected, rel=1e-2)


def _replace(nodes: list[Any], output: str, kind: str, **attributes: Any) -> None:
    from onnx import helper

    for number, node in enumerate(nodes):
        if node.output[0] == output:
            inputs = list(node.input)
            nodes[number] = helper.make_node(kind, inputs, [output], **attributes)


@onnx_installed
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda nodes, _: _replace(nodes, "conv3_2", "Sigmoid"), "operator Sigmoid (output conv3_2) is not supported"),
        (lambda nodes, _: _replace(nodes, "fc7_2", "Softmax"), "operator Gemm (output fc8_1) is not supported"),
        (
            lambda nodes, _: _replace(
                nodes, "pool2_1", "MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"
            ),
            "operator MaxPool (output pool2_1) must have a window of 2 or 3",
        ),
        (
            lambda nodes, _: _replace(nodes, "norm2_1", "LRN", size=4, alpha=0.05),
            "operator LRN (output norm2_1) has size 4; sizes must be odd",
        ),
        (lambda nodes, _: _replace(nodes, "norm2_1", "LRN", size=5, alpha=0.1), "they must be equal"),
        (
            lambda nodes, _: _replace(nodes, "conv2_1", "Conv", group=2, pads=[2, 2, 1, 2]),
            "operator Conv (output conv2_1) has pads [2, 2, 1, 2]",
        ),
        (lambda nodes, _: _replace(nodes, "fc7_1", "Gemm", transB=1, alpha=2.0), "must be a plain product"),
        (lambda nodes, tensors: tensors.update(fc6_w_0=torch.zeros(20, 32)), "layer sizes are inconsistent"),
        (lambda nodes, _: nodes[8].input.pop(), "Conv (output conv3_1) has no bias in the file"),
        (
            lambda nodes, _: nodes[1].input.__setitem__(0, "data_0"),
            "does not read conv1_1; the operators must be a chain",
        ),
    ],
    ids=["operator", "softmax", "pool", "even", "two LRNs", "pads", "alpha", "sizes", "bias", "branch"],
)
def test_other_networks_are_refused(tmp_path: Path, spoil: Any, says: str) -> None:
    caffe_graph(tmp_path / "other.onnx", spoil=spoil)
    one_line(run_here("net.export", tmp_path / "other.onnx", tmp_path / "again.onnx"), 1, "other.onnx", says)
    assert not (tmp_path / "again.onnx").exists()


@onnx_installed
@pytest.mark.parametrize(
    ("layer", "attributes", "shapes", "says"),
    [
        ("fc6", None, {"weight": (8,)}, "(output fc6_1) has "),
        ("fc6", None, {"weight": ()}, "(output fc6_1) has "),
        ("fc6", None, {"bias": ()}, "(output fc6_1) adds [] to 20 features"),
        ("fc6", None, {"bias": (21,)}, "(output fc6_1) adds [21] to 20 features"),
        ("conv3", None, {"bias": ()}, "(output conv3_1) adds [] to 12 channels"),
        ("conv3", None, {"weight": (12, 16)}, "(output conv3_1) must have a square kernel"),
        ("conv3", {"pads": [1, 1]}, {}, "(output conv3_1) has pads [1, 1]; they must be 4 equal numbers"),
        ("conv3", {"pads": []}, {}, "(output conv3_1) has pads []; they must be 4 equal numbers"),
        ("conv3", {"pads": [1]}, {}, "(output conv3_1) has pads [1]; they must be 4 equal numbers"),
        ("conv3", {"kernel_shape": [5, 5]}, {}, "(output conv3_1) has kernel_shape [5, 5] and a weight for [3, 3]"),
    ],
)
def test_operators_that_nobody_would_write(
    tmp_path: Path, layer: str, attributes: dict[str, Any] | None, shapes: dict[str, Any], says: str
) -> None:
    """Damaged or hostile: every one is named, and none is read as something else."""

    def spoil(nodes: list[Any], tensors: dict[str, Tensor]) -> None:
        if attributes is not None:
            _replace(nodes, f"{layer}_1", "Conv", pads=[1, 1, 1, 1], kernel_shape=[3, 3])
            (node,) = [node for node in nodes if node.output[0] == f"{layer}_1"]
            for item in node.attribute:
                if item.name in attributes:
                    del item.ints[:]
                    item.ints.extend(attributes[item.name])
        for part, size in shapes.items():
            tensors[f"{layer}_{part[0]}_0"] = torch.zeros(size)

    path = tmp_path / "other.onnx"
    caffe_graph(path, spoil=spoil)
    with pytest.raises(DataError, match=re.escape(says)):
        weights.read(path)


@onnx_installed
def test_a_changed_graph_of_this_program_is_refused(tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "network.onnx"
    assert export(lively(), path, "onnx").returncode == 0
    model = onnx.load(path)
    (node,) = [node for node in model.graph.node if node.output[0].endswith("/tower1/lrn")][:1]
    next(item for item in node.attribute if item.name == "bias").f = 1.0
    path.write_bytes(model.SerializeToString())
    one_line(run_here("net.evaluate", path), 1, "its operators do not match its network metadata, variant digits")
    path.write_bytes(b"\x07junk")
    one_line(run_here("net.evaluate", path), 1, "network.onnx is damaged or not an ONNX file")


@onnx_installed
def test_even_windows_are_refused(tmp_path: Path) -> None:
    one_line(export(lively(lrn_size=4), tmp_path / "n.onnx", "onnx"), 2, "lrn_size 4 cannot be exported")
    assert not (tmp_path / "n.onnx").exists()


def test_torch_export_needs_nothing_of_this_package(tmp_path: Path) -> None:
    model = lively()
    done = export(model, tmp_path / "network.pt2", "torch-export")
    assert done.returncode == 0, done.stderr
    images = torch.randn(5, 3, 32, 32) * 60
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch; program = torch.export.load('network.pt2'); images = torch.load('images.pt')\n"
        "assert not {'net', 'kernels'} & set(sys.modules)\n"
        "torch.save(program.module()(images).detach(), 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    extra = {"alexnet": ""}
    torch.export.load(tmp_path / "network.pt2", extra_files=extra)
    assert json.loads(extra["alexnet"])["network"]["variant"] == "digits"
    with torch.no_grad():
        assert_same(torch.load(tmp_path / "logits.pt"), model(images))


@pytest.mark.compiles
@pytest.mark.slow
def test_aotinductor_package(tmp_path: Path) -> None:
    model = lively()
    done = export(model, tmp_path / "network.pt2", "aoti")
    assert done.returncode == 0, done.stderr
    assert "contiguous float32 images [N, 3, 32, 32]" in done.stdout
    package = torch._inductor.aoti_load_package(str(tmp_path / "network.pt2"))
    assert json.loads(package.get_metadata()["alexnet"])["network"]["variant"] == "digits"
    images = torch.randn(5, 3, 32, 32) * 60
    with torch.no_grad():
        assert_same(package(images), model(images))
        torch.testing.assert_close(package(images[:1]), package(images)[:1])
    # Other images, and the variable that turns PyTorch's check on.
    code = (
        "import torch; package = torch._inductor.aoti_load_package('network.pt2'); images = torch.ones(5, 3, 32, 32)\n"
        "package(images)\n"
        "for wrong in (images.to(memory_format=torch.channels_last), images.double(), images[..., :30]):\n"
        "    try: package(wrong)\n"
        "    except RuntimeError as error: assert 'unmatched' in str(error), error\n"
        "    else: raise SystemExit(f'no error for {wrong.dtype} {wrong.stride()}')"
    )
    checked = {**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=checked, check=True)


def test_what_cannot_be_exported_costs_one_line(tmp_path: Path) -> None:
    path = save(tmp_path / "a", lively())
    state = checkpoint.load(path)
    del state["digest"]
    state["metadata"]["network"] = network("digits", exchange=False).to_dict()
    other = checkpoint.path_of(tmp_path / "b" / "checkpoints", 5)
    checkpoint.save(other, state)
    onnx = tmp_path / "n.onnx"
    for arguments, status, says in (
        ((tmp_path / "nowhere", onnx), 1, "nowhere does not exist"),
        (
            (other, onnx),
            1,
            "weights do not fit variant digits: conv3.weight is [96, 64, 3, 3] instead of [96, 32, 3, 3]",
        ),
        ((path, tmp_path / "n.pt2"), 2, "OUTPUT must end in .onnx for --format onnx"),
        ((path, onnx, "--format", "aoti"), 2, "OUTPUT must end in .pt2 for --format aoti"),
        ((path, tmp_path / "no" / "n.onnx"), 2, "no does not exist"),
    ):
        one_line(run_here("net.export", *arguments), status, says)
    assert not onnx.exists()


def test_without_onnx_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    done = run_here("net.export", save(tmp_path, lively()), tmp_path / "n.onnx")
    one_line(done, 2, f"ONNX files need an extra: pip install -e '{ROOT}[onnx]'")


def test_one_convolution_reads_colours() -> None:
    state = {"conv1.weight": torch.arange(6.0).view(2, 3, 1, 1), "conv1.bias": torch.zeros(2)}
    assert onnx_import.from_bgr(state)["conv1.weight"].flatten().tolist() == [2, 1, 0, 5, 4, 3]
    assert torch.equal(onnx_import.from_bgr(onnx_import.from_bgr(state))["conv1.weight"], state["conv1.weight"])
    with pytest.raises(DataError, match="exactly one convolution must have three input channels; got none"):
        onnx_import.from_bgr({"conv1.weight": torch.zeros(2, 1, 3, 3)})
