"""A trained network as saved by its run, for the commands that use one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import pretrained
from ..common.errors import DataError, UsageError
from ..common.fields import from_table, typed
from ..data.sources import packed_size
from ..model import weights
from ..model.alexnet import AlexNet
from ..model.config import AlexNetConfig
from ..model.forms import untuned, use
from ..readers.checkpoint import TRAINED
from ..readers.files import reason

#: The advice for a file without a mean image.
MEAN_RGB_HINT = "--mean-rgb R G B gives a colour; Caffe's ImageNet models were trained with 123 117 104"


@dataclass(frozen=True)
class Trained:
    """A network ready for inference.

    ``model`` is in evaluation mode. ``classes`` is None if the file does not name them. ``data_path`` is None if the
    network was trained on the embedded digits or the file does not say on what. ``mean`` is the training images' mean,
    float32 ``[size, size, 3]``; it is None if the file holds only weights, and then ``mean_rgb`` is the colour to
    subtract instead, in gray levels 0..255, if known. ``precision`` is that of the training, None if the file does not
    say. ``recipe`` holds the run's flags that decide what the network learned, as stored in weights to share; it is
    empty if the file has none.
    """

    path: Path
    model: AlexNet
    classes: tuple[str, ...] | None
    data_path: str | None
    mean: Tensor | None
    mean_rgb: tuple[float, ...] | None = None
    precision: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name in output: that of pretrained weights, or the path."""
        return self.path.stem if pretrained.is_shipped(self.path) else str(self.path)

    @property
    def network(self) -> AlexNetConfig:
        """The architecture."""
        return self.model.config

    def mean_image(self) -> Tensor | None:
        """What is subtracted from stored images: ``mean``, or ``mean_rgb`` for images packed as for a run; None if
        neither is known."""
        if self.mean is None and self.mean_rgb is not None:
            return self.colour_image(packed_size(self.network.image_size))
        return self.mean

    def colour_image(self, size: int) -> Tensor:
        """``mean_rgb`` as a mean image, float32 ``[size, size, 3]`` on the network's device."""
        colour = torch.tensor(self.mean_rgb, dtype=torch.float32, device=next(self.model.parameters()).device)
        return colour.expand(size, size, 3).contiguous()


def open_trained(argument: str, device: torch.device, mean_rgb: tuple[float, ...] | None = None) -> Trained:
    """The network in a run folder (its newest intact checkpoint), a checkpoint, or a weights file.

    Args:
        argument: its path, or the name of pretrained weights; see :func:`net.pretrained.find`.
        device: of the network.
        mean_rgb: the colour to subtract, for a file without a mean image.

    Raises:
        DataError: there is no usable network. UsageError: an ONNX file, and onnx is not installed; or a path that is
            also the name of pretrained weights.
    """
    path, state = weights.read_state(pretrained.find(argument), TRAINED)
    tensors, metadata, mean = state["model"], state["metadata"], state.get("mean_image")
    if "network" not in metadata:
        raise DataError(f"{path} does not say what network it is; give a run folder, a checkpoint or model.safetensors")
    try:
        network = from_table(AlexNetConfig, metadata["network"], "network")
        classes = typed("classes", metadata["classes"], tuple[str, ...] | None)
        data_path = typed("data_path", metadata["data_path"], str | None)
        if mean_rgb is None and "subtracted_rgb" in metadata:
            mean_rgb = typed("subtracted_rgb", metadata["subtracted_rgb"], tuple[float, ...])
            if len(mean_rgb) != 3:
                raise UsageError(f"subtracted_rgb must be three numbers; got {len(mean_rgb)}")
        precision = typed("precision", metadata.get("precision"), Literal["fp32", "tf32", "bf16"] | None)
        recipe = typed("recipe", metadata.get("recipe", {}), dict[str, Any])
    except (UsageError, KeyError, TypeError) as error:
        raise DataError(f"{path}: its network metadata is invalid: {reason(error)}") from None
    # On the meta device: the network that the file describes may be larger than its content.
    with torch.device("meta"):
        model = AlexNet(network)
    try:
        weights.load_weights(model, tensors)
        model.to_empty(device="cpu")
        weights.load_weights(model, tensors)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    use(model, untuned(model, device))
    return Trained(
        path,
        model.eval(),
        classes,
        data_path,
        None if mean is None else mean.to(device),
        None if mean is not None else mean_rgb,
        precision,
        recipe,
    )


def check_mean_rgb(mean_rgb: tuple[float, ...] | None, networks: Sequence[Trained]) -> None:
    """Reject a colour that would not be used.

    Raises:
        UsageError: every network has its own mean image.
    """
    if mean_rgb is not None and all(item.mean is not None for item in networks):
        raise UsageError(f"--mean-rgb: {networks[0].path} holds the mean image of its training, which is subtracted")
