"""Weights in and out of the network, by the names that AlexNets go by elsewhere."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from . import checkpoint
from .alexnet import AlexNet
from .errors import DataError
from .files import atomic_write

_PREFIXES = re.compile(r"^(?:module\.|model\.|_orig_mod\.)+")
#: "conv1.weight" (this project), "conv1_w_0" (ONNX from Caffe2), "conv1_w", "conv1_weight", "conv1.0" (Caffe's blobs).
_NAMED = re.compile(r"^((?:conv|fc)\d+)[._](weight|bias|w|b|0|1)(?:_0)?$")
#: torchvision and its like: numbered layers of two sequences.
_NUMBERED = re.compile(r"^(features|classifier)\.(\d+)\.(weight|bias)$")
_KIND = {"weight": "weight", "w": "weight", "0": "weight", "bias": "bias", "b": "bias", "1": "bias"}


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_weights` found: parameters loaded; names that only the network or only the source has; shapes
    that differ, as (name, the network's, the source's)."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def problems(self) -> str:
        """One line about everything that did not match; empty when all did."""
        parts = [f"{name} is {list(theirs)} instead of {list(ours)}" for name, ours, theirs in self.mismatched]
        if self.missing:
            parts.append(f"missing: {', '.join(self.missing)}")
        if self.unexpected:
            parts.append(f"not in the network: {', '.join(self.unexpected)}")
        return "; ".join(parts)


def _canonical(source: Mapping[str, Tensor], model: AlexNet) -> dict[str, Tensor]:
    """``source`` under this network's parameter names; names that mean nothing here stay."""
    convolutions = [name for name, _ in model.trunk if name is not None]
    dense = [*(layer.name for layer in model.config.hidden), model.config.output_name]
    stripped = [(_PREFIXES.sub("", name), tensor) for name, tensor in source.items()]
    numbers: dict[str, list[int]] = {"features": [], "classifier": []}
    for name, _ in stripped:
        if (match := _NUMBERED.match(name)) and int(match[2]) not in numbers[match[1]]:
            numbers[match[1]].append(int(match[2]))
    result: dict[str, Tensor] = {}
    for name, tensor in stripped:
        if match := _NAMED.match(name):
            name = f"{match[1]}.{_KIND[match[2]]}"
        elif match := _NUMBERED.match(name):
            position = sorted(numbers[match[1]]).index(int(match[2]))
            layers = convolutions if match[1] == "features" else dense
            if position < len(layers):
                name = f"{layers[position]}.{match[3]}"
        if name in result:
            raise DataError(f"two of the source's tensors mean {name}")
        result[name] = tensor
    return result


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a ``.safetensors`` or ``.onnx`` file, or the model in a checkpoint of this program or in
    the newest intact one of a run folder.

    Raises:
        DataError: the file is missing, damaged or none of these. UsageError: ONNX, and onnx is not installed.
    """
    if path.suffix == ".onnx":
        from .interchange import read_onnx

        return read_onnx(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                return tensors, json.loads(metadata.get("alexnet", "{}"))
        except FileNotFoundError:
            raise DataError(f"weights {path} do not exist") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"weights {path} are damaged: {error}") from None
    state = checkpoint.of_run(path)[1] if path.is_dir() else checkpoint.load(path)
    return state["model"], state["metadata"]


def save(path: Path, parameters: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a network's state dict to a ``.safetensors`` file, with ``metadata`` as JSON under the key ``alexnet``."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    with atomic_write(path) as file:
        # One key only: the order of several changes from file to file.
        file.write(serialize(tensors, {"alexnet": json.dumps(metadata)}))


def load_weights(
    model: AlexNet,
    source: Path | str | Mapping[str, Tensor],
    *,
    strict: bool = True,
    without: Collection[str] = (),
) -> LoadReport:
    """Copy weights into ``model`` from another AlexNet.

    Names of this project, of torchvision's AlexNet (``features.0.weight``), of Caffe's and of the ONNX models made from
    it (``conv1_w_0``) are understood; convolutions have the usual grouped layout in all of them. Only names and shapes
    are compared: torchvision's weights expect pixels in [0, 1] less a mean and divided by a deviation, and Caffe's
    expect blue, green, red, which :func:`net.interchange.from_bgr` changes (:func:`net.interchange.read_onnx` has done
    so).

    Args:
        model: the network; parameters keep their dtype and device.
        source: a ``.safetensors`` or ``.onnx`` file, a checkpoint of this program, or a state dict.
        strict: refuse, and change nothing, unless every parameter is there in the right shape and nothing is left.
        without: layers that keep the weights they have, whatever the source holds for them.

    Returns:
        What was loaded and what did not match.

    Raises:
        DataError: an unreadable file, or, when ``strict``, anything that does not match.
    """
    tensors = read(Path(source))[0] if isinstance(source, (str, Path)) else source
    left = {f"{layer}.{kind}" for layer in without for kind in ("weight", "bias")}
    theirs = {name: tensor for name, tensor in _canonical(tensors, model).items() if name not in left}
    ours = {name: parameter for name, parameter in model.named_parameters() if name not in left}
    mismatched = tuple(
        (name, tuple(parameter.shape), tuple(theirs[name].shape))
        for name, parameter in ours.items()
        if name in theirs and theirs[name].shape != parameter.shape
    )
    different = {name for name, _, _ in mismatched}
    report = LoadReport(
        loaded=tuple(name for name in ours if name in theirs and name not in different),
        missing=tuple(name for name in ours if name not in theirs),
        unexpected=tuple(name for name in theirs if name not in ours),
        mismatched=mismatched,
    )
    if report.problems() and strict:
        where = f"{source}: " if isinstance(source, (str, Path)) else ""
        raise DataError(f"{where}weights do not fit variant {model.config.variant}: {report.problems()}")
    with torch.no_grad():
        for name in report.loaded:
            ours[name].copy_(theirs[name])
    return report
