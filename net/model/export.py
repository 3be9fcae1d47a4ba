"""Export to ONNX, ``torch.export`` and AOTInductor packages. :mod:`.onnx_import` reads ONNX.

The exported network is in evaluation mode, with a dynamic batch size: input ``images``, float32
``[N, 3, image_size, image_size]``, RGB mean-subtracted pixels in 0..255 units; output ``logits``, ``[N, classes]``.
Parameters keep their names and layout. PyTorch and ONNX both divide alpha by the window size.

The ONNX graph is generated from the network's configuration, operator by operator; a normalization within towers is
Split, LRN for each tower, Concat.
"""

import io
import json
from collections.abc import Mapping
from typing import Any

import torch

import kernels
from kernels import compiler

from ..common.errors import UsageError
from ..readers.onnx import library
from ..readers.safetensors import METADATA
from .alexnet import AlexNet
from .config import AlexNetConfig, Operation

INPUT, OUTPUT = "images", "logits"
#: The first opset whose Split and MaxPool have what is needed here; all current runtimes support it.
OPSET = 13
#: An ONNX IR version old enough for old runtimes.
IR_VERSION = 8


class _Graph:
    """Builder of a network's nodes; outputs are named after layers and operations."""

    def __init__(self, config: AlexNetConfig) -> None:
        self.helper = library().helper
        self.config = config
        self.nodes: list[Any] = []
        if config.lrn_size % 2 == 0 and any("lrn" in config.operations(layer) for layer in config.convolutions):
            raise UsageError(
                f"lrn_size {config.lrn_size} cannot be exported: it must be odd, because an even window is longer "
                "after the channel in ONNX, but before it in PyTorch"
            )

    def add(self, kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        """Append a node; returns its first output."""
        self.nodes.append(self.helper.make_node(kind, inputs, list(outputs), name=outputs[0], **attributes))
        return outputs[0]

    def split(self, value: str, axis: int) -> list[str]:
        """Split ``value`` into one part per tower."""
        parts = [f"{value}/tower{number}" for number in range(self.config.towers)]
        self.add("Split", [value], *parts, axis=axis)
        return parts

    def operation(self, operation: Operation, value: str, layer: str) -> str:
        """Append one of the operations after ``layer``, applied to ``value``."""
        config, name = self.config, f"{layer}/{operation}"
        if operation == "activation":
            return self.add("Relu" if config.activation == "relu" else "Tanh", [value], name)
        if operation == "pool":
            size = [config.pool_size] * 2
            ceil_mode = int(config.pool_ceil_mode)
            return self.add("MaxPool", [value], name, kernel_shape=size, strides=[2, 2], ceil_mode=ceil_mode)
        if operation == "lrn":
            window = {
                "size": config.lrn_size,
                "alpha": config.lrn_alpha,
                "beta": config.lrn_beta,
                "bias": config.lrn_k,
            }
            if config.towers == 1 or config.lrn_across_towers:
                return self.add("LRN", [value], name, **window)
            parts = [self.add("LRN", [part], f"{part}/lrn", **window) for part in self.split(value, 1)]
            return self.add("Concat", parts, name, axis=1)
        # See net.model.alexnet.map_norm.
        for constant, number in (("scale", 0.001), ("one", 1.0), ("exponent", -0.75)):
            self.add("Constant", [], f"{name}/{constant}", value_float=number)
        square = self.add("Mul", [value, value], f"{name}/square")
        mean = self.add(
            "AveragePool",
            [square],
            f"{name}/mean",
            kernel_shape=[5, 5],
            strides=[1, 1],
            pads=[2, 2, 2, 2],
            count_include_pad=1,
        )
        scaled = self.add("Mul", [mean, f"{name}/scale"], f"{name}/scaled")
        base = self.add("Add", [scaled, f"{name}/one"], f"{name}/base")
        power = self.add("Pow", [base, f"{name}/exponent"], f"{name}/power")
        return self.add("Mul", [value, power], name)

    def dense(self, value: str, name: str, groups: int) -> str:
        """Append a fully-connected layer, one per tower if it reads by tower."""
        parameters = [f"{name}.weight", f"{name}.bias"]
        if groups == 1:
            return self.add("Gemm", [value, *parameters], name, transB=1)
        sources = [self.split(value, 1), *(self.split(parameter, 0) for parameter in parameters)]
        parts = [
            self.add("Gemm", list(inputs), f"{name}/tower{number}", transB=1)
            for number, inputs in enumerate(zip(*sources, strict=True))
        ]
        return self.add("Concat", parts, name, axis=1)


def onnx_nodes(config: AlexNetConfig) -> list[Any]:
    """The ONNX nodes of a network."""
    graph = _Graph(config)
    layers = {layer.name: layer for layer in config.layers()}
    value = INPUT
    for convolution in config.convolutions:
        name = convolution.name
        if name in layers:
            layer, size, stride, padding = (
                layers[name],
                convolution.kernel_size,
                convolution.stride,
                convolution.padding,
            )
            last = (layer.output_shape[1] - 1) * stride + size
            after = padding + max(0, last - layer.input_shape[1] - 2 * padding)
            value = graph.add(
                "Conv",
                [value, f"{name}.weight", f"{name}.bias"],
                name,
                group=layer.groups,
                kernel_shape=[size, size],
                strides=[stride, stride],
                pads=[padding, padding, after, after],
            )
        for operation in config.operations(convolution):
            value = graph.operation(operation, value, name)
    value = graph.add("Flatten", [value], "flat", axis=1)
    for dense in config.hidden:
        value = graph.operation("activation", graph.dense(value, dense.name, layers[dense.name].groups), dense.name)
    value = graph.dense(value, config.output_name, 1)
    graph.add("Identity", [value], OUTPUT)
    return graph.nodes


def onnx_bytes(model: AlexNet, metadata: Mapping[str, Any]) -> bytes:
    """``model`` as an ONNX file, with ``metadata`` as JSON under the key ``alexnet``.

    Raises:
        UsageError: onnx is not installed, or the network has an LRN with an even window, which ONNX cannot express.
    """
    onnx = library()
    from onnx import helper, numpy_helper

    config = model.config
    size = config.image_size
    float32 = onnx.TensorProto.FLOAT
    described = "pixels in 0..255 less the training images' mean, RGB"
    graph = helper.make_graph(
        onnx_nodes(config),
        f"AlexNet, variant {config.variant}",
        [helper.make_tensor_value_info(INPUT, float32, ["N", config.image_channels, size, size], described)],
        [helper.make_tensor_value_info(OUTPUT, float32, ["N", config.classes])],
        [
            numpy_helper.from_array(parameter.detach().float().cpu().contiguous().numpy(), name)
            for name, parameter in model.named_parameters()
        ],
    )
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    helper.set_model_props(result, {METADATA: json.dumps(dict(metadata))})
    onnx.checker.check_model(result, full_check=True)
    content: bytes = result.SerializeToString()
    return content


def exported(model: AlexNet) -> "torch.export.ExportedProgram":
    """``model`` in evaluation mode as a program of PyTorch's own operators, which runs without this package."""
    config = model.config
    images = torch.zeros(
        2, config.image_channels, config.image_size, config.image_size, device=next(model.parameters()).device
    )
    with kernels.implementation("aten"), torch.no_grad():
        return torch.export.export(
            model.eval(), (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}}
        )


def torch_export_bytes(model: AlexNet, metadata: Mapping[str, Any]) -> bytes:
    """:func:`exported` in the format of ``torch.export.save``; ``metadata`` is the extra file ``alexnet``, as JSON."""
    content = io.BytesIO()
    torch.export.save(exported(model), content, extra_files={METADATA: json.dumps(dict(metadata))})
    return content.getvalue()


def aoti_bytes(model: AlexNet, metadata: Mapping[str, Any]) -> bytes:
    """:func:`exported`, compiled by AOTInductor for the device of ``model``. Load it with
    ``torch._inductor.aoti_load_package`` or from C++; ``metadata`` is its metadata entry ``alexnet``, as JSON.

    The package takes contiguous images. It checks shape, dtype and strides only if the environment variable
    ``AOTI_RUNTIME_CHECK_INPUTS`` is 1; otherwise other images give wrong logits without an error.

    Raises:
        UsageError: it cannot be compiled here.
    """
    if (obstacle := compiler.obstacle()) is not None:
        raise UsageError(f"--format aoti cannot compile here: {obstacle}")
    content = io.BytesIO()
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            exported(model),
            package_path=content,
            inductor_configs={"aot_inductor.metadata": {METADATA: json.dumps(dict(metadata))}},
        )
    return content.getvalue()
