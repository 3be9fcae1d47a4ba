"""Loading and saving weights, with the parameter names of other AlexNet implementations."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from ..common.errors import DataError
from ..common.files import atomic_write
from ..readers import checkpoint as checkpoint_reader
from ..readers import safetensors as safetensors_reader
from ..training import checkpoint
from .alexnet import AlexNet, alexnet

#: Name components added by wrappers: DataParallel (which pytorch/examples puts around ``features`` alone),
#: torch.compile, FSDP, Lightning, and user code.
_WRAPPERS = {"module", "model", "net", "network", "backbone", "alexnet", "_orig_mod", "_fsdp_wrapped_module"}
#: Normalization of torchvision's models: RGB pixels in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HEAD = "fc8.weight"
#: The name of the mean image among a file's tensors.
MEAN = "mean_image"
#: "conv1.weight" (this project), "conv1_w_0" (ONNX from Caffe2), "conv1_w", "conv1_weight", "conv1.0" (Caffe's blobs).
_NAMED = re.compile(r"^((?:conv|fc)\d+)[._](weight|bias|w|b|0|1)(?:_0)?$")
#: torchvision and similar: indices into two nn.Sequential.
_NUMBERED = re.compile(r"^(features|classifier)\.(\d+)\.(weight|bias)$")
_KIND = {"weight": "weight", "w": "weight", "0": "weight", "bias": "bias", "b": "bias", "1": "bias"}


@dataclass(frozen=True)
class LoadReport:
    """The result of :func:`load_weights`: parameters loaded; names only in the network, or only in the source; shapes
    that differ, as (name, the network's, the source's)."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def problems(self) -> str:
        """One line listing every mismatch; empty if there is none."""
        parts = [f"{name} is {list(theirs)} instead of {list(ours)}" for name, ours, theirs in self.mismatched]
        if self.missing:
            parts.append(f"missing: {', '.join(self.missing)}")
        if self.unexpected:
            parts.append(f"not in the network: {', '.join(self.unexpected)}")
        return "; ".join(parts)


def _stripped(name: str) -> str:
    """``name`` without the components that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _canonical(source: Mapping[str, Tensor], model: AlexNet) -> dict[str, Tensor]:
    """``source`` with this network's parameter names; unknown names are kept."""
    convolutions = [name for name, _ in model.trunk if name is not None]
    dense = [*(layer.name for layer in model.config.hidden), model.config.output_name]
    stripped = [(_stripped(name), tensor) for name, tensor in source.items()]
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
            raise DataError(f"two tensors of the source map to {name}")
        result[name] = tensor
    return result


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of a file; see :func:`read_state`."""
    _, state = read_state(path)
    return state["model"], state["metadata"]


def read_state(path: Path, needed: tuple[str, ...] = ("model",)) -> tuple[Path, dict[str, Any]]:
    """Read a file: ``model`` (its tensors), ``metadata``, perhaps ``mean_image``, and a checkpoint's other members.

    It may be a ``.safetensors`` or ``.onnx`` file, a checkpoint of this project, a run folder (its newest intact
    checkpoint is read), or a state dict saved by another program with ``torch.save``. The weights of torchvision's
    AlexNet are converted to pixels in 0..255, see :func:`from_normalized`, and to this project's names.

    Args:
        path: the file or folder.
        needed: members that a checkpoint of this project must have.

    Returns:
        The path of the file, and the state.

    Raises:
        DataError: the file is missing, damaged or none of these. UsageError: ONNX, and onnx is not installed.
    """
    if path.is_dir():
        path, state = checkpoint.of_run(path)
    elif path.suffix == ".onnx":
        from .onnx_import import read_onnx

        state = dict(zip(("model", "metadata"), read_onnx(path), strict=True))
    elif path.suffix == ".safetensors":
        tensors, metadata = safetensors_reader.read(path)
        state = {"model": tensors} if metadata is None else {"model": tensors, "metadata": metadata}
        if metadata is not None and MEAN in tensors:
            try:
                checkpoint_reader.check_mean_image(tensors[MEAN], MEAN)
            except ValueError as error:
                raise DataError(f"weights {path} are damaged: {error}") from None
            state[MEAN] = tensors.pop(MEAN)
    else:
        state = checkpoint_reader.load_weights(path, needed)
    for name, tensor in state["model"].items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DataError(f"{path}: {name} holds infinite or NaN weights: the training diverged")
    if not isinstance(state.get("metadata"), dict):
        state["model"], state["metadata"] = _from_torchvision(path, state["model"])
    return path, state


def _from_torchvision(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a foreign state dict; torchvision's AlexNet is recognized and converted."""
    if not any(_NUMBERED.match(_stripped(name)) for name in tensors):
        return tensors, {}
    with torch.device("meta"):
        model = alexnet("one_weird_trick")
        named = _canonical(tensors, model)
        shapes = {name: tensor.shape for name, tensor in named.items()}
        if shapes.get(_HEAD) is not None and len(shapes[_HEAD]) == 2:
            model = alexnet("one_weird_trick", classes=max(1, shapes[_HEAD][0]))
    if shapes != {name: parameter.shape for name, parameter in model.named_parameters()}:
        return tensors, {}
    print(
        f"{path}: torchvision's AlexNet, for normalized pixels in [0, 1]; its first convolution is rescaled for pixels "
        "in 0..255"
    )
    return from_normalized(named), {
        "network": model.config.to_dict(),
        "classes": None,
        "data_path": None,
        "subtracted_rgb": [255 * value for value in IMAGENET_MEAN],
    }


def from_normalized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights for torchvision's normalized pixels to mean-subtracted pixels in 0..255 units.

    The source network reads pixels in [0, 1] minus ``IMAGENET_MEAN``, divided by ``IMAGENET_STD``; the result reads
    pixels in 0..255 minus 255 times that mean. The logits are the same.

    Args:
        tensors: a state dict with ``conv1.weight``, ``[N, 3, rows, columns]`` in RGB.
    """
    scale = 255 * torch.tensor(IMAGENET_STD, dtype=torch.float64).view(1, 3, 1, 1)
    first = tensors["conv1.weight"]
    return {**tensors, "conv1.weight": (first.double() / scale).to(first.dtype)}


def save(path: Path, parameters: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a network's state dict to a ``.safetensors`` file, with ``metadata`` as JSON under the key ``alexnet``.

    Args:
        path: the file.
        parameters: the state dict, and perhaps the mean image of its training, float32 ``[size, size, 3]``, under the
            name ``mean_image``.
        metadata: see :func:`net.training.state.metadata`.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    with atomic_write(path) as file:
        # A single key: safetensors does not write several in a deterministic order.
        file.write(serialize(tensors, {safetensors_reader.METADATA: json.dumps(metadata)}))


def load_weights(
    model: AlexNet,
    source: Path | str | Mapping[str, Tensor],
    *,
    strict: bool = True,
    without: Collection[str] = (),
) -> LoadReport:
    """Copy weights into ``model`` from another AlexNet.

    Understands the parameter names of this project, of torchvision's AlexNet (``features.0.weight``), of Caffe's and of
    the ONNX models made from it (``conv1_w_0``); all of them store convolutions in the usual grouped layout. For a
    state dict only names and shapes are checked. torchvision's weights expect normalized pixels in [0, 1]: convert them
    with :func:`from_normalized`. Caffe's expect BGR: convert them with :func:`net.model.onnx_import.from_bgr`. For a
    file, :func:`read` does both.

    Args:
        model: the network; parameters keep their dtype and device.
        source: a ``.safetensors`` or ``.onnx`` file, a checkpoint or state dict saved with ``torch.save``, or a state
            dict.
        strict: raise, and change nothing, unless names and shapes match exactly.
        without: layers that keep their current weights and are ignored in the source.

    Returns:
        What was loaded and what did not match.

    Raises:
        DataError: an unreadable file or, if ``strict``, any mismatch.
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
