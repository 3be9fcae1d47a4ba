"""A trained network's class names, data set, mean image, and features (fc7) of images."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..common.errors import DataError
from ..data.augmentation import centre_crop
from ..data.config import SYNTHETIC
from ..data.images import ImageData, Split
from ..data.loader import Loader
from ..data.sources import open_data
from .trained import MEAN_RGB_HINT, Trained


def class_names(trained: Trained) -> tuple[str, ...]:
    """The names of the network's classes; if its file has none, their indices, with a note on stderr.

    Raises:
        DataError: more or fewer names than classes.
    """
    count = trained.network.classes
    if not trained.classes:
        print(f"{trained.path} holds no class names: showing class indices", file=sys.stderr)
        return tuple(map(str, range(count)))
    if len(trained.classes) != count:
        raise DataError(f"{trained.path} names {len(trained.classes)} classes, but its network has {count}")
    return trained.classes


def check_colours(trained: Trained) -> None:
    """Check that the network reads RGB, to which all images are converted.

    Raises:
        DataError: it reads another number of channels.
    """
    channels = trained.network.image_channels
    if channels != 3:
        raise DataError(f"{trained.path}: its first layer reads images with {channels} channels, not 3 (RGB)")


def mean_image(trained: Trained, data: ImageData, device: torch.device) -> Tensor:
    """The mean image to subtract: that of the network's training or, if its file has none, that of ``data``.

    Raises:
        DataError: stored images of another size, or a network that does not read RGB.
    """
    check_colours(trained)
    size, stored = trained.network.image_size, f"the images of {data.name} are {data.size}x{data.size}"
    if trained.mean is None:
        if data.size < size:
            raise DataError(f"{trained.path} reads {size}x{size} images; {stored}")
        if trained.mean_rgb is not None:
            return trained.colour_image(data.size)
        print(f"{trained.path} holds no mean image: subtracting that of {data.name} ({MEAN_RGB_HINT})")
        return torch.from_numpy(data.mean).to(device)
    if tuple(trained.mean.shape) != data.mean.shape:
        size = trained.mean.shape[0]
        raise DataError(
            f"{trained.path} was trained on stored images of {size}x{size}, but {stored}; "
            f"prepare the images with --size {size}"
        )
    return trained.mean


def open_its_data(trained: Trained, data_path: str | None, device: torch.device) -> tuple[ImageData, Tensor]:
    """The data set at ``data_path``, by default the one the network was trained on, and the mean image to subtract.

    Raises:
        DataError: its classes or the size of its images differ.
    """
    path = data_path if data_path is not None else trained.data_path
    if data_path is None and path is not None and path.partition(":")[0] != SYNTHETIC and not Path(path).exists():
        raise DataError(f"{trained.name} was trained on {path}, which is not here: give --data-path")
    stored = None if trained.mean is None else trained.mean.shape[0]
    network = trained.network
    data = open_data(path, image_size=network.image_size, classes=network.classes, stored=stored)
    if trained.classes is None and len(data.classes) == trained.network.classes:
        print(f"{trained.path} holds no class names: assuming those of {data.name}, in the same order")
    elif data.classes != trained.classes:
        raise DataError(f"the classes of {data.name} differ from those {trained.path} was trained on")
    return data, mean_image(trained, data, device)


def features(trained: Trained, images: Tensor, mean: Tensor) -> Tensor:
    """The last hidden features (fc7) of the images' centre crops: float32 ``[N, features]``.

    Args:
        trained: the network.
        images: uint8 ``[N, size, size, 3]`` on the network's device.
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
        batch_size: images per batch.
        progress: called after each batch with its number of images.
    """
    loader = Loader(split, batch_size, mean.device, shuffle=False)
    for batch in loader:
        yield features(trained, batch.images, mean)
        progress(len(batch.labels))
