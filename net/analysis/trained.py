"""A trained network as its run left it, for the commands that use one."""

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
from ..doors.checkpoint import TRAINED
from ..doors.files import reason
from ..model import weights
from ..model.alexnet import AlexNet
from ..model.config import AlexNetConfig
from ..model.forms import untuned, use

#: What can be said to somebody whose file holds no mean image.
MEAN_RGB_HINT = "--mean-rgb R G B gives a colour; Caffe's ImageNet models were trained with 123 117 104"


@dataclass(frozen=True)
class Trained:
    """A network ready to be asked.

    ``model`` is in evaluation mode. ``classes`` is None where the file does not name them, ``data_path`` where it was
    trained on the embedded digits or does not say on what, and ``mean``, the mean image of its training images, float32
    ``[size, size, 3]``, where the file holds weights alone. ``mean_rgb`` is then the colour that is subtracted instead,
    in gray levels 0..255, where it is known.
    ``precision`` is what it was trained in, None where the file does not say. ``recipe`` holds those flags of its run
    that decide what it learned, as weights to share keep them; it is empty where the file has none.
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
        """What it is called in answers: the name that it ships by, or its path."""
        return self.path.stem if pretrained.is_shipped(self.path) else str(self.path)

    @property
    def network(self) -> AlexNetConfig:
        """The architecture."""
        return self.model.config

    def mean_image(self) -> Tensor | None:
        """What is subtracted of stored images: ``mean``, or ``mean_rgb`` for images packed as for a run; None where
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
        argument: its path, or the name of weights that ship with the package; see :func:`net.pretrained.find`.
        device: where it goes.
        mean_rgb: the colour to subtract, of a file that holds no mean image.

    Raises:
        DataError: there is none that can be used. UsageError: an ONNX file, and onnx is not installed; or a path that
            is also the name of weights that ship.
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
    # Without memory: what the file says of its network may be larger than what it holds.
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
    """Refuse a colour that would not be used.

    Raises:
        UsageError: each of the networks has a mean image of its own.
    """
    if mean_rgb is not None and all(item.mean is not None for item in networks):
        raise UsageError(f"--mean-rgb: {networks[0].path} holds the mean image of its training, which is subtracted")
