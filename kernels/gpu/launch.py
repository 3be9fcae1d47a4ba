"""The chain bias, ReLU, local response normalization, max pooling as two Triton kernels, forward and backward.

Bytes moved, for an input of ``n`` elements of ``b`` bytes and ``w`` pooling windows (times channels): forward reads
``n b`` and writes ``w b``, and ``w`` bytes of argmax indices where a gradient is wanted; backward reads
``n b + w b + w`` and writes ``n b``. What overlapping windows read twice comes from the caches.

A program is one warp that walks down the rows of a segment of an image. In channels_last memory a lane holds eight
channels and gets the other channels of the window from the neighbouring lanes. In other memory formats, or if the
number of channels is not a multiple of eight, a lane holds one channel.

Forward reuses the maxima of the rows that neighbouring windows share. In half types after a normalization, the argmax
index replaces the four lowest bits of a value, so that one comparison finds both. Of values whose significands agree
in twenty bits (half types have 8 or 11), the first wins. In other cases, all bits of the float32 are compared. Before
pooling, alpha is factored out of the power and multiplied in after the maximum. With a ReLU and the paper's beta,
squares are compared, ``(a r)^2 r`` with ``r = rsqrt(s)``, and the root is taken of the maximum.

Backward finds, for each input pixel, which of the windows over it selected it. So no addition is atomic, and gradients
are bitwise identical in every run and at any batch size. The bias gradient is summed over the pixels of each program,
then over the programs in order.

Each step of the walk loads the next step's data into shared memory, through Triton's two-stage loop pipelining, if
elements have four bytes or come in vectors; inference loads it at the end of the step. Registers limit the number of
warps that can hide latency. Therefore backward computes each pixel by itself, and addresses are incremented rather than
kept in registers.

Supported: float32, float16 and bfloat16. float64, a beta of 0 and a negative alpha or k run :mod:`kernels.reference`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..arguments import Normalization, Pooling
from . import config
from .backward import backward_kernel
from .config import Config, Sizes, Strides
from .forward import forward_kernel
from .runtime import launch


class Launch(NamedTuple):
    """A kernel, its grid, its run-time arguments by name, and its compile-time configuration ``C``."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Tensor | int | float | Sizes | Strides]
    config: Config

    def options(self, capability: int | None) -> dict[str, Any]:
        """Triton's options for NVIDIA GPUs of a compute capability (the number before the dot), or for others."""
        c = self.config
        if self.kernel is forward_kernel:
            registers, capped = config.REGISTERS["forward"], c.keys and c.inside and c.carried <= 1
        else:
            registers = config.REGISTERS["backward"]
            capped = c.normalize and c.tiled and c.over_rows * c.over_columns <= 4
        if capability in (8, 9) and c.words == config.VECTOR // 2 and capped:
            return {**config.OPTIONS, "maxnreg": registers}
        return dict(config.OPTIONS)

    def run(self, device: torch.device) -> None:
        """Launch on ``device``'s current stream."""
        gpu = device.type == "cuda"
        capability = torch.cuda.get_device_capability(device)[0] if gpu and not config.AMD else None
        launch(self.kernel, self.grid, device, **self.arguments, C=self.config, **self.options(capability))


def _maps(tensor: Tensor) -> Tensor:
    """``[N, C, ...]`` as ``[N, C, H, W]``; any other number of trailing dimensions becomes one row."""
    return tensor if tensor.dim() == 4 else tensor.flatten(2).unsqueeze(2)


def _work(strips: int, rows: int, pixels: int, layout: dict[str, Any]) -> tuple[tuple[int], dict[str, int]]:
    """The grid over ``strips`` of ``rows`` steps of ``pixels``, and the arguments that assign work to programs."""
    segments, segment_rows = config.segments(rows, pixels)
    blocks = -(-strips // layout["units"])
    grid = (blocks * segments * layout["channel_blocks"],)
    return grid, {"strips": strips, "segments": segments, "segment_rows": segment_rows}


def forward_launch(
    input: Tensor,
    bias: Tensor | None,
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
    save: bool,
    output: Tensor,
    offsets: Tensor,
) -> Launch:
    """The launch that computes ``output`` and ``offsets`` (empty without ``save``)."""
    source, target = _maps(input), _maps(output)
    count, channels, out_rows, out_columns = target.shape
    norm, pool = normalization or config.NO_NORMALIZATION, pooling or config.NO_POOLING
    unrolled = pool.kernel_size[0] * pool.kernel_size[1] <= config.UNROLLED
    overlap = pool.kernel_size[0] - pool.stride[0]
    inside = not any(pool.padding) and all(
        (target.shape[axis] - 1) * pool.stride[axis - 2] + pool.dilation[axis - 2] * (pool.kernel_size[axis - 2] - 1)
        < source.shape[axis]
        for axis in (2, 3)
    )
    # (k + alpha * sum) ** -beta is (k / alpha + sum) ** -beta times a constant, which can wait until after the pooling.
    alpha, beta, k = norm.alpha / norm.size, norm.beta, norm.k
    fold = (
        normalization is not None
        and pooling is not None
        and alpha > 0
        and 1 / config.FOLDED <= k / alpha <= config.FOLDED
        and 0 < beta <= 1
        and 1 / config.FOLDED_POWER <= alpha**beta <= config.FOLDED_POWER
    )
    # Nonnegative values have the same order as their squares, whose upper bound is known.
    squared = fold and relu and beta == 0.75
    scale = 2.0 ** math.floor(math.log2(config.SQUARE * min(1.0, math.sqrt(k / alpha)))) if squared else 1.0
    strides, pixel_stride = config.strides(source)
    out_strides, out_pixel_stride = config.strides(target)
    strips = count * out_columns
    vector = config.vector(channels, normalization, source, target)
    layout = config.layout(strips, channels, vector, normalization, source.stride(1))
    grid, work = _work(strips, out_rows, pool.stride[0] * pool.stride[1], layout)
    return Launch(
        forward_kernel,
        grid,
        {
            "input": source,
            "bias": source if bias is None else bias.contiguous(),
            "output": target,
            "offsets": offsets,
            **work,
            "sizes": Sizes(source.shape[2], source.shape[3], out_rows, out_columns, channels, channels // norm.groups),
            "strides": strides,
            "out_strides": out_strides,
            "alpha": alpha,
            "factor": alpha**-beta / math.sqrt(scale) if fold else 1.0,
            "beta": beta,
            "k": k / alpha if fold else k,
            "scale": scale,
        },
        Config(
            **config.chain(normalization, pooling, bias, relu, channels, vector),
            **layout,
            words=config.words(vector, source),
            pixel_stride=pixel_stride,
            out_pixel_stride=out_pixel_stride,
            save=save and pooling is not None,
            # After ReLU and normalization nothing is negative, so the bits of floats have the order of the values.
            keys=bool(relu and normalization and pooling and unrolled)
            and (not save or source.dtype in (torch.float16, torch.bfloat16)),
            canonical=not (config.INTERPRETED or config.AMD),
            inside=inside,
            carried=overlap if unrolled and pool.dilation[0] == 1 and 0 < overlap <= 2 else 0,
            unrolled=unrolled,
            fold=fold,
            squared=squared,
        ),
    )


def backward_launch(
    output_gradient: Tensor,
    input: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    offsets: Tensor | None,
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
    gradient: Tensor,
    bias_wanted: bool,
) -> tuple[Launch, Tensor]:
    """The launch that computes ``gradient``, and the tensor of each program's sums (empty if not wanted)."""
    format = reference.memory_format(gradient)
    target = _maps(gradient)
    count, channels, rows, columns = target.shape
    # One set of strides for all tensors of the output's shape.
    above = [_maps(output_gradient)] + [_maps(tensor) for tensor in (offsets, output) if tensor is not None]
    if any(config.strides(tensor) != config.strides(above[0]) for tensor in above):
        above = [tensor.contiguous(memory_format=format) for tensor in above]
    source = target if input is None else _maps(input)
    strides, pixel_stride = config.strides(source)
    gradient_strides, gradient_pixel_stride = config.strides(target)
    out_strides, out_pixel_stride = config.strides(above[0])
    norm, pool = normalization or config.NO_NORMALIZATION, pooling or config.NO_POOLING
    over = [-(-(pool.dilation[axis] * (pool.kernel_size[axis] - 1) + 1) // pool.stride[axis]) for axis in (0, 1)]
    tiled = over[0] * over[1] <= config.UNROLLED and pool.stride[0] * pool.stride[1] <= config.TILE
    tile = pool.stride if tiled else (1, 1)
    tile_rows, tile_columns = (-(-(target.shape[2 + axis] + pool.padding[axis]) // tile[axis]) for axis in (0, 1))
    strips = count * tile_columns
    vector = config.vector(channels, normalization, source, target, *above)
    layout = config.layout(strips, channels, vector, normalization, target.stride(1))
    grid, work = _work(strips, tile_rows, tile[0] * tile[1], layout)
    programs = grid[0] // layout["channel_blocks"]
    sums = gradient.new_empty((channels, programs) if bias_wanted else (0,), dtype=torch.float32)
    launch = Launch(
        backward_kernel,
        grid,
        {
            "output_gradient": above[0],
            "input": source,
            "bias": source if bias is None else bias.contiguous(),
            "output": above[0] if output is None else above[-1],
            "offsets": above[0] if offsets is None else above[1],
            "gradient": target,
            "sums": sums,
            **work,
            "tile_columns": tile_columns,
            "tile_rows": tile_rows,
            "sizes": Sizes(rows, columns, above[0].shape[2], above[0].shape[3], channels, channels // norm.groups),
            "strides": strides,
            "gradient_strides": gradient_strides,
            "out_strides": out_strides,
            "alpha": norm.alpha / norm.size,
            "factor": 2 * norm.alpha * norm.beta / norm.size,
            "beta": norm.beta,
            "k": norm.k,
        },
        Config(
            **config.chain(normalization, pooling, bias, relu, channels, vector),
            # Without a positive k, idle lanes hold no zeros after the normalization.
            **{**layout, "spare": layout["spare"] and norm.k > 0},
            words=config.words(vector, source, *(tensor for tensor in above if tensor.dtype == source.dtype)),
            pixel_stride=pixel_stride,
            out_pixel_stride=out_pixel_stride,
            tile_rows=tile[0],
            tile_columns=tile[1],
            over_rows=over[0],
            over_columns=over[1],
            tiled=tiled,
            masked=output is not None,
            sum=bias_wanted,
            positive=norm.k > 0,
            offset_words=0 if offsets is None else config.words(vector, above[1]),
            gradient_pixel_stride=gradient_pixel_stride,
        ),
    )
    return launch, sums
