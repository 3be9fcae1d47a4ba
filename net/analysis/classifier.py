"""A trained network in a program of your own; see :func:`net.load`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..common.device import choose, resolve_precision
from ..common.errors import DataError
from ..data.augmentation import centre_crop
from ..data.decode import decode, square, upright
from ..readers.image import UnreadableImageError
from ..training.evaluation import TOP, probabilities
from .features import check_colours, class_names
from .trained import open_trained

#: A file, an opened image, or uint8 ``[H, W, 3]`` in RGB.
AnyImage = str | os.PathLike[str] | Image.Image | Any


class Classifier:
    """A trained network with its preprocessing and its class names.

    Attributes:
        model: the :class:`net.model.alexnet.AlexNet`, in evaluation mode on :attr:`device`; its input is what
            :meth:`preprocess` returns.
        classes: the class names; their indices if the file has no names.
        mean: the training's mean image, float32 ``[stored, stored, 3]``, which is subtracted.
        precision: that :meth:`predict` computes in: the training's, if the device supports it.

    Args:
        path, device: see :func:`net.load`.
    """

    def __init__(self, path: str, device: str | None = None) -> None:
        self.device = choose(device)
        trained = open_trained(path, self.device)
        check_colours(trained)
        mean = trained.mean_image()
        if mean is None:
            raise DataError(f"{path} holds no mean image to subtract; give the run folder or a checkpoint")
        self.path, self.model, self.mean = trained.path, trained.model, mean
        self.classes = class_names(trained)
        self.precision = resolve_precision("auto", self.device, trained.precision)

    def preprocess(self, images: Sequence[AnyImage]) -> Tensor:
        """The network's input.

        Each image's shorter side is scaled to the size of the training images. Then the central square is cropped, from
        it the centre at the network's input size, and the mean image is subtracted (section 2).

        Args:
            images: files, opened Pillow images, or uint8 ``[H, W, 3]`` RGB arrays or tensors, in any mix.

        Returns:
            float32 ``[N, 3, image_size, image_size]`` on :attr:`device`.

        Raises:
            DataError: a file cannot be read as an image. TypeError, ValueError: an item is not an image.
        """
        if isinstance(images, (str, os.PathLike, Image.Image)):
            raise TypeError("images must be a sequence; for one image give a list of one")
        stored = self.mean.shape[0]
        pixels = [self._square(number, image, stored) for number, image in enumerate(images)]
        if not pixels:
            raise ValueError("images must hold at least one image")
        batch = torch.from_numpy(np.stack(pixels)).to(self.device)
        return centre_crop(batch, self.mean, self.model.config.image_size)[:, 0]

    def predict(
        self, images: Sequence[AnyImage], top: int = TOP, batch_size: int = 128
    ) -> list[list[tuple[str, float]]]:
        """The most probable classes of each image, with their probabilities, the most probable first.

        Args:
            images: as in :meth:`preprocess`, or none.
            top: number of classes; all if there are fewer.
            batch_size: images per batch.

        Returns:
            One list per image; an empty list for no images.

        Raises:
            DataError, TypeError, ValueError: as in :meth:`preprocess`; ``top`` or ``batch_size`` is under 1.
        """
        for name, value in (("top", top), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if isinstance(images, (str, os.PathLike, Image.Image)):
            raise TypeError("images must be a sequence; for one image give a list of one")
        answers = []
        for first in range(0, len(images), batch_size):
            input = self.preprocess(images[first : first + batch_size])
            with torch.no_grad():
                found = probabilities(self.model, input[:, None], self.precision, torch.channels_last)
            values, labels = found.topk(min(top, len(self.classes)))
            answers += [
                [(self.classes[label], value) for label, value in zip(row, likely, strict=True)]
                for row, likely in zip(labels.tolist(), values.tolist(), strict=True)
            ]
        return answers

    def _square(self, number: int, image: AnyImage, size: int) -> Any:
        if isinstance(image, (str, os.PathLike)):
            try:
                return decode(Path(image), size)
            except UnreadableImageError as error:
                raise DataError(f"{os.fspath(image)} cannot be read as an image: {error}") from None
        if isinstance(image, Image.Image):
            try:
                return square(upright(image), size)
            except UnreadableImageError as error:
                raise ValueError(f"images[{number}]: {error}") from None
        pixels = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise ValueError(
                f"images[{number}] must be a file, a Pillow image or uint8 [H, W, 3]; got {pixels.dtype} "
                f"{list(pixels.shape)}"
            )
        return square(np.array(pixels), size)

    def __repr__(self) -> str:
        return f"Classifier({str(self.path)!r}, {len(self.classes)} classes, {self.device}, {self.precision})"
