"""Space-to-depth: a strided convolution over pixels as a stride-1 convolution over blocks of pixels.

With three input channels most of a GPU's tensor cores are idle: in conv1 (section 3.5) cuDNN reaches 3 % of an H100's
throughput. With blocks of 4x4 pixels as 48 channels, its 11x11 kernel with stride 4 becomes a 3x3 kernel with stride 1,
padded with a twelfth row and column of zero taps. The sums are the same, in another order.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class BlockLayout(NamedTuple):
    """The layout of an image in blocks of pixels.

    Attributes:
        block: rows and columns of pixels in a block; 1 for plain pixels.
        blocks: rows and columns of blocks.
        padding: rows and columns of zeros above and to the left of the image.
    """

    block: int
    blocks: int
    padding: int


def block_count(out_size: int, kernel_size: int, stride: int) -> int:
    """Rows, or columns, of blocks that a convolution with ``out_size`` output rows, or columns, reads."""
    return out_size + -(-kernel_size // stride) - 1


def blocks(images: Tensor, block: int, count: int, padding: int) -> Tensor:
    """Rearrange blocks of pixels into channels.

    Args:
        images: ``[N, C, H, W]``.
        block: rows and columns of a block; the convolution's stride.
        count: rows and columns of blocks, from :func:`block_count`.
        padding: rows and columns of zeros above and to the left.

    Returns:
        ``[N, block * block * C, count, count]``, the channels ordered by row, column, colour, in channels_last memory
        format. Blocks beyond the image are zero-padded.
    """
    n, channels, height, width = images.shape
    right, bottom = count * block - width - padding, count * block - height - padding
    padded = F.pad(images, (padding, right, padding, bottom)).permute(0, 2, 3, 1)
    parts = padded.reshape(n, count, block, count, block, channels).transpose(2, 3)
    return parts.reshape(n, count, count, block * block * channels).permute(0, 3, 1, 2)


def block_weight(weight: Tensor, block: int) -> Tensor:
    """The weights that, applied to :func:`blocks`, equal ``weight`` applied to pixels with stride ``block``.

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
