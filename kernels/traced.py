"""The chain in forms that Inductor compiles to fast loops: what ``torch.compile`` traces instead of the plain formula.

Inductor fuses elementwise operators and vectorizes reads at fixed strides. So channels are made adjacent in memory,
windows are unrolled, and the gradient of pooling is gathered, not scattered. Values, gradients and arguments are those
of :mod:`kernels.reference`; reports/LOG.md has the gain of each form.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .arguments import Normalization, Pooling
from .reference import by_group, cast, channels_first, compute_dtype, memory_format

# MKL 2024.2, which PyTorch's x86 packages contain, selects its square root on the first call. If several threads make
# that call at once, one of them may use the least precise version: silently off by 3e-4 (pytorch/pytorch#188792). So
# make the first call from one thread.
for _dtype in (torch.float32, torch.float64):
    torch.ones(1, dtype=_dtype, device="cpu").sqrt()

#: Windows with more elements than this, or elements in more windows than this, use PyTorch's operators.
_UNROLLED = 25

#: float32 holds every integer up to this; larger offsets in a window use PyTorch's operators.
_EXACT = 2**24


def _fixed(size: int) -> int:
    """``size`` as a constant: compiled code may handle any batch size, but only one image size.

    Inductor fails on loops over windows if their number depends on a dynamic size (ValueRangeError). Calling ``range``
    makes Dynamo specialize on its argument.
    """
    return len(range(size))


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


def _written(values: Tensor) -> Tensor:
    """``values`` in a contiguous buffer; they must have been computed here, and not be a view of an argument.

    Otherwise Inductor would recompute them at every read, with a mask for each shifted read. A strided view makes it
    write them to memory first and then vectorize the reads.
    """
    values = values.contiguous()
    written: Tensor = values.as_strided(values.shape, _contiguous_strides(values.shape), 0)
    return written


def _channels_last(tensor: Tensor, groups: int) -> Tensor:
    """``[N, C, ...]`` as ``[N, ..., G, C / G]`` with adjacent channels."""
    moved = tensor.movedim(1, -1)
    if not moved.is_contiguous():
        moved = _written(moved.clone(memory_format=torch.contiguous_format))
    return by_group(moved, groups)


def _activation(input: Tensor, bias: Tensor | None, relu: bool, groups: int) -> Tensor:
    a = cast(_channels_last(input, groups), compute_dtype(input.dtype))
    if bias is not None:
        a = a + by_group(cast(bias, a.dtype), groups)
    return F.relu(a) if relu else a


def _window_sum(values: Tensor, before: int, after: int) -> Tensor:
    """See :func:`kernels.reference.window_sum`."""
    channels = values.shape[-1]
    before, after = min(before, channels - 1), min(after, channels - 1)
    # Inductor writes each part of a concatenation into its place; for F.pad it computes a mask per element.
    left, right = (values.new_zeros(*values.shape[:-1], width) for width in (before, after))
    padded = torch.cat([left, values, right], -1).contiguous()
    strides = _contiguous_strides(padded.shape)
    # Views by strides: see _written.
    total = padded.as_strided(values.shape, strides, 0)
    for start in range(1, before + after + 1):
        total = total + padded.as_strided(values.shape, strides, start)
    return total


def _scale(a: Tensor, normalization: Normalization, square: Callable[[Tensor], Tensor] = lambda a: a * a) -> Tensor:
    """See :func:`kernels.reference.scale`."""
    total = _window_sum(square(a), normalization.before, normalization.after)
    return total * (normalization.alpha / normalization.size) + normalization.k


def _negative_power(base: Tensor, beta: float) -> Tensor:
    """``base ** -beta``; the paper's 0.75 costs one reciprocal square root and one square root."""
    if beta == 0.75:
        root = base.rsqrt()
        return root * root.sqrt()
    return torch.pow(base, -beta)


def _normalize_backward(db: Tensor, a: Tensor, normalization: Normalization) -> Tensor:
    """See :func:`kernels.reference.normalize_backward`."""
    size, alpha, beta, _, _ = normalization
    # Square with a different operator than forward does; otherwise torch.compile recognizes the sums and saves them.
    s = _scale(a, normalization, torch.square)
    direct = db * _negative_power(s, beta)
    total = _window_sum(direct * a / s, normalization.after, normalization.before)
    return direct - (2 * alpha * beta / size) * a * total


def _pool(values: Tensor, pooling: Pooling, save: bool) -> tuple[Tensor, Tensor]:
    """See :func:`kernels.reference.pool`; goes through a window element by element."""
    if pooling.kernel_size[0] * pooling.kernel_size[1] > _UNROLLED:
        return reference.pool(values, pooling, save)
    sizes = [_fixed(size) for size in values.shape[1:3]]
    windows = [pooling.output_size(size, axis) for axis, size in enumerate(sizes)]
    border = [0, 0, 0, 0]
    for axis in (1, 0):
        kernel, stride, padding, dilation = (pair[axis] for pair in pooling[:4])
        needed = (windows[axis] - 1) * stride + (kernel - 1) * dilation + 1
        border += [padding, max(0, needed - padding - sizes[axis])]
    padded = _written(F.pad(values, border, value=float("-inf"))) if any(border) else values
    best = torch.full_like(padded[:, : windows[0], : windows[1]], float("-inf"))
    # In a window of only minus infinity, the maximum is the first element that is not padding.
    first = [
        (pooling.dilation[axis] - 1 - reference.window_starts(pooling, axis, windows[axis], values.device)).clamp_min(0)
        // pooling.dilation[axis]
        for axis in (0, 1)
    ]
    row, column = reference.rows_and_columns(*first)
    index = (row * pooling.kernel_size[1] + column).to(torch.int32).expand(best.shape)
    for element_row in range(pooling.kernel_size[0]):
        for element_column in range(pooling.kernel_size[1]):
            begin = (element_row * pooling.dilation[0], element_column * pooling.dilation[1])
            rows, columns = [
                slice(begin[axis], begin[axis] + (windows[axis] - 1) * pooling.stride[axis] + 1, pooling.stride[axis])
                for axis in (0, 1)
            ]
            value = padded[:, rows, columns]
            larger = (value > best) | (value != value)
            best = torch.where(larger, value, best)
            index = torch.where(larger, element_row * pooling.kernel_size[1] + element_column, index)
    return best, index.to(pooling.offset_dtype) if save else values.new_empty(0, dtype=pooling.offset_dtype)


def _pool_backward(output_gradient: Tensor, offsets: Tensor, size: tuple[int, int], pooling: Pooling) -> Tensor:
    """See :func:`kernels.reference.pool_backward`; finds, for each input element, the windows that selected it."""
    over = [-(-pooling.extent(axis) // pooling.stride[axis]) for axis in (0, 1)]
    if over[0] * over[1] > _UNROLLED or pooling.kernel_size[0] * pooling.kernel_size[1] > _EXACT:
        return reference.pool_backward(output_gradient, offsets, size, pooling)
    # Per axis, for each window that may contain an element: the window, and the element's part of the index that
    # the offset must equal. If the window does not contain it, this part is so far below zero that no sum is a valid
    # offset.
    # Conditions that are always true are left out, because Inductor splits longer expressions into several loops.
    nowhere = -_EXACT
    found = []
    for axis in (0, 1):
        kernel, stride, padding, dilation = (pair[axis] for pair in pooling[:4])
        windows = offsets.shape[1 + axis]
        place = torch.arange(size[axis], device=offsets.device) + padding
        candidates = []
        # In the order of the windows, like PyTorch.
        for distance in reversed(range(over[axis])):
            window = place // stride - distance
            inside = place - window * stride
            element = (inside if dilation == 1 else inside // dilation) * (1 if axis else pooling.kernel_size[1])
            if stride - 1 + distance * stride >= dilation * (kernel - 1) + 1:
                element = torch.where(inside < dilation * kernel, element, nowhere)
            if dilation > 1:
                element = torch.where(inside % dilation == 0, element, nowhere)
            if padding // stride - distance < 0:
                element = torch.where(window >= 0, element, nowhere)
                window = window.clamp_min(0)
            if (size[axis] - 1 + padding) // stride - distance > windows - 1:
                element = torch.where(window < windows, element, nowhere)
                window = window.clamp_max(windows - 1)
            candidates.append((window, element.to(output_gradient.dtype)))
        found.append(candidates)
    total = None
    # As floats: Inductor loads vectors of integers by way of the stack, where the processor waits for each.
    offsets = _written(offsets.to(output_gradient.dtype))
    for row, row_index in found[0]:
        for column, column_index in found[1]:
            indices = reference.rows_and_columns(row_index, column_index)
            taken = offsets[:, row[:, None], column] == indices[0] + indices[1]
            part = torch.where(taken, output_gradient[:, row[:, None], column], 0)
            total = part if total is None else total + part
    assert total is not None
    return total


def forward(
    input: Tensor,
    bias: Tensor | None,
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`kernels.reference.forward`."""
    values = _activation(input, bias, relu, reference.groups_of(normalization))
    if normalization is not None:
        values = values * _negative_power(_scale(values, normalization), normalization.beta)
        if pooling is not None:
            values = _written(values)
    offsets = values.new_empty(0, dtype=torch.uint8)
    if pooling is not None:
        values, offsets = _pool(values, pooling, save)
        offsets = channels_first(offsets) if save else offsets
    output = channels_first(cast(values, input.dtype))
    # Neither may be a view of what was computed: see reference.cast.
    return output.clone(memory_format=memory_format(input)), offsets.clone()


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
    groups = reference.groups_of(normalization)
    gradient = cast(_channels_last(output_gradient, groups), compute_dtype(output_gradient.dtype))
    if pooling is not None:
        assert offsets is not None
        if output is not None:
            zeros = cast(_channels_last(output, groups), gradient.dtype)
            gradient = torch.ops.aten.threshold_backward(gradient, zeros, 0)
        gradient = _pool_backward(gradient, _channels_last(offsets, groups), size, pooling)
    if normalization is not None:
        assert input is not None
        a = _activation(input, bias, relu, groups)
        gradient = _normalize_backward(gradient, a, normalization)
        if relu:
            gradient = torch.ops.aten.threshold_backward(gradient, a, 0)
    finished = channels_first(cast(gradient, dtype)).contiguous(memory_format=format)
    if not bias_wanted:
        return finished, None
    # Row by row first, while a row is in the cache: a sum over all pixels at once reads a few channels at a time.
    return finished, reference.bias_sum(gradient.sum(-3, keepdim=True))
