"""A trained network as its run left it, for the commands that use one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from . import checkpoint, weights
from .alexnet import AlexNet
from .config import AlexNetConfig
from .errors import DataError, UsageError
from .fields import from_table, typed
from .forms import untuned, use


@dataclass(frozen=True)
class Trained:
    """A network ready to be asked.

    ``model`` is in evaluation mode. ``classes`` is None where the file does not name them, ``data_path`` where it was
    trained on the embedded digits or does not say on what, and ``mean``, the mean image of its training images, float32
    ``[size, size, 3]``, where the file holds weights alone. ``precision`` is what it was trained in, None where the
    file does not say.
    """

    path: Path
    model: AlexNet
    classes: tuple[str, ...] | None
    data_path: str | None
    mean: Tensor | None
    precision: str | None = None

    @property
    def network(self) -> AlexNetConfig:
        """The architecture."""
        return self.model.config


def open_trained(argument: str, device: torch.device) -> Trained:
    """The network in a run folder (its newest intact checkpoint), a checkpoint, or a weights file.

    Raises:
        DataError: there is none that can be used. UsageError: an ONNX file, and onnx is not installed.
    """
    path = Path(argument)
    if not path.exists():
        raise DataError(f"{argument} does not exist")
    mean = None
    if path.is_dir():
        path, state = checkpoint.of_run(path)
        tensors, metadata, mean = state["model"], state["metadata"], state["mean_image"]
    elif path.suffix in (".safetensors", ".onnx"):
        tensors, metadata = weights.read(path)
    else:
        state = checkpoint.load(path)
        tensors, metadata, mean = state["model"], state["metadata"], state["mean_image"]
    if "network" not in metadata:
        raise DataError(f"{path} does not say what network it is; give a run folder, a checkpoint or model.safetensors")
    try:
        network = from_table(AlexNetConfig, metadata["network"], "network")
        classes = typed("classes", metadata["classes"], tuple[str, ...] | None)
        data_path = typed("data_path", metadata["data_path"], str | None)
        precision = typed("precision", metadata.get("precision"), Literal["fp32", "tf32", "bf16"] | None)
    except (UsageError, KeyError, TypeError) as error:
        raise DataError(f"{path}: what it says of its network cannot be used: {error}") from None
    model = AlexNet(network)
    try:
        weights.load_weights(model, tensors)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise DataError(f"{path}: {name} holds weights that are infinite or not a number: its training diverged")
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    use(model, untuned(model, device))
    return Trained(path, model.eval(), classes, data_path, None if mean is None else mean.to(device), precision)
