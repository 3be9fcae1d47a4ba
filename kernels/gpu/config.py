"""The compile-time choices of the chain's kernels: how work is laid out in lanes, tiles and segments.

Nothing here needs Triton.
"""

import os

import torch
from torch import Tensor

from ..arguments import Normalization, Pooling

#: Triton reads this when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: Whether this PyTorch is built for AMD's GPUs.
AMD = torch.version.hip is not None
#: Lanes of a program, which is one warp: neighbouring lanes hand each other values.
LANES = 64 if AMD else 32
#: Channels of a lane where memory format and sizes allow it.
VECTOR = 8
#: Pixels of a tile, backward.
TILE = 4
#: Rows of windows, or of tiles, that a program walks down, more or less, if a step is as many of the input's pixels as
#: a tile; of smaller steps it takes more. With few rows all multiprocessors are done at about the same time, with many
#: less is computed before the first. It must not depend on the batch's size: the first row of a segment is computed by
#: other instructions than the rest, which may round otherwise.
SEGMENT_ROWS = 6
#: Fused multiply-adds are more exact than two roundings; Triton's default for them changes with its versions.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
#: Registers that a thread may take in bfloat16 on GPUs of compute capability 8 and 9, where pooling's windows behind a
#: normalization overlap by a row at most: room for seven and five warps of each scheduler. Told so, the assembler
#: finds its way with them; left to itself it takes some more in some versions.
REGISTERS = {"forward": 72, "backward": 96}
#: Elements of a window, and windows over a pixel, that are written out; more are walked by a loop.
UNROLLED = 9
#: Up to these, or their inverse, the ratio of ``k`` to ``alpha`` and the power of ``alpha`` that is taken out leave the
#: smallest activations that are right at all (1e-30) above the smallest normal float32.
FOLDED, FOLDED_POWER = 1e8, 1e18
#: What a part of a scaled square is at most: float32 holds it, and squares of what is as small as 1e-30 as well.
SQUARE = 1e37


#: What the kernels are told where a part is missing.
NO_NORMALIZATION = Normalization(1, 0.0, 0.0, 1.0, 1)
NO_POOLING = Pooling((1, 1), (1, 1), (0, 0), (1, 1), False)


def strides(tensor: Tensor, prefix: str = "") -> dict[str, int]:
    """Elements between images, rows, pixels of a row, and channels of ``[N, C, H, W]``, by the kernels' names."""
    axes = {"image": 0, "row": 2, "pixel": 3, "channel": 1}
    # The stride of a dimension of one element may be anything.
    return {
        f"{prefix}{name}_stride": tensor.stride(axis) if tensor.shape[axis] > 1 else 0 for name, axis in axes.items()
    }


def vector(channels: int, normalization: Normalization | None, *tensors: Tensor) -> int:
    """Channels that a lane takes at once."""
    group = channels // normalization.groups if normalization else VECTOR
    fits = channels % VECTOR == 0 and group % VECTOR == 0 and all(tensor.stride(1) == 1 for tensor in tensors)
    if normalization:
        # A window reaches no further than the neighbouring lane, and a group of channels lies in one program.
        fits = fits and normalization.behind <= VECTOR and group <= VECTOR * LANES
    return VECTOR if fits else 1


def lanes(strips: int, channels: int, vector: int, normalization: Normalization | None, channel_stride: int) -> int:
    """Lanes along the channels: neighbouring ones read what lies next to each other."""
    if vector == 1:
        return min(channels, LANES if channel_stride == 1 else max(1, LANES // strips))
    vectors = channels // vector
    if normalization:
        return vectors // normalization.groups
    divisors = [lanes for lanes in range(1, LANES + 1) if vectors % lanes == 0]
    return max(divisors, key=lambda lanes: (LANES // lanes * lanes, lanes))


def words(vector: int, *tensors: Tensor) -> int:
    """Words of 32 bits that hold a vector of channels of types narrower than float16; 0 where they are not aligned."""
    size = tensors[0].element_size() * VECTOR
    aligned = all(
        tensor.data_ptr() % size == 0
        and all(stride % VECTOR == 0 for name, stride in strides(tensor).items() if name != "channel_stride")
        for tensor in tensors
    )
    narrow = tensors[0].dtype in (torch.bfloat16, torch.uint8)
    return size // 4 if vector == VECTOR and narrow and aligned else 0


def segments(rows: int, pixels: int) -> tuple[int, int]:
    """Segments that an image of so many rows is cut into, and the rows of each; ``pixels`` are those of a step."""
    each = -(-rows // max(1, round(rows * min(pixels, TILE) / (SEGMENT_ROWS * TILE))))
    return -(-rows // each), each
