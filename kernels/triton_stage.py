"""The chain bias, ReLU, local response normalization, max pooling as two Triton kernels, forward and backward.

Bytes moved, for an input of ``n`` elements of ``b`` bytes and ``w`` pooling windows (times channels): forward reads
``n b`` and writes ``w b``, and ``w`` bytes of offsets where a gradient is wanted; backward reads ``n b + w b + w`` and
writes ``n b``. What the overlapping windows and the halos of the channel window read twice comes from the caches.

Backward asks for each input pixel which of the windows over it took it, so that nothing is
added atomically and every gradient has the same bits in every run, at any batch size. The bias's gradient is summed by
blocks of :data:`PIXELS` input pixels, and the blocks in their order.

float32, float16 and bfloat16; float64 runs :mod:`kernels.reference`, which is exact where a GPU's roots are not.
"""

import contextlib
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from . import reference
from .arguments import Normalization, Pooling
from .triton_kernels import backward_kernel, forward_kernel

#: Pixels of a block. The order in which the bias's gradient is summed depends on it: it is not tuned.
PIXELS = 16
#: Channels of a lane where memory format and sizes allow it.
VECTOR = 8
#: Lanes of a block along the channels.
CHANNEL_LANES = 16
#: The largest window of channels whose halo lies in the neighbouring vectors, backward, where it is needed twice.
LARGEST_SIZE = 9
WARPS = 4
#: Elements of a window that are written out; larger windows are walked by a loop.
UNROLLED = 9


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Elements between images, pixels and channels of ``[N, C, H, W]`` whose rows follow one another."""
    return tensor.stride(0), tensor.stride(3), tensor.stride(1)


def _readable(tensor: Tensor, format: torch.memory_format) -> Tensor:
    """``tensor``, or a copy in ``format`` where no single stride leads from each pixel to the next."""
    if tensor.shape[2] > 1 and tensor.stride(2) != tensor.shape[3] * tensor.stride(3):
        return tensor.contiguous(memory_format=format)
    return tensor


def _maps(tensor: Tensor) -> Tensor:
    """``[N, C, ...]`` as ``[N, C, H, W]``: what has other than two dimensions behind the channels becomes one row."""
    return tensor if tensor.dim() == 4 else tensor.flatten(2).unsqueeze(2)


def _chain(
    normalization: Normalization | None, pooling: Pooling | None, channels: int
) -> tuple[Normalization, Pooling, int]:
    """What the kernels are told where a part is missing, and the channels of a group."""
    nothing = Normalization(1, 0.0, 0.0, 1.0, 1)
    each = Pooling((1, 1), (1, 1), (0, 0), (1, 1), False)
    return normalization or nothing, pooling or each, channels // (normalization or nothing).groups


def _vector(channels: int, group: int, size: int, *tensors: Tensor) -> int:
    """Channels that a lane takes at once."""
    fits = channels % VECTOR == 0 and group % VECTOR == 0 and size <= LARGEST_SIZE
    return VECTOR if fits and all(tensor.stride(1) == 1 for tensor in tensors) else 1


def _grid(pixels: int, channels: int, vector: int) -> tuple[int, int, int]:
    """Programs along pixels and channels, and lanes of each along the channels."""
    lanes = min(CHANNEL_LANES, triton.next_power_of_2(-(-channels // vector)))
    return -(-pixels // PIXELS), -(-channels // (lanes * vector)), lanes


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _pooling(numbers: Sequence[int]) -> Pooling | None:
    if not numbers:
        return None
    pairs = [(numbers[index], numbers[index + 1]) for index in range(0, 8, 2)]
    return Pooling(pairs[0], pairs[1], pairs[2], pairs[3], bool(numbers[8]))


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
    wanted = _pooling(pooling)
    normalization, pool, group = _chain(
        Normalization(size, alpha, beta, k, groups) if size else None, wanted, input.shape[1]
    )
    output, offsets = _outputs(input, wanted, save)
    source, target = _readable(_maps(input), reference.memory_format(input)), _maps(output)
    count, channels, out_rows, out_columns = target.shape
    vector = _vector(channels, group, normalization.size, source, target)
    pixels = count * out_rows * out_columns
    blocks, channel_blocks, lanes = _grid(pixels, channels, vector)
    with _on(input.device):
        forward_kernel[(blocks, channel_blocks)](
            source, source if bias is None else bias.contiguous(), target, offsets,
            pixels, source.shape[2], source.shape[3], out_rows, out_columns, channels, group,
            *_strides(source), *_strides(target),
            normalization.alpha / normalization.size, normalization.beta, normalization.k,
            V=vector, BIAS=bias is not None, RELU=relu, BEHIND=normalization.behind, AHEAD=normalization.ahead,
            NORMALIZE=size > 0, THREE_QUARTERS=normalization.beta == 0.75, POOL=wanted is not None,
            SAVE=save and wanted is not None, **_constants(pool), UNROLLED=UNROLLED, PIXELS=PIXELS, LANES=lanes,
            num_warps=WARPS,
        )  # fmt: skip
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
    return _outputs(input, _pooling(pooling), save)


def _constants(pool: Pooling) -> dict[str, int]:
    """The geometry of the windows, which the kernels are compiled for."""
    names = ("KERNEL", "STRIDE", "PADDING", "DILATION")
    return {
        f"{name}_{axis}": pair[number]
        for name, pair in zip(names, pool[:4], strict=True)
        for number, axis in enumerate(("ROWS", "COLUMNS"))
    }


def _shape(output_gradient: Tensor, size: Sequence[int], pooling: Sequence[int]) -> tuple[int, ...]:
    return (*output_gradient.shape[:2], *size) if pooling else tuple(output_gradient.shape)


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
    normalization, pool, group = _chain(
        Normalization(size, alpha, beta, k, groups) if size else None, _pooling(pooling), output_gradient.shape[1]
    )
    format = torch.channels_last if channels_last else torch.contiguous_format
    gradient = torch.empty(
        _shape(output_gradient, size_of_input, pooling),
        dtype=dtype,
        device=output_gradient.device,
        memory_format=format,
    )
    target = _maps(gradient)
    count, channels, rows, columns = target.shape
    # One set of strides for what has the output's shape, one for what has the input's.
    above = [_maps(output_gradient)] + [_maps(tensor) for tensor in (offsets, output) if tensor is not None]
    above = [_readable(tensor, format) for tensor in above]
    if len({tensor.stride() for tensor in above}) > 1:
        above = [tensor.contiguous(memory_format=format) for tensor in above]
    source = target if input is None else _readable(_maps(input), format)
    if _strides(source)[1:] != _strides(target)[1:]:
        source = source.contiguous(memory_format=format)
    over = [-(-(pool.dilation[axis] * (pool.kernel_size[axis] - 1) + 1) // pool.stride[axis]) for axis in (0, 1)]
    vector = _vector(channels, group, normalization.size, source, target, *above)
    pixels = count * rows * columns
    blocks, channel_blocks, lanes = _grid(pixels, channels, vector)
    sums = gradient.new_empty((blocks, channels) if bias_wanted else (0,), dtype=torch.float32)
    has_offsets, has_output = offsets is not None, output is not None
    with _on(gradient.device):
        backward_kernel[(blocks, channel_blocks)](
            above[0], source, source if bias is None else bias.contiguous(),
            above[-1] if has_output else above[0], above[1] if has_offsets else above[0], target, sums,
            pixels, rows, columns, above[0].shape[2], above[0].shape[3], channels, group,
            *_strides(source), target.stride(0), *_strides(above[0]),
            normalization.alpha / normalization.size,
            2 * normalization.alpha * normalization.beta / normalization.size, normalization.beta, normalization.k,
            V=vector, BIAS=bias is not None, RELU=relu, BEHIND=normalization.behind, AHEAD=normalization.ahead,
            NORMALIZE=size > 0, THREE_QUARTERS=normalization.beta == 0.75, POOL=has_offsets, MASKED=has_output,
            SUM=bias_wanted, **_constants(pool), OVER_ROWS=over[0], OVER_COLUMNS=over[1], PIXELS=PIXELS, LANES=lanes,
            num_warps=WARPS,
        )  # fmt: skip
    return gradient, sums.sum(0) if bias_wanted else sums


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
    format = torch.channels_last if channels_last else torch.contiguous_format
    gradient = torch.empty(
        _shape(output_gradient, size_of_input, pooling),
        dtype=dtype,
        device=output_gradient.device,
        memory_format=format,
    )
    return gradient, gradient.new_empty(gradient.shape[1] if bias_wanted else 0, dtype=torch.float32)


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
