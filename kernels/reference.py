"""The formulas in plain PyTorch, forward, backward and tangent, for any device, dtype and memory format.

Every operator of this package is a part of one chain: bias, ReLU, local response normalization, max pooling. Arithmetic
is done in float64 for float64 and in float32 for everything else, and rounded once at the end; the maximum is taken
before rounding. What is written here differentiates again, so it also serves the gradients of gradients of every other
implementation.

The formulas stand at the head of :mod:`kernels.functional`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Normalization, Pooling

# MKL 2024.2, which PyTorch's packages for x86 hold, chooses its square root when it is first called; called by several
# threads at once, one of them may get the least precise one for its share: 3e-4 off, with no word
# (pytorch/pytorch#188792). So the first call is one thread's.
for _dtype in (torch.float32, torch.float64):
    torch.ones(1, dtype=_dtype, device="cpu").sqrt()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type arithmetic is done in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``.

    A cast to the same type must not be traced: PyTorch 2.11 compiles an ``autograd.Function`` whose output has such an
    alias to one with a gradient of zero (pytorch/pytorch#180642).
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """``channels_last`` for a 4-d tensor whose channels lie next to each other and whose pixels do not."""
    if tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.stride(3) > 1:
        return torch.channels_last
    return torch.contiguous_format


def _for_inductor() -> bool:
    """Whether the formula is traced to be compiled: Inductor makes fast loops of other forms than are fast eager."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _fixed(size: int) -> int:
    """``size`` as a number that torch.compile compiles for; batches may vary in size, images may not.

    Inductor fails on loops over windows whose number is an expression of a size that varies (ValueRangeError). Dynamo
    makes a number of what ``range`` is asked for.
    """
    return len(range(size))


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


def _written(values: Tensor) -> Tensor:
    """``values``, which must have been computed here and be no view of an argument, as a contiguous buffer.

    Inductor would compute them again wherever they are read, with a mask for each shifted read; it writes what is
    viewed by strides to memory first, and then vectorizes the reads (reports/LOG.md has what that gives).
    """
    values = values.contiguous()
    written: Tensor = values.as_strided(values.shape, _contiguous_strides(values.shape), 0)
    return written


# Bias and ReLU. From here on every tensor is [N, ..., G, C / G], with G groups of channels, whatever the memory format.
# That also keeps Inductor from having dimension 1 lie next to each other: it does with all that it writes in four
# dimensions before a graph's last convolution, and [N, H, W, C] took twice the time.


def channels_behind(tensor: Tensor, groups: int) -> Tensor:
    """``[N, C, ...]`` as ``[N, ..., G, C / G]``: a view, but for Inductor channels always lie next to each other."""
    moved = tensor.movedim(1, -1)
    if _for_inductor() and not moved.is_contiguous():
        moved = _written(moved.clone(memory_format=torch.contiguous_format))
    return by_group(moved, groups)


def by_group(tensor: Tensor, groups: int) -> Tensor:
    """``[..., C]`` as ``[..., G, C / G]``: a view."""
    view: Tensor = tensor.unflatten(-1, (groups, tensor.shape[-1] // groups))
    return view


def channels_second(tensor: Tensor) -> Tensor:
    """``[N, ..., G, C / G]`` as ``[N, C, ...]``: a view."""
    return tensor.flatten(-2).movedim(-1, 1)


def activation(input: Tensor, bias: Tensor | None, relu: bool, groups: int) -> Tensor:
    """``relu(input + bias)`` in the compute type, either left out: of ``[N, C, ...]``, and given as said above."""
    a = cast(channels_behind(input, groups), compute_dtype(input.dtype))
    if bias is not None:
        a = a + by_group(cast(bias, a.dtype), groups)
    return F.relu(a) if relu else a


# Local response normalization


def window_sum(values: Tensor, behind: int, ahead: int) -> Tensor:
    """Sum over the channels ``i - behind`` to ``i + ahead``, inside each group."""
    channels = values.shape[-1]
    behind, ahead = min(behind, channels - 1), min(ahead, channels - 1)
    if _for_inductor():
        padded = F.pad(values, (behind, ahead)).contiguous()
        strides = _contiguous_strides(padded.shape)
        # See _written.
        total = padded.as_strided(values.shape, strides, 0)
        for start in range(1, behind + ahead + 1):
            total = total + padded.as_strided(values.shape, strides, start)
        return total
    total = values.clone()
    # Not by +=, which copies the slice onto itself afterwards.
    for distance in range(1, behind + 1):
        total[..., distance:].add_(values[..., : channels - distance])
    for distance in range(1, ahead + 1):
        total[..., : channels - distance].add_(values[..., distance:])
    return total


def scale(a: Tensor, normalization: Normalization, square: Callable[[Tensor], Tensor] = lambda a: a * a) -> Tensor:
    """``s``: what ``a`` is divided by, before the power."""
    size, alpha, _, k, _ = normalization
    total = window_sum(square(a), normalization.before, normalization.after)
    return total * (alpha / size) + k


def negative_power(base: Tensor, beta: float) -> Tensor:
    """``base ** -beta``; the paper's 0.75 costs one reciprocal square root and one square root."""
    if beta == 0.75:
        root = base.rsqrt()
        return root * root.sqrt()
    return torch.pow(base, -beta)


def normalize(a: Tensor, normalization: Normalization) -> Tensor:
    """Local response normalization of ``a``."""
    return a * negative_power(scale(a, normalization), normalization.beta)


def normalize_backward(db: Tensor, a: Tensor, normalization: Normalization) -> Tensor:
    """The gradient with respect to ``a`` from the one with respect to ``normalize(a)``."""
    size, alpha, beta, _, _ = normalization
    # Squared by another operator than in the forward pass, or torch.compile finds the sums there and keeps them.
    s = scale(a, normalization, torch.square)
    direct = db * negative_power(s, beta)
    # The channels whose windows hold channel j lie the other way round: ``ahead`` behind it, ``behind`` ahead of it.
    total = window_sum(direct * a / s, normalization.after, normalization.before)
    return direct - (2 * alpha * beta / size) * a * total


def normalize_tangent(da: Tensor, a: Tensor, normalization: Normalization) -> Tensor:
    """The tangent of ``normalize(a)`` along ``da``."""
    size, alpha, beta, _, _ = normalization
    s = scale(a, normalization)
    power = negative_power(s, beta)
    total = window_sum(a * da, normalization.before, normalization.after)
    return da * power - (2 * alpha * beta / size) * a * power / s * total


# Max pooling of [N, H, W, G, C / G]

#: More elements in a window, or windows over an element, than this are left to PyTorch's operators under Inductor.
_UNROLLED = 25


def _first(pooling: Pooling, axis: int, windows: int, device: torch.device) -> Tensor:
    """The row (axis 0) or column where each window begins."""
    return torch.arange(windows, device=device) * pooling.stride[axis] - pooling.padding[axis]


def _firsts(pooling: Pooling, windows: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`_first` of rows and columns, shaped to be combined with ``like``, and of its type."""
    rows, columns = (_first(pooling, axis, windows[axis], like.device).to(like.dtype) for axis in (0, 1))
    return _along(rows, columns)


def _along(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Shaped to be combined with ``[N, H, W, G, C / G]``."""
    return rows[:, None, None, None], columns[:, None, None]


def counts_in_float32(pooling: Pooling, size: Sequence[int]) -> bool:
    """Whether float32 holds every number and difference that comes up in numbering the elements of maps of so many
    rows and columns, and of windows: a processor divides many of them at once."""
    rows, columns = (
        size[axis] + 2 * pooling.padding[axis] + pooling.dilation[axis] * pooling.kernel_size[axis] for axis in (0, 1)
    )
    return rows * columns < 2**22


def _counting(pooling: Pooling, size: Sequence[int]) -> torch.dtype:
    return torch.float32 if counts_in_float32(pooling, size) else torch.int64


def _quotient(numbers: Tensor, divisor: int) -> Tensor:
    """Whole numbers, none below zero and in float32 below 2**24, divided and rounded down."""
    if numbers.is_floating_point():
        # By a tensor, because by a number a GPU multiplies with its inverse, and whole quotients come out too small.
        return numbers.div(numbers.new_full((), divisor)).floor_()
    return numbers.div(divisor, rounding_mode="floor")


def pool(values: Tensor, pooling: Pooling, save: bool) -> tuple[Tensor, Tensor]:
    """The largest value of each window, and the number of its element in the window, counted by rows.

    Without ``save`` the numbers are empty.
    """
    kernel_size, stride, padding, dilation, ceil_mode = pooling
    if _for_inductor() and kernel_size[0] * kernel_size[1] <= _UNROLLED:
        return _pool_unrolled(values, pooling, save)
    # PyTorch pools much faster on a CPU when the channels are next to each other, which more than pays for
    # moving them there.
    maps = channels_second(values.contiguous() if values.device.type == "cpu" else values)
    if not save:
        output = F.max_pool2d(maps, kernel_size, stride, padding, dilation, ceil_mode)
        return channels_behind(output, values.shape[-2]), values.new_empty(0, dtype=pooling.offset_dtype)
    output, indices = F.max_pool2d(maps, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
    output, indices = (channels_behind(each, values.shape[-2]) for each in (output, indices))
    indices = indices.to(_counting(pooling, values.shape[1:3]))
    first_row, first_column = _firsts(pooling, output.shape[1:3], indices)
    row = _quotient(indices, values.shape[2])
    if dilation == (1, 1):
        # Row and column in the map less those where the window begins, in fewer passes.
        offsets = torch.sub(indices, row, alpha=values.shape[2] - kernel_size[1])
        return output, (offsets - (first_row * kernel_size[1] + first_column)).to(pooling.offset_dtype)
    column = indices - row * values.shape[2] - first_column
    row, column = _quotient(row - first_row, dilation[0]), _quotient(column, dilation[1])
    return output, (row * kernel_size[1] + column).to(pooling.offset_dtype)


def _pool_unrolled(values: Tensor, pooling: Pooling, save: bool) -> tuple[Tensor, Tensor]:
    """The same, element by element of a window."""
    sizes = [_fixed(size) for size in values.shape[1:3]]
    windows = [pooling.output_size(size, axis) for axis, size in enumerate(sizes)]
    border = [0, 0, 0, 0]
    for axis in (1, 0):
        kernel, stride, padding, dilation = (pair[axis] for pair in pooling[:4])
        needed = (windows[axis] - 1) * stride + (kernel - 1) * dilation + 1
        border += [padding, max(0, needed - padding - sizes[axis])]
    padded = _written(F.pad(values, border, value=float("-inf"))) if any(border) else values
    best = torch.full_like(padded[:, : windows[0], : windows[1]], float("-inf"))
    # In a window of nothing but minus infinity the first element that is no padding is the largest.
    first = [
        ((pooling.dilation[axis] - 1 - _first(pooling, axis, windows[axis], values.device)).clamp_min(0))
        // pooling.dilation[axis]
        for axis in (0, 1)
    ]
    row, column = _along(*first)
    number = (row * pooling.kernel_size[1] + column).to(torch.int32).expand(best.shape)
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
            number = torch.where(larger, element_row * pooling.kernel_size[1] + element_column, number)
    return best, number.to(pooling.offset_dtype) if save else values.new_empty(0, dtype=pooling.offset_dtype)


def _indices(offsets: Tensor, size: Sequence[int], pooling: Pooling) -> Tensor:
    """Where the maxima lie in the flattened maps, which have so many rows and columns: int64, as PyTorch's."""
    element = offsets.to(_counting(pooling, size))
    first_row, first_column = _firsts(pooling, offsets.shape[1:3], element)
    row = _quotient(element, pooling.kernel_size[1])
    # row * dilation[0] * columns + column * dilation[1], the element's column being element - row * kernel_size[1].
    inside = element if pooling.dilation[1] == 1 else element * pooling.dilation[1]
    inside = torch.add(inside, row, alpha=pooling.dilation[0] * size[1] - pooling.dilation[1] * pooling.kernel_size[1])
    return (inside + (first_row * size[1] + first_column)).long()


def pool_backward(output_gradient: Tensor, offsets: Tensor, size: tuple[int, int], pooling: Pooling) -> Tensor:
    """Each output's gradient at the element it was taken from: ``[N, *size, C]``."""
    kernel_size, stride, padding, dilation, ceil_mode = pooling
    over = [-(-(dilation[axis] * (kernel_size[axis] - 1) + 1) // stride[axis]) for axis in (0, 1)]
    if _for_inductor() and over[0] * over[1] <= _UNROLLED:
        return _pool_backward_gathered(output_gradient, offsets, size, pooling, over)
    like = channels_second(output_gradient.new_empty((len(offsets), *size, *offsets.shape[3:])))
    gradient = torch.ops.aten.max_pool2d_with_indices_backward(
        channels_second(output_gradient.contiguous()),
        like,
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode,
        channels_second(_indices(offsets, size, pooling).contiguous()),
    )
    return channels_behind(gradient, offsets.shape[-2])


def _pool_backward_gathered(
    output_gradient: Tensor, offsets: Tensor, size: tuple[int, int], pooling: Pooling, over: list[int]
) -> Tensor:
    """The same, asking of each element of the input which of the windows over it took it."""
    # For each axis, for each of the windows that may hold an element: the window, and its element's share in the number
    # that the offset must equal; so far below zero, where the window does not hold it, that no sum is an offset. What
    # is always true is left out: of longer expressions Inductor makes several loops.
    nowhere = -(2**24)
    found = []
    for axis in (0, 1):
        kernel, stride, padding, dilation = (pair[axis] for pair in pooling[:4])
        windows = offsets.shape[1 + axis]
        place = torch.arange(size[axis], device=offsets.device) + padding
        candidates = []
        # In the order of the windows, as PyTorch adds.
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
            candidates.append((window, element.to(torch.int32)))
        found.append(candidates)
    total = None
    for row, row_number in found[0]:
        for column, column_number in found[1]:
            numbers = _along(row_number, column_number)
            taken = offsets[:, row[:, None], column].to(torch.int32) == numbers[0] + numbers[1]
            part = torch.where(taken, output_gradient[:, row[:, None], column], 0)
            total = part if total is None else total + part
    assert total is not None
    return total


def pool_tangent(tangent: Tensor, offsets: Tensor, pooling: Pooling) -> Tensor:
    """The tangent of each output: that of the element it was taken from."""
    indices = _indices(offsets, tangent.shape[1:3], pooling)
    taken: Tensor = tangent.flatten(1, 2).gather(1, indices.flatten(1, 2)).unflatten(1, indices.shape[1:3])
    return taken


# The chain


def _groups(normalization: Normalization | None) -> int:
    return 1 if normalization is None else normalization.groups


def forward(
    input: Tensor,
    bias: Tensor | None,
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The output in ``input``'s dtype and the offsets of the maxima (empty without pooling or ``save``)."""
    values = activation(input, bias, relu, _groups(normalization))
    if normalization is not None:
        values = normalize(values, normalization)
        if pooling is not None and _for_inductor():
            values = _written(values)
    if pooling is not None:
        values, offsets = pool(values, pooling, save)
        offsets = channels_second(offsets) if save else offsets
    else:
        offsets = values.new_empty(0, dtype=torch.uint8)
    output = channels_second(cast(values, input.dtype))
    if torch.compiler.is_compiling():
        # See cast: neither may the output be a view of what was computed.
        return output.clone(memory_format=memory_format(input)), offsets.clone()
    return output.contiguous(memory_format=memory_format(input)), offsets


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
    """The gradients of ``input``, in ``dtype``, and of the bias, in the compute type.

    Args:
        output_gradient: of the output.
        input, bias: the forward pass's; ``input`` is None without ``normalization``.
        output: the forward pass's, where ReLU and pooling stand without normalization, else None.
        offsets: of the maxima; None without pooling.
        size: rows and columns of ``input``; only pooling needs them.
        relu, normalization, pooling: the parts of the chain.
        dtype, format: of the gradient: ``input``'s.
        bias_wanted: whether to sum the bias's gradient; None is returned without.
    """
    gradient = _backward(output_gradient, input, output, offsets, bias, size, relu, normalization, pooling)
    finished = channels_second(cast(gradient, dtype)).contiguous(memory_format=format)
    return finished, _bias_sum(gradient) if bias_wanted else None


def _bias_sum(gradient: Tensor) -> Tensor:
    return gradient.sum(list(range(gradient.dim() - 2))).flatten()


def _backward(
    output_gradient: Tensor,
    input: Tensor | None,
    output: Tensor | None,
    offsets: Tensor | None,
    bias: Tensor | None,
    size: tuple[int, int],
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
) -> Tensor:
    groups = _groups(normalization)
    gradient = cast(channels_behind(output_gradient, groups), compute_dtype(output_gradient.dtype))
    if pooling is not None:
        assert offsets is not None
        if output is not None:
            # Without a normalization in between an output of zero was no activation.
            zeros = cast(channels_behind(output, groups), gradient.dtype)
            gradient = torch.ops.aten.threshold_backward(gradient, zeros, 0)
        gradient = pool_backward(gradient, channels_behind(offsets, groups), size, pooling)
    if normalization is not None:
        assert input is not None
        a = activation(input, bias, relu, groups)
        gradient = normalize_backward(gradient, a, normalization)
        if relu:
            gradient = torch.ops.aten.threshold_backward(gradient, a, 0)
    return gradient


def tangent(
    input_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    input: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
) -> Tensor:
    """The tangent of the output."""
    groups = _groups(normalization)
    a = activation(input, bias, relu, groups)
    result = torch.zeros_like(a) if input_tangent is None else cast(channels_behind(input_tangent, groups), a.dtype)
    if bias_tangent is not None:
        result = result + by_group(cast(bias_tangent, a.dtype), groups)
    if relu:
        result = torch.ops.aten.threshold_backward(result, a, 0)
    if normalization is not None:
        result = normalize_tangent(result, a, normalization)
    if pooling is not None:
        assert offsets is not None
        result = pool_tangent(result, channels_behind(offsets, groups), pooling)
    return channels_second(cast(result, input.dtype))
