"""A trained network as its run left it, with the data and the preprocessing that belong to it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint, runs, weights
from .alexnet import AlexNet
from .augmentation import centre_crop
from .config import AlexNetConfig
from .data.images import ImageData, Split
from .data.loader import Loader
from .data.sources import open_data
from .errors import DataError, UsageError
from .fields import from_table, typed


@dataclass(frozen=True)
class Trained:
    """A network ready to be asked.

    ``model`` is in evaluation mode. ``classes`` is None where the file does not name them, ``data_path`` where it was
    trained on the embedded digits or does not say on what, and ``mean``, the mean image of its training images, float32
    ``[size, size, 3]`` where ``size`` is that of the stored images, where the file holds weights alone.
    """

    path: Path
    model: AlexNet
    classes: tuple[str, ...] | None
    data_path: str | None
    mean: Tensor | None

    @property
    def network(self) -> AlexNetConfig:
        """The architecture."""
        return self.model.config

    @property
    def names(self) -> tuple[str, ...]:
        """The classes' names, or their numbers where the file does not name them."""
        return self.classes or tuple(map(str, range(self.network.classes)))


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
        found = checkpoint.newest(runs.folder_of(path) / "checkpoints")
        if found is None:
            raise DataError(f"{argument} holds no intact checkpoint (checkpoints/step_*.pt)")
        path, state = found
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
        classes = typed("classes", metadata.get("classes"), tuple[str, ...] | None)
        data_path = typed("data_path", metadata.get("data_path"), str | None)
    except (UsageError, KeyError, TypeError) as error:
        raise DataError(f"{path}: what it says of its network cannot be used: {error}") from None
    if classes and len(classes) != network.classes:
        raise DataError(f"{path} names {len(classes)} classes and its network has {network.classes}")
    model = AlexNet(network)
    try:
        weights.load_weights(model, tensors)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trained(path, model.eval(), classes or None, data_path, None if mean is None else mean.to(device))


def open_its_data(trained: Trained, data_path: str | None, device: torch.device) -> tuple[ImageData, Tensor]:
    """The data set it was trained on, or another of the same classes, and the mean image to be subtracted.

    Raises:
        DataError: images of other classes or of another size.
    """
    path = data_path if data_path is not None else trained.data_path
    data = open_data(path, image_size=trained.network.image_size, classes=trained.network.classes)
    if trained.classes is None and len(data.classes) == trained.network.classes:
        print(f"{trained.path} does not name its classes: they are taken to be those of {data.name}, in their order")
    elif data.classes != trained.classes:
        raise DataError(f"{data.name} has other classes than {trained.path} was trained on")
    size = trained.network.image_size if trained.mean is None else trained.mean.shape[0]
    if data.size < size or (trained.mean is not None and data.size != size):
        raise DataError(
            f"{trained.path} was trained on stored images of {size}x{size} and {data.name} holds "
            f"{data.size}x{data.size}; prepare the images with --size {size}"
        )
    if trained.mean is None:
        print(f"{trained.path} holds no mean image: subtracting that of {data.name}")
        return data, torch.from_numpy(data.mean).to(device)
    return data, trained.mean


def features(trained: Trained, images: Tensor, mean: Tensor) -> Tensor:
    """The last hidden features (fc7) of the images' central crops: float32 ``[N, features]``.

    Args:
        trained: the network.
        images: uint8 ``[N, size, size, 3]`` on its device.
        mean: mean image, float32 ``[size, size, 3]``.
    """
    with torch.no_grad():
        crops = centre_crop(images, mean, trained.network.image_size)[:, 0]
        return trained.model.features(crops.contiguous(memory_format=torch.channels_last)).float()


def features_of(
    trained: Trained,
    split: Split,
    mean: Tensor,
    batch_size: int,
    progress: Callable[[int], None] = lambda count: None,
) -> Iterator[Tensor]:
    """:func:`features` of a split, batch by batch, in order.

    Args:
        trained, mean: the network and its mean image.
        split: the images.
        batch_size: images in a batch.
        progress: told the number of images of each batch that is done.
    """
    loader = Loader(split, batch_size, mean.device, shuffle=False)
    for batch in loader:
        yield features(trained, batch.images, mean)
        progress(len(batch.labels))
