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
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .arguments import Normalization, Pooling
from .dispatch import INTERPRETED
from .flops import backward_flops, forward_flops
from .triton_backward import backward_kernel
from .triton_forward import forward_kernel

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
REGISTERS = {forward_kernel: 72, backward_kernel: 96}
#: Elements of a window, and windows over a pixel, that are written out; more are walked by a loop.
UNROLLED = 9
#: Up to these, or their inverse, the ratio of ``k`` to ``alpha`` and the power of ``alpha`` that is taken out leave the
#: smallest activations that are right at all (1e-30) above the smallest normal float32.
FOLDED, FOLDED_POWER = 1e8, 1e18
#: What a part of a scaled square is at most: float32 holds it, and squares of what is as small as 1e-30 as well.
SQUARE = 1e37


class Launch(NamedTuple):
    """A kernel, its grid, and its arguments by name; those in ``constants`` it is compiled for."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Tensor | int | float]
    constants: dict[str, int]

    def options(self, capability: int | None) -> dict[str, Any]:
        """Triton's options for NVIDIA GPUs of a compute capability (the number before the dot), or for others."""
        constants = self.constants
        if self.kernel is forward_kernel:
            few = constants["KEYS"] and constants["INSIDE"] and constants["CARRIED"] <= 1
        else:
            few = (
                constants["NORMALIZE"]
                and constants["TILED"]
                and constants["OVER_ROWS"] * constants["OVER_COLUMNS"] <= 4
            )
        if capability in (8, 9) and constants["WORDS"] == VECTOR // 2 and few:
            return {**OPTIONS, "maxnreg": REGISTERS[self.kernel]}
        return dict(OPTIONS)

    def run(self, device: torch.device) -> None:
        """Launch on ``device``'s current stream."""
        gpu = device.type == "cuda"
        capability = torch.cuda.get_device_capability(device)[0] if gpu and not AMD else None
        with torch.cuda.device(device) if gpu else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options(capability))


def _strides(tensor: Tensor, prefix: str = "") -> dict[str, int]:
    """Elements between images, rows, pixels of a row, and channels of ``[N, C, H, W]``, by the kernels' names."""
    axes = {"image": 0, "row": 2, "pixel": 3, "channel": 1}
    # The stride of a dimension of one element may be anything.
    return {
        f"{prefix}{name}_stride": tensor.stride(axis) if tensor.shape[axis] > 1 else 0 for name, axis in axes.items()
    }


def _maps(tensor: Tensor) -> Tensor:
    """``[N, C, ...]`` as ``[N, C, H, W]``: what has other than two dimensions behind the channels becomes one row."""
    return tensor if tensor.dim() == 4 else tensor.flatten(2).unsqueeze(2)


#: What the kernels are told where a part is missing.
_NOTHING = Normalization(1, 0.0, 0.0, 1.0, 1)
_EACH = Pooling((1, 1), (1, 1), (0, 0), (1, 1), False)


def _vector(channels: int, normalization: Normalization | None, *tensors: Tensor) -> int:
    """Channels that a lane takes at once."""
    group = channels // normalization.groups if normalization else VECTOR
    fits = channels % VECTOR == 0 and group % VECTOR == 0 and all(tensor.stride(1) == 1 for tensor in tensors)
    if normalization:
        # A window reaches no further than the neighbouring lane, and a group of channels lies in one program.
        fits = fits and normalization.behind <= VECTOR and group <= VECTOR * LANES
    return VECTOR if fits else 1


def _lanes(strips: int, channels: int, vector: int, normalization: Normalization | None, channel_stride: int) -> int:
    """Lanes along the channels: neighbouring ones read what lies next to each other."""
    if vector == 1:
        return min(channels, LANES if channel_stride == 1 else max(1, LANES // strips))
    vectors = channels // vector
    if normalization:
        return vectors // normalization.groups
    divisors = [lanes for lanes in range(1, LANES + 1) if vectors % lanes == 0]
    return max(divisors, key=lambda lanes: (LANES // lanes * lanes, lanes))


def _words(vector: int, *tensors: Tensor) -> int:
    """Words of 32 bits that hold a vector of channels of types narrower than float16; 0 where they are not aligned."""
    size = tensors[0].element_size() * VECTOR
    aligned = all(
        tensor.data_ptr() % size == 0
        and all(stride % VECTOR == 0 for name, stride in _strides(tensor).items() if name != "channel_stride")
        for tensor in tensors
    )
    narrow = tensors[0].dtype in (torch.bfloat16, torch.uint8)
    return size // 4 if vector == VECTOR and narrow and aligned else 0


def _segments(rows: int, pixels: int) -> tuple[int, int]:
    """Segments that an image of so many rows is cut into, and the rows of each; ``pixels`` are those of a step."""
    each = -(-rows // max(1, round(rows * min(pixels, TILE) / (SEGMENT_ROWS * TILE))))
    return -(-rows // each), each


def _parts(
    size: int, alpha: float, beta: float, k: float, groups: int, pooling: Sequence[int]
) -> tuple[Normalization | None, Pooling | None]:
    """The parts of the chain that an operator's arguments stand for."""
    normalization = Normalization(size, alpha, beta, k, groups) if size else None
    if not pooling:
        return normalization, None
    pairs = [(pooling[index], pooling[index + 1]) for index in range(0, 8, 2)]
    return normalization, Pooling(pairs[0], pairs[1], pairs[2], pairs[3], bool(pooling[8]))


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor in the memory format of ``like``."""
    if len(shape) != 4:
        return torch.empty(shape, dtype=dtype, device=like.device)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=reference.memory_format(like))


def _outputs(input: Tensor, pooling: Pooling | None, save: bool) -> tuple[Tensor, Tensor]:
    """Where the forward pass writes: output and offsets."""
    if pooling is None:
        return _empty(input, input.shape, input.dtype), input.new_empty(0, dtype=torch.uint8)
    windows = [pooling.output_size(input.shape[2 + axis], axis) for axis in (0, 1)]
    shape = (*input.shape[:2], *windows)
    offsets = _empty(input, shape, pooling.offset_dtype) if save else input.new_empty(0, dtype=pooling.offset_dtype)
    return _empty(input, shape, input.dtype), offsets


def _common(
    normalization: Normalization | None, pooling: Pooling | None, bias: Tensor | None, relu: bool, channels: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Arguments and constants of both kernels."""
    norm, pool = normalization or _NOTHING, pooling or _EACH
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
    pool = pooling or _EACH
    vector = _vector(channels, normalization, source, target)
    unrolled = pool.kernel_size[0] * pool.kernel_size[1] <= UNROLLED
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
        and 1 / FOLDED <= k / alpha <= FOLDED
        and 0 < normalization.beta <= 1
        and 1 / FOLDED_POWER <= alpha**normalization.beta <= FOLDED_POWER
    )
    # Of what is not negative, squares can be compared; how large they are at most is known.
    squared = fold and relu and arguments["beta"] == 0.75
    scale = 2.0 ** math.floor(math.log2(SQUARE * min(1.0, math.sqrt(k / alpha)))) if squared else 1.0
    if fold:
        arguments["k"] = k / alpha
    strides = {**_strides(source), **_strides(target, "out_")}
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
            "group": channels // (normalization or _NOTHING).groups,
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
            "CANONICAL": not (INTERPRETED or AMD),
            "INSIDE": inside,
            "WORDS": _words(vector, source),
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
    lanes = _lanes(strips, channels, vector, normalization, channel_stride)
    units = LANES // lanes
    blocks, channel_blocks = -(-strips // units), -(-channels // (lanes * vector))
    segments, each = _segments(rows, pixels)
    constants.update({"CHANNEL_BLOCKS": channel_blocks, "SPARE": lanes * units < LANES})
    constants.update({"L": LANES, "G": lanes, "UNITS": units, "V": vector})
    return (blocks * segments * channel_blocks,), {
        "strips": strips,
        "segments": segments,
        "segment_rows": each,
    }


@torch.library.custom_op("alexnet_fused::stage_forward", mutates_args=())
def _forward_op(
    input: Tensor,
    bias: Tensor | None,
    relu: bool,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    pooling: Sequence[int],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """``size`` of 0 is no normalization; ``pooling`` is empty for none, else its nine numbers."""
    normalization, pool = _parts(size, alpha, beta, k, groups, pooling)
    output, offsets = _outputs(input, pool, save)
    forward_launch(input, bias, relu, normalization, pool, save, output, offsets).run(input.device)
    return output, offsets


@_forward_op.register_fake
def _(
    input: Tensor,
    bias: Tensor | None,
    relu: bool,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    pooling: Sequence[int],
    save: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(input, _parts(size, alpha, beta, k, groups, pooling)[1], save)


@register_flop_formula(torch.ops.alexnet_fused.stage_forward)
def _(
    input: Sequence[int],
    bias: Sequence[int] | None,
    relu: bool,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    pooling: Sequence[int],
    save: bool,
    *,
    out_shape: Any,
) -> int:
    parts = _parts(size, alpha, beta, k, groups, pooling)
    return forward_flops(math.prod(input), math.prod(out_shape[0]), bias is not None, relu, *parts)


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
    if any(_strides(tensor) != _strides(above[0]) for tensor in above):
        above = [tensor.contiguous(memory_format=format) for tensor in above]
    source = target if input is None else _maps(input)
    vector = _vector(channels, normalization, source, target, *above)
    strides = {**_strides(source), **_strides(target, "gradient_"), **_strides(above[0], "out_")}
    arguments, constants = _common(normalization, pooling, bias, relu, channels)
    pool, norm = pooling or _EACH, normalization or _NOTHING
    over = [-(-(pool.dilation[axis] * (pool.kernel_size[axis] - 1) + 1) // pool.stride[axis]) for axis in (0, 1)]
    tiled = over[0] * over[1] <= UNROLLED and pool.stride[0] * pool.stride[1] <= TILE
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
            "WORDS": _words(vector, source, *(tensor for tensor in above if tensor.dtype == source.dtype)),
            "OFFSET_WORDS": 0 if offsets is None else _words(vector, above[1]),
            "OVER_ROWS": over[0],
            "OVER_COLUMNS": over[1],
        },
    )
    return launch, sums


def _gradient(
    output_gradient: Tensor, size: Sequence[int], pooling: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """An empty gradient: of the output's shape, but for the rows and columns that pooling took away."""
    shape = (*output_gradient.shape[:2], *size) if pooling else output_gradient.shape
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=output_gradient.device, memory_format=format)


@torch.library.custom_op("alexnet_fused::stage_backward", mutates_args=())
def _backward_op(
    output_gradient: Tensor,
    input: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    offsets: Tensor | None,
    size_of_input: Sequence[int],
    relu: bool,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    pooling: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    bias_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient in ``dtype``, and in float32 its sum over everything but the channels, empty if not wanted."""
    normalization, pool = _parts(size, alpha, beta, k, groups, pooling)
    gradient = _gradient(output_gradient, size_of_input, pooling, dtype, channels_last)
    launch, sums = backward_launch(
        output_gradient, input, bias, output, offsets, relu, normalization, pool, gradient, bias_wanted
    )
    launch.run(gradient.device)
    return gradient, sums.sum(1) if bias_wanted else sums


@_backward_op.register_fake
def _(
    output_gradient: Tensor,
    input: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    offsets: Tensor | None,
    size_of_input: Sequence[int],
    relu: bool,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    pooling: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    bias_wanted: bool,
) -> tuple[Tensor, Tensor]:
    gradient = _gradient(output_gradient, size_of_input, pooling, dtype, channels_last)
    return gradient, gradient.new_empty(gradient.shape[1] if bias_wanted else 0, dtype=torch.float32)


@register_flop_formula(torch.ops.alexnet_fused.stage_backward)
def _(
    output_gradient: Sequence[int],
    input: Sequence[int] | None,
    bias: Sequence[int] | None,
    output: Sequence[int] | None,
    offsets: Sequence[int] | None,
    size_of_input: Sequence[int],
    relu: bool,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    pooling: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    bias_wanted: bool,
    *,
    out_shape: Any,
) -> int:
    parts = _parts(size, alpha, beta, k, groups, pooling)
    elements, windows = math.prod(out_shape[0]), math.prod(output_gradient)
    return backward_flops(elements, windows, bias is not None, relu, *parts, bias_wanted)


def _numbers(normalization: Normalization | None, pooling: Pooling | None) -> tuple[list[float], list[int]]:
    """The parts of the chain as an operator's arguments."""
    pairs = [] if pooling is None else [number for pair in pooling[:4] for number in pair] + [int(pooling.ceil_mode)]
    return list(normalization or (0, 0.0, 0.0, 0.0, 1)), pairs


def forward(
    input: Tensor,
    bias: Tensor | None,
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`kernels.reference.forward`."""
    norm, pool = _numbers(normalization, pooling)
    results: tuple[Tensor, Tensor] = _forward_op(input, bias, relu, *norm, pool, save)
    return results


def backward(
    output_gradient: Tensor,
    input: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    offsets: Tensor | None,
    size: tuple[int, int],
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
    dtype: torch.dtype,
    format: torch.memory_format,
    bias_wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`kernels.reference.backward`."""
    norm, pool = _numbers(normalization, pooling)
    gradient, total = _backward_op(
        output_gradient, input, bias, output, offsets, list(size), relu, *norm, pool, dtype,
        format == torch.channels_last, bias_wanted,
    )  # fmt: skip
    return gradient, total if bias_wanted else None
