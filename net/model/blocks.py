"""A convolution with a stride over images, as one with stride 1 over blocks of pixels (space to depth).

A convolution over three channels leaves most of a GPU's matrix unit idle: of conv1's (section 3.5) cuDNN reaches 3 % of
an H100's rate. With blocks of 4x4 pixels as 48 channels, its 11x11 windows at a stride of 4 become 3x3 windows at a
stride of 1, whose twelfth row and column of taps are zero. The sums are the same, in another order.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class BlockLayout(NamedTuple):
    """How an image lies in blocks of pixels.

    Attributes:
        block: rows and columns of pixels in a block; 1 for pixels as they are.
        blocks: rows and columns of blocks.
        padding: rows and columns of zeros above and to the left of the image.
    """

    block: int
    blocks: int
    padding: int


def block_count(out_size: int, kernel_size: int, stride: int) -> int:
    """Rows, or columns, of blocks under the windows of a convolution that has ``out_size`` of them."""
    return out_size + -(-kernel_size // stride) - 1


def blocks(images: Tensor, block: int, count: int, padding: int) -> Tensor:
    """Blocks of pixels as channels.

    Args:
        images: ``[N, C, H, W]``.
        block: rows and columns of a block; the convolution's stride.
        count: rows and columns of blocks, from :func:`block_count`.
        padding: rows and columns of zeros above and to the left.

    Returns:
        ``[N, block * block * C, count, count]``, the channels in the order row, column, colour, in channels_last
        memory format. Where the blocks reach beyond the image there are zeros.
    """
    n, channels, height, width = images.shape
    right, bottom = count * block - width - padding, count * block - height - padding
    padded = F.pad(images, (padding, right, padding, bottom)).permute(0, 2, 3, 1)
    parts = padded.reshape(n, count, block, count, block, channels).transpose(2, 3)
    return parts.reshape(n, count, count, block * block * channels).permute(0, 3, 1, 2)


def block_weight(weight: Tensor, block: int) -> Tensor:
    """The weights that read :func:`blocks` as ``weight`` reads pixels at a stride of ``block``.

    Args:
        weight: ``[O, C, K, K]``.
        block: the stride.

    Returns:
        ``[O, block * block * C, K', K']`` with ``K' = ceil(K / block)``, in channels_last memory format.
    """
    out, channels, size, _ = weight.shape
    taps = -(-size // block)
    missing = taps * block - size
    padded = F.pad(weight, (0, missing, 0, missing)).permute(0, 2, 3, 1)
    parts = padded.reshape(out, taps, block, taps, block, channels).transpose(2, 3)
    return parts.reshape(out, taps, taps, block * block * channels).permute(0, 3, 1, 2)
