"""The compile-time choices of the chain's kernels, all in one :class:`Config`, and how they are made.

This module does not need Triton.
"""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import Normalization, Pooling

#: Triton reads this when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: Whether this PyTorch is built for AMD's GPUs.
AMD = torch.version.hip is not None
#: Lanes of a program, which is one warp; neighbouring lanes exchange values.
LANES = 64 if AMD else 32
#: Channels per lane if memory format and sizes allow it.
VECTOR = 8
#: Pixels of a tile, backward.
TILE = 4
#: Roughly how many rows of windows (backward: of tiles) a program walks down if a step covers as many input pixels as a
#: tile; with smaller steps it takes more. With few rows, all multiprocessors finish at about the same time; with many,
#: the work before the first row is amortized better. It must not depend on the batch size: the first row of a segment
#: is computed by different instructions than the rest, which may round differently.
SEGMENT_ROWS = 6
#: Fused multiply-adds are more accurate than two roundings; Triton's default for them varies between versions.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
#: Launch options of the other kernels.
FOUR_WARPS = {**OPTIONS, "num_warps": 4}
#: Register cap per thread in bfloat16, on GPUs of compute capability 8 and 9, for chains with normalization whose
#: pooling windows overlap by at most one row: room for seven and five warps per scheduler. The assembler can fit the
#: code into the cap; without it, some versions use a few more registers.
REGISTERS = {"forward": 72, "backward": 96}
#: Most elements per window, and windows per pixel, that are unrolled; beyond that, the code loops.
UNROLLED = 9
#: Limits, also for the inverse, of the ratio of ``k`` to ``alpha`` and of the factor taken out of the power. They keep
#: activations down to 1e-30 above the smallest normal float32.
FOLDED, FOLDED_POWER = 1e8, 1e18
#: Largest factor of a scaled square. It stays within float32's range, as do the squares of values as small as 1e-30.
SQUARE = 1e37

#: Placeholders for missing parts of the chain.
NO_NORMALIZATION = Normalization(1, 0.0, 0.0, 1.0, 1)
NO_POOLING = Pooling((1, 1), (1, 1), (0, 0), (1, 1), False)


class Config(NamedTuple):
    """All compile-time choices of a kernel, as one ``tl.constexpr``; sizes and strides that may vary are arguments.

    Both kernels read the fields without a default. Kernels may read only fields: Triton's cache key contains the
    values of a tuple, but not the code of a property.
    """

    # The chain.
    bias: bool
    relu: bool
    normalize: bool
    #: Channels of the normalization window before and after the current one, at most the size of a group.
    before: int
    after: int
    #: Whether beta is the paper's 0.75.
    three_quarters: bool
    pool: bool
    kernel_rows: int
    kernel_columns: int
    stride_rows: int
    stride_columns: int
    padding_rows: int
    padding_columns: int
    dilation_rows: int
    dilation_columns: int

    # How work is assigned to lanes.
    #: Lanes of a program.
    lanes: int
    #: Lanes that work on the same pixels (a unit), and units per program.
    unit_lanes: int
    units: int
    #: Channels per lane: 8 or 1.
    vector: int
    #: Programs that share the pixels of a unit, each with its own channels.
    channel_blocks: int
    #: Channels that a lane loads before and after its own: ``before`` and ``after`` with a vector of 1, else none.
    load_before: int
    load_after: int
    #: Whether the last lane is idle and, if channels outside the group are needed, holds zeros for them.
    spare: bool
    #: 32-bit words that hold a vector of the input's and output's type; 0 where it is not loaded in words.
    words: int
    #: Elements between neighbouring pixels of a row. Constants, so that one address serves several pixels.
    pixel_stride: int
    out_pixel_stride: int

    # Forward.
    #: Whether to compute argmax indices.
    save: bool = False
    #: Whether maxima are compared as integers: the values' bits, whose lowest four may hold the argmax index.
    keys: bool = False
    #: Whether all NaN are positive, as produced by NVIDIA's arithmetic.
    canonical: bool = False
    #: Whether every window lies inside the image.
    inside: bool = False
    #: Rows that a window shares with the next one below; their maxima are reused.
    carried: int = 0
    #: Whether the elements of a window are unrolled.
    unrolled: bool = True
    #: Whether ``alpha ** -beta`` is multiplied in after the maximum, not before.
    fold: bool = False
    #: Whether squares are compared.
    squared: bool = False

    # Backward.
    #: Input pixels of a tile.
    tile_rows: int = 1
    tile_columns: int = 1
    #: Windows over a tile, and whether they are unrolled.
    over_rows: int = 1
    over_columns: int = 1
    tiled: bool = True
    #: Whether a ReLU's gradient is masked with the output: without normalization.
    masked: bool = False
    #: Whether to compute the bias gradient.
    sum: bool = False
    #: Whether ``k`` is positive. Otherwise 0 / 0 must be kept out of sums.
    positive: bool = True
    #: Like ``words``, for argmax indices.
    offset_words: int = 0
    gradient_pixel_stride: int = 0


class Sizes(NamedTuple):
    """Sizes of input and output; ``group`` is the number of channels per normalization group."""

    rows: int
    columns: int
    out_rows: int
    out_columns: int
    channels: int
    group: int


class Strides(NamedTuple):
    """Elements between images, rows and channels of ``[N, C, H, W]``."""

    image: int
    row: int
    channel: int


def strides(tensor: Tensor) -> tuple[Strides, int]:
    """Strides of ``[N, C, H, W]``, and the elements between neighbouring pixels of a row."""
    # The stride of a dimension of one element may be anything.
    image, channel, row, pixel = (tensor.stride(axis) if tensor.shape[axis] > 1 else 0 for axis in range(4))
    return Strides(image, row, channel), pixel


def chain(
    normalization: Normalization | None,
    pooling: Pooling | None,
    bias: Tensor | None,
    relu: bool,
    channels: int,
    vector: int,
) -> dict[str, Any]:
    """The fields of :class:`Config` that describe the chain."""
    norm, pool = normalization or NO_NORMALIZATION, pooling or NO_POOLING
    # The group has no channels further away.
    furthest = channels // norm.groups - 1
    before, after = min(norm.before, furthest), min(norm.after, furthest)
    fields = {
        "bias": bias is not None,
        "relu": relu,
        "normalize": normalization is not None,
        "before": before,
        "after": after,
        "load_before": before if vector == 1 else 0,
        "load_after": after if vector == 1 else 0,
        "three_quarters": norm.beta == 0.75,
        "pool": pooling is not None,
    }
    for name, pair in zip(("kernel", "stride", "padding", "dilation"), pool[:4], strict=True):
        fields[f"{name}_rows"], fields[f"{name}_columns"] = pair
    return fields


def layout(
    strips: int, channels: int, vector: int, normalization: Normalization | None, channel_stride: int
) -> dict[str, Any]:
    """The fields of :class:`Config` that assign ``strips`` of pixels to lanes."""
    unit_lanes = lanes(strips, channels, vector, normalization, channel_stride)
    units = LANES // unit_lanes
    return {
        "lanes": LANES,
        "unit_lanes": unit_lanes,
        "units": units,
        "vector": vector,
        "channel_blocks": -(-channels // (unit_lanes * vector)),
        "spare": unit_lanes * units < LANES,
    }


def vector(channels: int, normalization: Normalization | None, *tensors: Tensor) -> int:
    """Channels per lane."""
    group = channels // normalization.groups if normalization else VECTOR
    fits = channels % VECTOR == 0 and group % VECTOR == 0 and all(tensor.stride(1) == 1 for tensor in tensors)
    if normalization:
        # A window extends no further than the neighbouring lane, and a channel group fits into one program.
        fits = fits and normalization.before <= VECTOR and group <= VECTOR * LANES
    return VECTOR if fits else 1


def lanes(strips: int, channels: int, vector: int, normalization: Normalization | None, channel_stride: int) -> int:
    """Lanes along the channels, so that neighbouring lanes read neighbouring elements."""
    if vector == 1:
        return min(channels, LANES if channel_stride == 1 else max(1, LANES // strips))
    vectors = channels // vector
    if normalization:
        return vectors // normalization.groups
    divisors = [lanes for lanes in range(1, LANES + 1) if vectors % lanes == 0]
    return max(divisors, key=lambda lanes: (LANES // lanes * lanes, lanes))


def words(vector: int, *tensors: Tensor) -> int:
    """32-bit words that hold a vector of channels of bfloat16 or uint8; 0 for other types and unaligned tensors."""
    size = tensors[0].element_size() * VECTOR

    def is_aligned(tensor: Tensor) -> bool:
        (image, row, _), pixel = strides(tensor)
        return tensor.data_ptr() % size == 0 and all(stride % VECTOR == 0 for stride in (image, row, pixel))

    narrow = tensors[0].dtype in (torch.bfloat16, torch.uint8)
    return size // 4 if vector == VECTOR and narrow and all(map(is_aligned, tensors)) else 0


def segments(rows: int, pixels: int) -> tuple[int, int]:
    """The number of segments that ``rows`` are split into, and the rows of each; a step covers ``pixels`` pixels."""
    each = -(-rows // max(1, round(rows * min(pixels, TILE) / (SEGMENT_ROWS * TILE))))
    return -(-rows // each), each
