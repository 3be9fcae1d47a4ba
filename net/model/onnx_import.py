"""Networks from ONNX files: what :mod:`.export` wrote, and others in the layout of Caffe's AlexNets.

A graph of this program is compared with the one that its configuration gives. Other graphs are read where they are a
chain in the layout of Caffe's ``bvlc_alexnet`` and CaffeNet (convolutions with one group or two, ReLU, LRN across the
groups, pooling, dense layers).
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
from ..doors import onnx as door
from ..doors.onnx import OnnxFile, library
from ..doors.safetensors import METADATA, metadata_of
from .config import VARIANTS, AlexNetConfig, ConvolutionConfig, DenseConfig, Operation
from .export import onnx_nodes

_PLAIN = {"strides": [1, 1], "dilations": [1, 1], "pads": [0, 0, 0, 0]}


def from_bgr(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for pixels in red, green, blue from those of a network that reads blue, green, red, as Caffe's do.

    The mean that is subtracted stays the same: it goes with the pixels.

    Raises:
        DataError: not exactly one convolution reads three channels.
    """
    first = [name for name, tensor in tensors.items() if tensor.dim() == 4 and tensor.shape[1] == 3]
    if len(first) != 1:
        raise DataError(f"one convolution must read three colours; got {', '.join(first) or 'none'}")
    return {name: tensor.flip(1) if name == first[0] else tensor for name, tensor in tensors.items()}


def read_onnx(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of an ONNX file.

    Of a file that this program wrote they are what was written. Another file must be a chain in Caffe's layout; its
    tensors get this project's names, its first convolution, which reads blue, green, red, is turned round to read red,
    green, blue, and the metadata hold the ``network`` that the graph describes, as variant ``caffe``, with ``classes``
    and ``data_path`` None.

    Raises:
        UsageError: onnx is not installed. DataError: the file is missing or damaged, or is another kind of network.
    """
    file = door.read_onnx(path)
    if METADATA not in file.properties:
        return _read_caffe(path, file)
    metadata = metadata_of(path, file.properties[METADATA])
    try:
        config = from_table(AlexNetConfig, metadata["network"], "network")
    except (UsageError, KeyError, TypeError) as error:
        raise DataError(f"{path}: what it says of its network cannot be used: {error}") from None
    if list(file.model.graph.node) != onnx_nodes(config):
        raise DataError(f"{path}: its operators are not those of the network it names, variant {config.variant}")
    return file.initializers, metadata


@dataclass
class _Chain:
    """What a graph in Caffe's layout says, operator by operator."""

    path: Path
    tensors: Mapping[str, Tensor]
    #: For each convolution its weight, bias, attributes and what follows it.
    convolutions: list[tuple[Tensor, Tensor, dict[str, Any], list[Operation]]] = field(default_factory=list)
    #: For each pooling its window, the padding at its end and whether sizes are rounded up.
    pools: list[tuple[int, int, bool]] = field(default_factory=list)
    lrn: dict[str, float] = field(default_factory=dict)
    dense: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    #: Dense layers that an activation follows.
    activated: int = 0
    #: Whether the maps were made features, and whether the softmax behind the logits came.
    flat: bool = False
    ended: bool = False
    #: Whether a product without its bias was the last operator.
    added: bool = False

    def refuse(self, node: Any, reason: str) -> DataError:
        return DataError(f"{self.path}: operator {node.op_type} (output {node.output[0]}) {reason}")

    def tensor(self, node: Any, index: int) -> Tensor:
        """An input of ``node`` that is a weight or a bias."""
        if index >= len(node.input) or node.input[index] not in self.tensors:
            raise self.refuse(node, f"has no {'weight' if index == 1 else 'bias'} in the file")
        return self.tensors[node.input[index]].float()

    def take(self, node: Any, values: dict[str, Any]) -> None:
        """The next operator of the chain, with its attributes."""
        kind, TensorProto = node.op_type, library().TensorProto  # noqa: N806 - a class
        if kind in ("Dropout", "Identity"):
            # In evaluation they do nothing.
            return
        if kind == "Cast":
            # Files in half precision read and give float32; the weights are read into float32 too.
            if values["to"] not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
                raise self.refuse(node, "must be to a floating-point type")
            return
        added, self.added = self.added, False
        if kind in ("Reshape", "Flatten") and self.convolutions and not self.dense:
            self.flat = True
        elif kind == "Softmax" and self.dense:
            self.ended = True
        elif kind == "Conv" and not self.flat:
            values = {**_PLAIN, "group": 1, **values}
            for name in ("strides", "dilations", "pads"):
                if len(set(values[name])) > 1:
                    raise self.refuse(node, f"has {name} {values[name]}; they must be equal on all sides")
            weight = self.tensor(node, 1)
            plain = weight.dim() == 4 and weight.shape[2] == weight.shape[3] and values["dilations"][0] == 1
            if not plain or values["group"] not in (1, 2) or values.get("auto_pad", b"NOTSET") != b"NOTSET":
                raise self.refuse(node, "must have a square kernel, 1 or 2 groups, no dilation and explicit pads")
            self.convolutions.append((weight, self.tensor(node, 2), values, []))
        elif kind == "Relu" and self.dense and not self.ended:
            self.activated += 1
        elif kind == "Gemm" and not self.ended:
            if values.get("alpha", 1.0) != 1 or values.get("beta", 1.0) != 1 or values.get("transA", 0):
                raise self.refuse(node, "must be a plain product, with alpha and beta 1")
            if self.activated != len(self.dense):
                raise self.refuse(node, "must have a Relu before it")
            weight = self.tensor(node, 1)
            self.dense.append((weight if values.get("transB", 0) else weight.T, self.tensor(node, 2)))
        elif kind == "MatMul" and not self.ended:
            if self.activated != len(self.dense):
                raise self.refuse(node, "must have a Relu before it")
            weight = self.tensor(node, 1).T
            self.dense.append((weight, torch.zeros(len(weight))))
            self.added = True
        elif kind == "Add" and added:
            weight, bias = self.dense[-1][0], self.tensor(node, 1)
            if bias.numel() != len(weight):
                raise self.refuse(node, f"adds {list(bias.shape)} to {len(weight)} features")
            self.dense[-1] = weight, bias.flatten()
        elif kind in ("Relu", "LRN", "MaxPool") and self.convolutions and not self.flat:
            followers = self.convolutions[-1][3]
            operation: Operation = "activation" if kind == "Relu" else "lrn" if kind == "LRN" else "pool"
            if operation in followers:
                raise self.refuse(node, "comes twice behind one convolution")
            followers.append(operation)
            if kind == "LRN":
                self._take_lrn(node, values)
            elif kind == "MaxPool":
                self._take_pool(node, values)
        else:
            raise self.refuse(
                node, "has no place in an AlexNet: Conv, Relu, LRN, MaxPool, then Gemm and Relu are what is read"
            )

    def _take_lrn(self, node: Any, values: dict[str, Any]) -> None:
        lrn = {"size": values["size"], "alpha": 1e-4, "beta": 0.75, "bias": 1.0}
        lrn |= {name: values[name] for name in lrn if name in values}
        if values["size"] % 2 == 0:
            raise self.refuse(node, f"has size {values['size']}; sizes must be odd")
        if self.lrn not in ({}, lrn):
            raise self.refuse(node, f"has {lrn} and the one before {self.lrn}; they must be equal")
        self.lrn = lrn

    def _take_pool(self, node: Any, values: dict[str, Any]) -> None:
        kernel, strides = values["kernel_shape"], values.get("strides", [1, 1])
        before, after = values.get("pads", [0] * 4)[:2], values.get("pads", [0] * 4)[2:]
        plain = set(values.get("dilations", [1])) == {1} and values.get("auto_pad", b"NOTSET") == b"NOTSET"
        window = kernel in ([2, 2], [3, 3]) and strides == [2, 2]
        if not (plain and window and before == [0, 0] and after in ([0, 0], [1, 1])):
            raise self.refuse(node, "must have a window of 2 or 3, a stride of 2, no dilation and no padding before")
        if self.pools and self.pools[-1][0] != kernel[0]:
            raise self.refuse(node, "has another window than the one before")
        self.pools.append((kernel[0], after[0], bool(values.get("ceil_mode", 0))))

    def sizes(self, size: int) -> list[int]:
        """Rows of the maps behind each convolution, and behind what follows it, for images of ``size`` rows."""
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
        """The graph as this project's network for images of ``size``."""
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
        """The graph as this project's network, for images of ``rows`` rows or of Caffe's own 227.

        The published file is for images of 224 rows, with a padding that makes the last map as large as images of 227
        rows do.

        Raises:
            DataError: neither gives the sizes that the graph's layers have.
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
        raise DataError(f"{self.path}: its layers' sizes do not fit one another for images of {rows or own} rows")


def _walk(path: Path, graph: Any, nodes: list[Any], tensors: Mapping[str, Tensor]) -> tuple[_Chain, int | None]:
    """The operators from the images to the logits, and the rows of the images where the graph says them.

    Args:
        path: of the file, for messages.
        graph: its graph.
        nodes: those of its nodes that depend on the images.
        tensors: the values of the others.
    """
    images = [item for item in graph.input if item.name not in tensors]
    if len(images) != 1:
        raise DataError(f"{path}: it has {len(images)} inputs; images must be the only one")
    dimensions = images[0].type.tensor_type.shape.dim
    rows = dimensions[2].dim_value if len(dimensions) == 4 else 0
    chain, value = _Chain(path, tensors), images[0].name
    for node in nodes:
        inputs = list(node.input)
        if node.op_type == "Add" and inputs[1:] == [value]:
            # A sum is the same either way.
            node.input[:] = inputs[::-1]
        # ONNX's nodes are in the order of their use, so that a chain's are one behind the other.
        if not inputs or node.input[0] != value:
            raise chain.refuse(node, f"does not read {value}; the operators must be a chain")
        try:
            chain.take(node, {item.name: library().helper.get_attribute_value(item) for item in node.attribute})
        except (KeyError, IndexError, TypeError, RuntimeError) as error:
            raise chain.refuse(
                node, f"has attributes or weights that are missing or of another kind: {error}"
            ) from None
        value = node.output[0]
    if not chain.convolutions or not chain.dense or not chain.lrn or chain.activated != len(chain.dense) - 1:
        raise DataError(f"{path} is not in Caffe's layout: convolutions with LRN, then dense layers with Relu between")
    return chain, rows or None


def _read_caffe(path: Path, file: OnnxFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """See :func:`read_onnx`."""
    nodes, values = door.computed(path, file)
    chain, rows = _walk(path, file.model.graph, nodes, values)
    network = chain.fitting(rows)
    size = network.image_size
    print(
        f"{path}: a network in Caffe's layout for {size}x{size} images; its first convolution, which reads blue, "
        "green, red, is turned round to read red, green, blue"
    )
    names = [layer.name for layer in network.layers() if layer.kind != "stage"]
    pairs = [(weight, bias) for weight, bias, _, _ in chain.convolutions] + chain.dense
    result = {}
    for name, (weight, bias) in zip(names, pairs, strict=True):
        result[f"{name}.weight"], result[f"{name}.bias"] = weight.contiguous(), bias
    return from_bgr(result), {"network": network.to_dict(), "classes": None, "data_path": None}
