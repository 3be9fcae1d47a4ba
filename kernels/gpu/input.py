"""From stored pixels to the network's input in one pass: crop, reflection, mean, colour noise, cast and layout.

For ``[N, H, W, 3]`` bytes and a crop of S pixels, it reads 3 S^2 bytes per image and writes the input once: as pixels,
or as blocks of pixels that become channels, which the first convolution reads on a GPU
(:func:`net.model.blocks.blocks`). The mean image stays in the caches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import FOUR_WARPS
from .runtime import launch

CHANNELS = 3
#: Elements per program, all in one row of blocks.
ELEMENTS = 1024


@triton.jit
def input_kernel(
    images,
    mean,
    places,
    noise,
    output,
    place_stride,
    height,
    width,
    size,
    blocks,
    padding,
    divisor,
    BLOCK: tl.constexpr,
    NOISE: tl.constexpr,
    DIVIDE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """One segment of one row of blocks of one image."""
    row = tl.program_id(0)
    image = row // blocks
    block_row = row % blocks
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    # Within a block: row, column, colour.
    channels: tl.constexpr = BLOCK * BLOCK * 3
    inside = element % channels
    y = block_row * BLOCK + inside // (BLOCK * 3) - padding
    x = element // channels * BLOCK + inside // 3 % BLOCK - padding
    colour = inside % 3
    written = element < blocks * channels
    valid = written & (y >= 0) & (y < size) & (x >= 0) & (x < size)
    top = tl.load(places + image * place_stride).to(tl.int32)
    left = tl.load(places + image * place_stride + 1).to(tl.int32)
    reflect = tl.load(places + image * place_stride + 2)
    x = tl.where(reflect != 0, size - 1 - x, x)
    place = ((top + y) * width + left + x) * 3 + colour
    pixels = tl.load(images + image.to(tl.int64) * (height * width * 3) + place, mask=valid, other=0)
    value = pixels.to(tl.float32) - tl.load(mean + place, mask=valid, other=0.0)
    if NOISE:
        value += tl.load(noise + image * place_stride + colour)
    if DIVIDE:
        value = tl.div_rn(value, divisor)
    value = tl.where(valid, value, 0.0)
    tl.store(output + row.to(tl.int64) * (blocks * channels) + element, value.to(output.dtype.element_ty), mask=written)


def training_input(
    images: Tensor,
    mean: Tensor,
    places: Tensor,
    noise: Tensor | None,
    divisor: float,
    size: int,
    *,
    block: int = 1,
    blocks: int | None = None,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """``(pixels - mean + noise) / divisor`` of each image's crop, reflected or not.

    Args:
        images: uint8 ``[N, H, W, 3]``, contiguous.
        mean: float32 ``[H, W, 3]``, contiguous; the part under the crop is subtracted before the reflection.
        places: float32 ``[N, 3]``: the crop's first row and column, and 1 where it is reflected.
        noise: float32 ``[N, 3]`` with ``places``' strides, added to each colour; None adds nothing.
        divisor: what the result is divided by.
        size: rows and columns of the crop.
        block: rows and columns of pixels that become channels, in the order row, column, colour; 1 for pixels.
        blocks: rows and columns of blocks; ``size`` with a block of 1. Beyond the crop, pixels are zero.
        padding: rows and columns of zeros above and to the left of the crop.
        dtype: of the result; arithmetic is float32.
        out: where the result goes; a new tensor otherwise.

    Returns:
        ``[N, 3 block^2, blocks, blocks]`` in channels_last memory format.
    """
    count, height, width, _ = images.shape
    blocks = size if blocks is None else blocks
    channels = CHANNELS * block * block
    if out is None:
        shape = (count, channels, blocks, blocks)
        out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    grid = (count * blocks, triton.cdiv(blocks * channels, ELEMENTS))
    launch(
        input_kernel,
        grid,
        images.device,
        images,
        mean,
        places,
        mean if noise is None else noise,
        out,
        places.stride(0),
        height,
        width,
        size,
        blocks,
        padding,
        divisor,
        BLOCK=block,
        NOISE=noise is not None,
        DIVIDE=divisor != 1,
        ELEMENTS=ELEMENTS,
        **FOUR_WARPS,
    )
    return out
