"""The chain bias, ReLU, local response normalization, max pooling as two Triton kernels, forward and backward.

Bytes moved, for an input of ``n`` elements of ``b`` bytes and ``w`` pooling windows (times channels): forward reads
``n b`` and writes ``w b``, and ``w`` bytes of offsets where a gradient is wanted; backward reads ``n b + w b + w`` and
writes ``n b``. What overlapping windows read twice comes from the caches.

A program is one warp that walks down the rows of a segment of an image. In channels_last memory a lane holds eight
channels, and what the channel window needs of others comes from the neighbouring lanes; in other memory, or with
channels in no multiples of eight, a lane holds one channel.

Forward keeps the maxima of the rows that neighbouring windows share. In half types behind a normalization the four
lowest bits of a value give way to the number of its element, so that one comparison finds both: of values that agree in
twenty bits, far finer than the half types' 8 or 11, the first is the largest. Everywhere else all of float32 is
compared. Where pooling follows, alpha is taken out of the power and multiplied in behind the maximum, and with a ReLU
and the paper's beta it is squares that are compared, ``(a r)^2 r`` with ``r = rsqrt(s)``: the root is of the largest.

Backward asks for each input pixel which of the windows over it took it, so that nothing is added atomically and every
gradient has the same bits in every run, at any batch size. The bias's gradient is summed over the pixels of each
program, and the programs' sums in their order.

What a step of the walk reads is loaded during the step before it, into shared memory: Triton's pipelining of a loop of
two stages, where the elements are four bytes or come in vectors; for inference at that step's end. Registers decide how
many warps there are to wait for memory and for one another: backward each pixel is computed by itself, and addresses
are not kept but moved on.

float32, float16 and bfloat16; float64 runs :mod:`kernels.reference`, which is exact where a GPU's roots are not, and so
do a beta of 0 and a negative alpha or k.
"""

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..arguments import Normalization, Pooling
from . import config
from .backward import backward_kernel
from .forward import forward_kernel


class Launch(NamedTuple):
    """A kernel, its grid, and its arguments by name; those in ``constants`` it is compiled for."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Tensor | int | float]
    constants: dict[str, int]

    def options(self, capability: int | None) -> dict[str, Any]:
        """Triton's options for NVIDIA GPUs of a compute capability (the number before the dot), or for others."""
        constants, kind = self.constants, "forward" if self.kernel is forward_kernel else "backward"
        if self.kernel is forward_kernel:
            few = constants["KEYS"] and constants["INSIDE"] and constants["CARRIED"] <= 1
        else:
            few = (
                constants["NORMALIZE"]
                and constants["TILED"]
                and constants["OVER_ROWS"] * constants["OVER_COLUMNS"] <= 4
            )
        if capability in (8, 9) and constants["WORDS"] == config.VECTOR // 2 and few:
            return {
                **config.OPTIONS,
                "maxnreg": config.REGISTERS["forward" if self.kernel is forward_kernel else "backward"],
            }
        return dict(config.OPTIONS)

    def run(self, device: torch.device) -> None:
        """Launch on ``device``'s current stream."""
        gpu = device.type == "cuda"
        capability = torch.cuda.get_device_capability(device)[0] if gpu and not config.AMD else None
        with torch.cuda.device(device) if gpu else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options(capability))


def _maps(tensor: Tensor) -> Tensor:
    """``[N, C, ...]`` as ``[N, C, H, W]``: what has other than two dimensions behind the channels becomes one row."""
    return tensor if tensor.dim() == 4 else tensor.flatten(2).unsqueeze(2)


def _common(
    normalization: Normalization | None, pooling: Pooling | None, bias: Tensor | None, relu: bool, channels: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Arguments and constants of both kernels."""
    norm, pool = normalization or config.NO_NORMALIZATION, pooling or config.NO_POOLING
    # Further away there are no channels of the group.
    furthest = channels // norm.groups - 1
    arguments = {"alpha": norm.alpha / norm.size, "beta": norm.beta, "k": norm.k}
    constants: dict[str, int] = {
        "BIAS": bias is not None,
        "RELU": relu,
        "BEHIND": min(norm.behind, furthest),
        "AHEAD": min(norm.ahead, furthest),
        "NORMALIZE": normalization is not None,
        "THREE_QUARTERS": norm.beta == 0.75,
    }
    for name, pair in zip(("KERNEL", "STRIDE", "PADDING", "DILATION"), pool[:4], strict=True):
        constants[f"{name}_ROWS"], constants[f"{name}_COLUMNS"] = pair
    return arguments, constants


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
    pool = pooling or config.NO_POOLING
    vector = config.vector(channels, normalization, source, target)
    unrolled = pool.kernel_size[0] * pool.kernel_size[1] <= config.UNROLLED
    overlap = pool.kernel_size[0] - pool.stride[0]
    inside = not any(pool.padding) and all(
        (target.shape[axis] - 1) * pool.stride[axis - 2] + pool.dilation[axis - 2] * (pool.kernel_size[axis - 2] - 1)
        < source.shape[axis]
        for axis in (2, 3)
    )
    arguments, constants = _common(normalization, pooling, bias, relu, channels)
    # (k + alpha * sum) ** -beta is (k / alpha + sum) ** -beta times a constant, which can wait until after the pooling.
    alpha, k = arguments["alpha"], arguments["k"]
    fold = (
        normalization is not None
        and pooling is not None
        and alpha > 0
        and 1 / config.FOLDED <= k / alpha <= config.FOLDED
        and 0 < normalization.beta <= 1
        and 1 / config.FOLDED_POWER <= alpha**normalization.beta <= config.FOLDED_POWER
    )
    # Of what is not negative, squares can be compared; how large they are at most is known.
    squared = fold and relu and arguments["beta"] == 0.75
    scale = 2.0 ** math.floor(math.log2(config.SQUARE * min(1.0, math.sqrt(k / alpha)))) if squared else 1.0
    if fold:
        arguments["k"] = k / alpha
    strides = {**config.strides(source), **config.strides(target, "out_")}
    # Compiled for, so that neighbouring pixels need no addresses of their own.
    constants.update({name: strides.pop(name) for name in ("pixel_stride", "out_pixel_stride")})
    strips, step = count * out_columns, pool.stride[0] * pool.stride[1]
    grid, more = _grid(strips, out_rows, step, channels, vector, normalization, source.stride(1), constants)
    return Launch(
        forward_kernel,
        grid,
        {
            "input": source,
            "bias": source if bias is None else bias.contiguous(),
            "output": target,
            "offsets": offsets,
            **more,
            "rows": source.shape[2],
            "columns": source.shape[3],
            "out_rows": out_rows,
            "out_columns": out_columns,
            "channels": channels,
            "group": channels // (normalization or config.NO_NORMALIZATION).groups,
            **strides,
            "factor": alpha ** -arguments["beta"] / math.sqrt(scale) if fold else 1.0,
            "scale": scale,
            **arguments,
        },
        {
            **constants,
            "POOL": pooling is not None,
            "SAVE": save and pooling is not None,
            # Behind ReLU and normalization nothing is negative, and the bits of numbers are in their order.
            "KEYS": bool(relu and normalization and pooling and unrolled)
            and (not save or source.dtype in (torch.float16, torch.bfloat16)),
            # NVIDIA's arithmetic has one NaN, which is positive.
            "CANONICAL": not (config.INTERPRETED or config.AMD),
            "INSIDE": inside,
            "WORDS": config.words(vector, source),
            # Rows that a window has in common with the one below it, whose maxima are kept.
            "CARRIED": overlap if unrolled and pool.dilation[0] == 1 and 0 < overlap <= 2 else 0,
            "UNROLLED": unrolled,
            "FOLD": fold,
            "SQUARED": squared,
        },
    )


def _grid(
    strips: int,
    rows: int,
    pixels: int,
    channels: int,
    vector: int,
    normalization: Normalization | None,
    channel_stride: int,
    constants: dict[str, int],
) -> tuple[tuple[int], dict[str, Tensor | int | float]]:
    """The grid, and the arguments that lead from a program to its strips; their constants go into ``constants``."""
    lanes = config.lanes(strips, channels, vector, normalization, channel_stride)
    units = config.LANES // lanes
    blocks, channel_blocks = -(-strips // units), -(-channels // (lanes * vector))
    segments, each = config.segments(rows, pixels)
    constants.update({"CHANNEL_BLOCKS": channel_blocks, "SPARE": lanes * units < config.LANES})
    constants.update({"L": config.LANES, "G": lanes, "UNITS": units, "V": vector})
    return (blocks * segments * channel_blocks,), {
        "strips": strips,
        "segments": segments,
        "segment_rows": each,
    }


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
    """The launch that computes ``gradient``, and where it leaves each block's sums (empty if not wanted)."""
    format = reference.memory_format(gradient)
    target = _maps(gradient)
    count, channels, rows, columns = target.shape
    # One set of strides for what has the output's shape.
    above = [_maps(output_gradient)] + [_maps(tensor) for tensor in (offsets, output) if tensor is not None]
    if any(config.strides(tensor) != config.strides(above[0]) for tensor in above):
        above = [tensor.contiguous(memory_format=format) for tensor in above]
    source = target if input is None else _maps(input)
    vector = config.vector(channels, normalization, source, target, *above)
    strides = {**config.strides(source), **config.strides(target, "gradient_"), **config.strides(above[0], "out_")}
    arguments, constants = _common(normalization, pooling, bias, relu, channels)
    pool, norm = pooling or config.NO_POOLING, normalization or config.NO_NORMALIZATION
    over = [-(-(pool.dilation[axis] * (pool.kernel_size[axis] - 1) + 1) // pool.stride[axis]) for axis in (0, 1)]
    tiled = over[0] * over[1] <= config.UNROLLED and pool.stride[0] * pool.stride[1] <= config.TILE
    tile = pool.stride if tiled else (1, 1)
    tile_rows, tile_columns = (-(-(target.shape[2 + axis] + pool.padding[axis]) // tile[axis]) for axis in (0, 1))
    constants.update({f"{name}pixel_stride": strides.pop(f"{name}pixel_stride") for name in ("", "gradient_", "out_")})
    strips, step = count * tile_columns, tile[0] * tile[1]
    grid, more = _grid(strips, tile_rows, step, channels, vector, normalization, target.stride(1), constants)
    programs = grid[0] // constants["CHANNEL_BLOCKS"]
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
            **more,
            "tile_rows": tile_rows,
            "tile_columns": tile_columns,
            "rows": rows,
            "columns": columns,
            "out_rows": above[0].shape[2],
            "out_columns": above[0].shape[3],
            "channels": channels,
            "group": channels // norm.groups,
            **strides,
            "factor": 2 * norm.alpha * norm.beta / norm.size,
            **arguments,
        },
        {
            **constants,
            "TILE_ROWS": tile[0],
            "TILE_COLUMNS": tile[1],
            "TILED": tiled,
            "POOL": offsets is not None,
            "MASKED": output is not None,
            "SUM": bias_wanted,
            # Otherwise what lies outside the image, and in lanes without work, is not zero behind the normalization.
            "POSITIVE": norm.k > 0,
            "SPARE": constants["SPARE"] and norm.k > 0,
            "WORDS": config.words(vector, source, *(tensor for tensor in above if tensor.dtype == source.dtype)),
            "OFFSET_WORDS": 0 if offsets is None else config.words(vector, above[1]),
            "OVER_ROWS": over[0],
            "OVER_COLUMNS": over[1],
        },
    )
    return launch, sums
