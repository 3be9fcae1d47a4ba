"""ONNX files: the graph, and constant folding of everything that does not depend on the images."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..common import extras
from ..common.errors import DataError, UsageError
from .files import opened, read, reason

#: Maximum bytes of a protocol buffer.
_LIMIT = 2**31 - 1
#: Maximum bytes of folded constants; the paper's weights take 244 MB.
_COMPUTED_LIMIT = 2**31


def library() -> Any:
    """Import ``onnx``.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise UsageError(f"ONNX files need an extra: {extras.install('onnx')}") from None
    return onnx


@dataclass(frozen=True)
class OnnxFile:
    """The content of an ONNX file: the model, metadata by key, and initializers by name."""

    model: Any
    properties: dict[str, str]
    initializers: dict[str, Tensor]


def read_onnx(path: Path) -> OnnxFile:
    """Read an ONNX file and its external data.

    Raises:
        UsageError: onnx is not installed. DataError: the file is missing or damaged.
    """
    onnx = library()
    content = read(path, "weights", _LIMIT)
    try:
        model = onnx.load_model_from_string(content)
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                _take_in(path, tensor)
        onnx.checker.check_model(model)
        initializers = {tensor.name: _tensor(tensor) for tensor in model.graph.initializer}
    except (DataError, MemoryError):
        raise
    except Exception as error:
        # DecodeError, ValidationError, and numpy's errors for truncated data or unknown types.
        raise DataError(f"{path} is damaged or not an ONNX file: {reason(error)}") from None
    return OnnxFile(model, {item.key: item.value for item in model.metadata_props}, initializers)


def _take_in(path: Path, tensor: Any) -> None:
    """Load a tensor's external data into the model."""
    place = {item.key: item.value for item in tensor.external_data}
    name = PurePosixPath(place["location"])
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"tensor {tensor.name} lies outside of the model's folder: {name}")
    with opened(path.parent / name, "weights") as file:
        size = file.seek(0, 2)
        offset = int(place.get("offset", 0))
        length = int(place.get("length", size - offset))
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError(f"tensor {tensor.name} lies outside of {name}")
        file.seek(offset)
        tensor.raw_data = file.read(length)
    del tensor.external_data[:]
    tensor.data_location = library().TensorProto.DEFAULT


def _types() -> dict[int, torch.dtype]:
    """PyTorch dtypes of the supported ONNX types."""
    types = library().TensorProto
    return {
        types.FLOAT: torch.float32,
        types.FLOAT16: torch.float16,
        types.BFLOAT16: torch.bfloat16,
        types.DOUBLE: torch.float64,
        types.INT32: torch.int32,
        types.INT64: torch.int64,
        types.UINT8: torch.uint8,
        types.INT8: torch.int8,
        types.BOOL: torch.bool,
    }


def _dtype(number: int) -> torch.dtype:
    if number not in (types := _types()):
        raise ValueError(f"data type {number} is not supported")
    return types[number]


def _tensor(tensor: Any) -> Tensor:
    dtype = _dtype(tensor.data_type)
    array = library().numpy_helper.to_array(tensor)
    if dtype == torch.bfloat16:
        # numpy has no bfloat16; float32 represents every value exactly.
        return torch.from_numpy(array.astype("float32")).to(dtype)
    return torch.from_numpy(array.copy())


def _constant(values: Mapping[str, Any]) -> Tensor:
    (name,) = values
    if name == "value":
        return _tensor(values["value"])
    if name in ("value_float", "value_floats", "value_int", "value_ints"):
        return torch.tensor(values[name])
    raise ValueError(f"a Constant with {name} is not supported")


def _constant_of_shape(values: Mapping[str, Any], shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    fill = _tensor(values["value"]).reshape(()) if "value" in values else torch.tensor(0.0)
    if any(size < 0 for size in sizes) or math.prod(sizes) * fill.element_size() > _COMPUTED_LIMIT:
        raise ValueError(f"ConstantOfShape makes a tensor of {sizes}")
    return fill.expand(sizes).contiguous()


def _reshape(values: Mapping[str, Any], data: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    if not values.get("allowzero", 0):
        sizes = [data.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return data.reshape(sizes)


def _axes(values: Mapping[str, Any], rest: tuple[Tensor, ...]) -> list[int]:
    return rest[0].tolist() if rest else list(values.get("axes", ()))


def _unsqueeze(values: Mapping[str, Any], data: Tensor, *rest: Tensor) -> Tensor:
    axes = _axes(values, rest)
    for axis in sorted(axis % (data.dim() + len(axes)) for axis in axes):
        data = data.unsqueeze(axis)
    return data


def _squeeze(values: Mapping[str, Any], data: Tensor, *rest: Tensor) -> Tensor:
    axes = _axes(values, rest)
    return data.squeeze(tuple(axes)) if axes else data.squeeze()


def _transpose(values: Mapping[str, Any], data: Tensor) -> Tensor:
    return data.permute(list(values.get("perm", reversed(range(data.dim())))))


#: Operators that converters insert between weights and layers.
_COMPUTED: dict[str, Callable[..., Tensor]] = {
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Identity": lambda values, data: data,
    "Cast": lambda values, data: data.to(_dtype(values["to"])),
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


def computed(path: Path, file: OnnxFile) -> tuple[list[Any], dict[str, Tensor]]:
    """Fold constants: returns the nodes that depend on the images, and the values of all others and initializers.

    Raises:
        DataError: a constant is damaged or too large.
    """
    attribute = library().helper.get_attribute_value
    values, left, size = dict(file.initializers), [], 0
    for node in file.model.graph.node:
        if node.op_type not in _COMPUTED or not all(name in values for name in node.input):
            left.append(node)
            continue
        attributes = {item.name: attribute(item) for item in node.attribute}
        try:
            result = _COMPUTED[node.op_type](attributes, *(values[name] for name in node.input))
        except MemoryError:
            raise
        except Exception as error:
            # Inconsistent attributes and shapes raise a variety of numpy and PyTorch errors.
            raise DataError(f"{path}: operator {node.op_type} (output {node.output[0]}): {reason(error)}") from None
        size += result.numel() * result.element_size()
        if size > _COMPUTED_LIMIT:
            raise DataError(f"{path}: its constants take more than {_COMPUTED_LIMIT:,} bytes")
        values[node.output[0]] = result
    return left, values
