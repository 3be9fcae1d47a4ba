"""From stored pixels to the network's input (sections 2 and 4.1): crops, reflections, colour noise, mean subtraction.

An image's variation is drawn on the host from (seed, epoch, image number) alone, so that any number of processes on any
device sees the same images. The pixels are then computed on the device, one batch at a time.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common import seeds
from ..common.printing import first_line
from ..model.blocks import BlockLayout
from ..training.config import RecipeConfig
from .images import ColourComponents

if importlib.util.find_spec("triton") is not None:
    from kernels.gpu import input as one_pass
else:
    one_pass = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Variations:
    """The variation of each image in a batch: crop position in pixels, reflection, and the three colour factors."""

    top: NDArray[np.int64]
    left: NDArray[np.int64]
    reflect: NDArray[np.bool_]
    colour: NDArray[np.float32]


class VariationTable:
    """The variations of every image of a data set, epoch by epoch.

    Args:
        count: images in the data set.
        margin: pixels by which a stored image is larger than the network's input.
        recipe: selects the variations.
        seed: of the random draws.
    """

    def __init__(self, count: int, margin: int, recipe: RecipeConfig, seed: int) -> None:
        self.count, self.margin, self.recipe, self.seed = count, margin, recipe, seed
        self.epoch: int | None = None

    def rows(self, epoch: int, samples: NDArray[np.int64]) -> Variations:
        """The variations of the images ``samples`` in ``epoch``."""
        if self.epoch != epoch:
            self.epoch, self.table = epoch, self._draw(epoch)
        table = self.table
        return Variations(table.top[samples], table.left[samples], table.reflect[samples], table.colour[samples])

    def _draw(self, epoch: int) -> Variations:
        generator = seeds.augmentation(self.seed, epoch)
        crops = generator.integers(0, self.margin, (2, self.count), endpoint=True)
        reflect = generator.random(self.count) < 0.5
        colour = generator.standard_normal((self.count, 3), np.float32) * np.float32(self.recipe.colour_noise)
        if not self.recipe.crop:
            crops[:] = self.margin // 2
        if not self.recipe.reflect:
            reflect[:] = False
        return Variations(crops[0], crops[1], reflect, colour)


def _windows(images: Tensor, size: int) -> Tensor:
    """A view of ``[..., H, W, 3]`` with every crop in it: ``[..., H - size + 1, W - size + 1, size, size * 3]``."""
    return images.flatten(-2).unfold(-2, size, 1).unfold(-2, size * 3, 3)


class TrainingInput:
    """Computes the paper's training images from stored ones.

    Args:
        mean: mean image, float32 ``[H, W, 3]``.
        colour: principal components of the training pixels.
        size: rows and columns of the network's input.
        recipe: the colour noise's scale.
        device: where it runs.
    """

    def __init__(
        self,
        mean: NDArray[np.float32],
        colour: ColourComponents,
        size: int,
        recipe: RecipeConfig,
        device: torch.device,
    ) -> None:
        self.size, self.device = size, device
        self.margin = mean.shape[0] - size
        upright = torch.from_numpy(mean)
        #: The mean image and its reflection.
        self.means = torch.stack([upright, upright.flip(1)]).to(device)
        # As printed, for pixels in [0, 1]: eigenvalue / 255^2 in those units is eigenvalue / 255 in gray levels.
        scale = np.sqrt(colour.values) if recipe.colour_scale == "stddev" else colour.values / 255
        self.noise = recipe.colour_noise > 0
        self.basis = (colour.vectors * scale).astype(np.float32)
        self.divisor = 1 + recipe.colour_noise if recipe.colour_rescale else 1.0
        #: Whether the Triton kernel does all this in one pass; PyTorch's operators do after it failed.
        self.kernel = device.type == "cuda" and one_pass is not None
        #: Dtype of the result; float32 without the kernel.
        self.dtype = torch.float32
        #: Pixels, or blocks of pixels if the network reads blocks; pixels without the kernel.
        self.layout = BlockLayout(1, size, 0)

    def write_for(self, layout: BlockLayout, precision: str) -> None:
        """Have the kernel write what a network in channels_last memory format reads."""
        if self.kernel:
            self.layout = layout
            self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def _in_one_pass(self, images: Tensor, variations: Variations, out: Tensor | None) -> Tensor:
        drawn = np.empty((len(images), 6), np.float32)
        drawn[:, 0], drawn[:, 1], drawn[:, 2] = variations.top, variations.left, variations.reflect
        drawn[:, 3:] = variations.colour @ self.basis.T
        # One transfer, from pinned memory, so that the host does not wait.
        sent = torch.from_numpy(drawn)
        if self.device.type == "cuda":
            sent = sent.pin_memory().to(self.device, non_blocking=True)
        noise = sent[:, 3:] if self.noise else None
        block, blocks, padding = self.layout
        return one_pass.training_input(
            images, self.means[0], sent[:, :3], noise, self.divisor, self.size,
            block=block, blocks=blocks, padding=padding, dtype=self.dtype, out=out,
        )  # fmt: skip

    def __call__(self, images: Tensor, variations: Variations, out: Tensor | None = None) -> Tensor:
        """Crop, reflect, subtract the mean at the crop's position, add the colour noise.

        Args:
            images: uint8 ``[N, H, W, 3]`` on the device.
            variations: of these images.
            out: the tensor for the result, on a GPU; a new tensor by default.

        Returns:
            ``[N, 3, size, size]`` in :attr:`dtype` and channels_last memory format; or blocks of pixels as channels,
            as :attr:`layout` says.
        """
        if self.kernel:
            try:
                return self._in_one_pass(images, variations, out)
            except Exception as error:  # Compilers and drivers raise anything.
                print(f"note: images are cropped and varied by PyTorch's operators: {first_line(error)}")
                self.kernel = False
        count, size = len(images), self.size
        top, left = self._sent(variations.top), self._sent(variations.left)
        reflect = self._sent(variations.reflect)
        number = torch.arange(count, device=self.device)
        pixels = _windows(images, size)[number, top, left].view(count, size, size, 3)
        pixels = torch.where(reflect[:, None, None, None], pixels.flip(2), pixels)
        # In the reflected mean image, the same position is as far from the right border.
        place = torch.where(reflect, self.margin - left, left)
        result = _windows(self.means, size)[reflect.long(), top, place].view(count, size, size, 3)
        torch.sub(pixels, result, out=result)
        if self.noise:
            result += self._sent(variations.colour @ self.basis.T)[:, None, None, :]
        if self.divisor != 1:
            result /= self.divisor
        return result.permute(0, 3, 1, 2)

    def _sent(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=self.device.type == "cuda")


Crops = Callable[[Tensor, Tensor, int], Tensor]


def centre_crop(images: Tensor, mean: Tensor, size: int) -> Tensor:
    """The central crop minus the mean image there: float32 ``[N, 1, 3, size, size]``.

    Args:
        images: uint8 ``[N, H, W, 3]``.
        mean: float32 ``[H, W, 3]`` on the same device.
        size: rows and columns of the network's input.
    """
    top, left = (images.shape[1] - size) // 2, (images.shape[2] - size) // 2
    place = (slice(top, top + size), slice(left, left + size))
    return (images[:, *place] - mean[place]).permute(0, 3, 1, 2)[:, None]


def ten_crops(images: Tensor, mean: Tensor, size: int) -> Tensor:
    """The crops at the four corners and the centre, then their reflections (section 4.1).

    Args:
        images: uint8 ``[N, H, W, 3]``.
        mean: float32 ``[H, W, 3]`` on the same device.
        size: rows and columns of the network's input.

    Returns:
        float32 ``[N, 10, 3, size, size]``, each crop minus the mean image at its position.
    """
    bottom, right = images.shape[1] - size, images.shape[2] - size
    crops = []
    for top, left in ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)):
        place = (slice(top, top + size), slice(left, left + size))
        crops.append((images[:, *place] - mean[place]).permute(0, 3, 1, 2))
    return torch.stack([*crops, *(crop.flip(3) for crop in crops)], 1)
