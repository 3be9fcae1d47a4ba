"""Import of ONNX files: those that :mod:`.export` wrote, and AlexNets in Caffe's layout.

A graph of this project must equal the one generated from its configuration. Other graphs must be a chain in the layout
of Caffe's ``bvlc_alexnet`` and CaffeNet (convolutions with one or two groups, ReLU, LRN across groups, pooling, dense
layers).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import DataError, UsageError
from ..common.fields import from_table
from ..readers import onnx as reader
from ..readers.files import reason
from ..readers.onnx import OnnxFile, library
from ..readers.safetensors import METADATA, metadata_of
from .config import VARIANTS, AlexNetConfig, ConvolutionConfig, DenseConfig, Operation
from .export import onnx_nodes

#: What a convolution does where its attributes do not say.
_PLAIN = {"strides": [1, 1], "dilations": [1, 1], "pads": [0, 0, 0, 0]}


def from_bgr(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights for BGR pixels, as Caffe uses, to RGB.

    The mean to subtract does not change: it belongs to the pixels.

    Raises:
        DataError: not exactly one convolution reads three channels.
    """
    first = [name for name, tensor in tensors.items() if tensor.dim() == 4 and tensor.shape[1] == 3]
    if len(first) != 1:
        raise DataError(f"exactly one convolution must have three input channels; got {', '.join(first) or 'none'}")
    return {name: tensor.flip(1) if name == first[0] else tensor for name, tensor in tensors.items()}


def read_onnx(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of an ONNX file.

    Files of this project are read as written. Any other file must be a chain in Caffe's layout: its tensors get this
    project's names, its first convolution is converted from BGR to RGB, and the metadata hold the ``network`` that the
    graph describes, as variant ``caffe``, with ``classes`` and ``data_path`` None.

    Raises:
        UsageError: onnx is not installed. DataError: the file is missing or damaged, or has another layout.
    """
    file = reader.read_onnx(path)
    if METADATA not in file.properties:
        return _read_caffe(path, file)
    metadata = metadata_of(path, file.properties[METADATA])
    try:
        config = from_table(AlexNetConfig, metadata["network"], "network")
    except (UsageError, KeyError, TypeError) as error:
        raise DataError(f"{path}: its network metadata is invalid: {reason(error)}") from None
    if list(file.model.graph.node) != onnx_nodes(config):
        raise DataError(f"{path}: its operators do not match its network metadata, variant {config.variant}")
    return file.initializers, metadata


@dataclass
class _Chain:
    """A graph in Caffe's layout, parsed operator by operator."""

    path: Path
    tensors: Mapping[str, Tensor]
    #: For each convolution: weight, bias, attributes, and the operations after it.
    convolutions: list[tuple[Tensor, Tensor, dict[str, Any], list[Operation]]] = field(default_factory=list)
    #: For each pooling: window size, end padding, and ceil_mode.
    pools: list[tuple[int, int, bool]] = field(default_factory=list)
    lrn: dict[str, float] = field(default_factory=dict)
    dense: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    #: Number of dense layers followed by an activation.
    activated: int = 0
    #: Whether Flatten, and whether the softmax after the logits, has been seen.
    flat: bool = False
    ended: bool = False
    #: Whether the last operator was a MatMul, whose bias may follow.
    added: bool = False

    def error(self, node: Any, reason: str) -> DataError:
        return DataError(f"{self.path}: operator {node.op_type} (output {node.output[0]}) {reason}")

    def tensor(self, node: Any, index: int) -> Tensor:
        """The weight (input 1) or bias (input 2, or 1 of an Add) of ``node``."""
        if index >= len(node.input) or node.input[index] not in self.tensors:
            raise self.error(node, f"has no {'weight' if index == 1 else 'bias'} in the file")
        return self.tensors[node.input[index]].float()

    def add_dense(self, node: Any, weight: Tensor, bias: Tensor) -> None:
        """Append a dense layer with ``weight``, ``[outputs, inputs]``."""
        if weight.dim() != 2:
            raise self.error(node, f"has a weight of shape {list(weight.shape)}; it must have two dimensions")
        if bias.numel() != len(weight):
            raise self.error(node, f"adds {list(bias.shape)} to {len(weight)} features")
        self.dense.append((weight, bias.flatten()))

    def take(self, node: Any, values: dict[str, Any]) -> None:
        """Parse the next operator of the chain, with its attributes."""
        kind, TensorProto = node.op_type, library().TensorProto  # noqa: N806 - a class
        if kind in ("Dropout", "Identity"):
            # The identity at inference.
            return
        if kind == "Cast":
            # Half-precision files cast from and to float32; the weights are loaded as float32 too.
            if values["to"] not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
                raise self.error(node, "must be to a floating-point type")
            return
        added, self.added = self.added, False
        if kind in ("Reshape", "Flatten") and self.convolutions and not self.dense:
            self.flat = True
        elif kind == "Softmax" and self.dense:
            self.ended = True
        elif kind == "Conv" and not self.flat:
            values = {**_PLAIN, "group": 1, **values}
            for name, default in _PLAIN.items():
                given = values[name]
                if len(given) != len(default) or len(set(given)) > 1:
                    raise self.error(node, f"has {name} {given}; they must be {len(default)} equal numbers")
            weight, bias = self.tensor(node, 1), self.tensor(node, 2)
            plain = weight.dim() == 4 and weight.shape[2] == weight.shape[3] and values["dilations"][0] == 1
            if not plain or values["group"] not in (1, 2) or values.get("auto_pad", b"NOTSET") != b"NOTSET":
                raise self.error(node, "must have a square kernel, 1 or 2 groups, no dilation and explicit pads")
            kernel = list(weight.shape[2:])
            if values.get("kernel_shape", kernel) != kernel:
                raise self.error(node, f"has kernel_shape {values['kernel_shape']} and a weight for {kernel}")
            if bias.shape != weight.shape[:1]:
                raise self.error(node, f"adds {list(bias.shape)} to {len(weight)} channels")
            self.convolutions.append((weight, bias, values, []))
        elif kind == "Relu" and self.dense and not self.ended:
            self.activated += 1
        elif kind == "Gemm" and not self.ended:
            if values.get("alpha", 1.0) != 1 or values.get("beta", 1.0) != 1 or values.get("transA", 0):
                raise self.error(node, "must be a plain product, with alpha and beta 1")
            if self.activated != len(self.dense):
                raise self.error(node, "must have a Relu before it")
            weight = self.tensor(node, 1)
            self.add_dense(node, weight if values.get("transB", 0) else weight.mT, self.tensor(node, 2))
        elif kind == "MatMul" and not self.ended:
            if self.activated != len(self.dense):
                raise self.error(node, "must have a Relu before it")
            weight = self.tensor(node, 1).mT
            self.add_dense(node, weight, torch.zeros(len(weight)))
            self.added = True
        elif kind == "Add" and added:
            self.add_dense(node, self.dense.pop()[0], self.tensor(node, 1))
        elif kind in ("Relu", "LRN", "MaxPool") and self.convolutions and not self.flat:
            followers = self.convolutions[-1][3]
            operation: Operation = "activation" if kind == "Relu" else "lrn" if kind == "LRN" else "pool"
            if operation in followers:
                raise self.error(node, "occurs twice after one convolution")
            followers.append(operation)
            if kind == "LRN":
                self._take_lrn(node, values)
            elif kind == "MaxPool":
                self._take_pool(node, values)
        else:
            raise self.error(node, "is not supported here: expected are Conv, Relu, LRN, MaxPool, then Gemm and Relu")

    def _take_lrn(self, node: Any, values: dict[str, Any]) -> None:
        lrn = {"size": values["size"], "alpha": 1e-4, "beta": 0.75, "bias": 1.0}
        lrn |= {name: values[name] for name in lrn if name in values}
        if values["size"] % 2 == 0:
            raise self.error(node, f"has size {values['size']}; sizes must be odd")
        if self.lrn not in ({}, lrn):
            raise self.error(node, f"has {lrn} but the previous one has {self.lrn}; they must be equal")
        self.lrn = lrn

    def _take_pool(self, node: Any, values: dict[str, Any]) -> None:
        kernel, strides = values["kernel_shape"], values.get("strides", [1, 1])
        before, after = values.get("pads", [0] * 4)[:2], values.get("pads", [0] * 4)[2:]
        plain = set(values.get("dilations", [1])) == {1} and values.get("auto_pad", b"NOTSET") == b"NOTSET"
        window = kernel in ([2, 2], [3, 3]) and strides == [2, 2]
        if not (plain and window and before == [0, 0] and after in ([0, 0], [1, 1])):
            raise self.error(node, "must have a window of 2 or 3, stride 2, no dilation and no top or left padding")
        if self.pools and self.pools[-1][0] != kernel[0]:
            raise self.error(node, "has another window size than the previous one")
        self.pools.append((kernel[0], after[0], bool(values.get("ceil_mode", 0))))

    def sizes(self, size: int) -> list[int]:
        """Output rows of each convolution, and of the operations after it, for images of ``size`` rows."""
        result, pools = [], iter(self.pools)
        for weight, _, values, followers in self.convolutions:
            size = (size + 2 * values["pads"][0] - weight.shape[2]) // values["strides"][0] + 1
            result.append(size)
            if "pool" in followers:
                window, after, ceil = next(pools)
                size = (size + after - window + ceil) // 2 + 1
            if followers:
                result.append(size)
        return result

    def network(self, size: int, pool_ceil_mode: bool) -> AlexNetConfig:
        """The graph as this project's architecture, for images of ``size`` rows."""
        towers = max(values["group"] for _, _, values, _ in self.convolutions)
        convolutions = tuple(
            ConvolutionConfig(
                f"conv{number}",
                len(weight),
                weight.shape[2],
                stride=values["strides"][0],
                padding=values["pads"][0],
                reads="tower" if values["group"] == 2 else "all",
                then=tuple(followers),
            )
            for number, (weight, _, values, followers) in enumerate(self.convolutions, 1)
        )
        first = len(convolutions) + 1
        hidden = tuple(DenseConfig(f"fc{first + index}", len(bias)) for index, (_, bias) in enumerate(self.dense[:-1]))
        return AlexNetConfig(
            variant="caffe",
            image_size=size,
            classes=len(self.dense[-1][1]),
            towers=towers,
            lrn_size=int(self.lrn["size"]),
            lrn_alpha=self.lrn["alpha"],
            lrn_beta=self.lrn["beta"],
            lrn_k=self.lrn["bias"],
            lrn_across_towers=True,
            overlapping_pooling=not self.pools or self.pools[0][0] == 3,
            pool_ceil_mode=pool_ceil_mode,
            convolutions=convolutions,
            hidden=hidden,
            output_name=f"fc{first + len(hidden)}",
        )

    def fitting(self, rows: int | None) -> AlexNetConfig:
        """The graph as this project's architecture, for images of ``rows`` rows or of Caffe's own 227.

        The published file is for images of 224 rows, with a padding that gives the last feature map the size it has for
        images of 227 rows.

        Raises:
            DataError: neither gives the sizes of the graph's layers.
        """
        own = VARIANTS["caffe"].image_size
        for size, ceil_mode in itertools.product(dict.fromkeys((rows or own, own)), (False, True)):
            try:
                network = self.network(size, ceil_mode)
            except UsageError:
                continue
            layers = network.layers()
            maps = [layer.output_shape[1] for layer in layers if layer.kind != "dense"]
            features = layers[len(maps)].input_shape[0]
            if maps == self.sizes(size) and features == self.dense[0][0].shape[1]:
                return network
        raise DataError(f"{self.path}: its layer sizes are inconsistent for images of {rows or own} rows")


def _walk(path: Path, graph: Any, nodes: list[Any], tensors: Mapping[str, Tensor]) -> tuple[_Chain, int | None]:
    """Parse the operators from the images to the logits; also returns the rows of the images if the graph has them.

    Args:
        path: of the file, for messages.
        graph: its graph.
        nodes: the nodes that depend on the images.
        tensors: the values of the other nodes.
    """
    images = [item for item in graph.input if item.name not in tensors]
    if len(images) != 1:
        raise DataError(f"{path}: it has {len(images)} inputs; the images must be the only one")
    dimensions = images[0].type.tensor_type.shape.dim
    rows = dimensions[2].dim_value if len(dimensions) == 4 else 0
    chain, value = _Chain(path, tensors), images[0].name
    for node in nodes:
        inputs = list(node.input)
        if node.op_type == "Add" and inputs[1:] == [value]:
            # Addition is commutative.
            node.input[:] = inputs[::-1]
        # ONNX nodes are topologically sorted, so those of a chain follow one another.
        if not inputs or node.input[0] != value:
            raise chain.error(node, f"does not read {value}; the operators must be a chain")
        try:
            chain.take(node, {item.name: library().helper.get_attribute_value(item) for item in node.attribute})
        except DataError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise chain.error(node, f"has missing or invalid attributes or weights: {error}") from None
        value = node.output[0]
    if not chain.convolutions or not chain.dense or not chain.lrn or chain.activated != len(chain.dense) - 1:
        raise DataError(f"{path} is not in Caffe's layout: convolutions with LRN, then dense layers with Relu between")
    return chain, rows or None


def _read_caffe(path: Path, file: OnnxFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """See :func:`read_onnx`."""
    nodes, values = reader.computed(path, file)
    chain, rows = _walk(path, file.model.graph, nodes, values)
    network = chain.fitting(rows)
    size = network.image_size
    print(
        f"{path}: a network in Caffe's layout for {size}x{size} images; its first convolution is converted from BGR to "
        "RGB"
    )
    names = [layer.name for layer in network.layers() if layer.kind != "stage"]
    pairs = [(weight, bias) for weight, bias, _, _ in chain.convolutions] + chain.dense
    result = {}
    for name, (weight, bias) in zip(names, pairs, strict=True):
        result[f"{name}.weight"], result[f"{name}.bias"] = weight.contiguous(), bias
    return from_bgr(result), {"network": network.to_dict(), "classes": None, "data_path": None}
