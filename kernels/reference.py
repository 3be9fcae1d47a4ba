"""The chain in plain PyTorch: the formulas of :mod:`kernels.functional`, forward, backward and tangent.

This is the oracle for the other implementations, on any device and for any dtype and memory format. It also runs where
speed does not matter: for double backward and forward mode, because everything here is itself differentiable, and for
float64 on a GPU. :mod:`kernels.cpu` and :mod:`kernels.traced` have the fast forms.

Arithmetic is float64 for float64 and float32 for everything else, rounded once at the end. The maximum is taken before
rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Normalization, Pooling


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``.

    A cast to the same type must not be traced: if an ``autograd.Function``'s output has such an alias, PyTorch 2.11
    compiles the function to one with a gradient of zero (pytorch/pytorch#180642).
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """``channels_last`` for a 4-d tensor whose channels lie next to each other and whose pixels do not."""
    if tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.stride(3) > 1:
        return torch.channels_last
    return torch.contiguous_format


# Inside the chain every tensor is [N, ..., G, C / G], with G groups of channels, whatever the memory format.


def groups_of(normalization: Normalization | None) -> int:
    """The number of channel groups that a chain keeps separate."""
    return 1 if normalization is None else normalization.groups


def by_group(tensor: Tensor, groups: int) -> Tensor:
    """``[..., C]`` as ``[..., G, C / G]``: a view."""
    # PyTorch cannot batch unflatten and flatten.
    view: Tensor = tensor.view(*tensor.shape[:-1], groups, tensor.shape[-1] // groups)
    return view


def channels_last(tensor: Tensor, groups: int) -> Tensor:
    """``[N, C, ...]`` as ``[N, ..., G, C / G]``: a view."""
    return by_group(tensor.movedim(1, -1), groups)


def channels_first(tensor: Tensor) -> Tensor:
    """``[N, ..., G, C / G]`` as ``[N, C, ...]``: a view."""
    return tensor.reshape(*tensor.shape[:-2], tensor.shape[-2] * tensor.shape[-1]).movedim(-1, 1)


def activation(input: Tensor, bias: Tensor | None, relu: bool, groups: int) -> Tensor:
    """``relu(input + bias)`` in the compute type; both are optional. ``[N, C, ...]`` becomes ``[N, ..., G, C / G]``."""
    a = cast(channels_last(input, groups), compute_dtype(input.dtype))
    if bias is not None:
        a = a + by_group(cast(bias, a.dtype), groups)
    return F.relu(a) if relu else a


def relu_backward(gradient: Tensor, output: Tensor) -> Tensor:
    """``gradient`` where the ReLU's ``output`` is positive or NaN, else zero."""
    return torch.where(output <= 0, 0, gradient)


# Local response normalization


def window_sum(values: Tensor, before: int, after: int) -> Tensor:
    """Sum over the channels ``i - before`` to ``i + after`` of each group."""
    channels = values.shape[-1]
    # There are no channels further away.
    before, after = min(before, channels - 1), min(after, channels - 1)
    padded = F.pad(values, (before, after))
    total = values
    for distance in [*range(-1, -before - 1, -1), *range(1, after + 1)]:
        total = total + padded.narrow(-1, before + distance, channels)
    return total


def scale(a: Tensor, normalization: Normalization) -> Tensor:
    """``s``, the base of the power: ``a`` is multiplied by ``s ** -beta``."""
    total = window_sum(a * a, normalization.before, normalization.after)
    return total * (normalization.alpha / normalization.size) + normalization.k


def normalize(a: Tensor, normalization: Normalization) -> Tensor:
    """Local response normalization of ``a``."""
    return a * scale(a, normalization) ** -normalization.beta


def normalize_backward(db: Tensor, a: Tensor, normalization: Normalization) -> Tensor:
    """The gradient of ``a`` from ``db``, the gradient of ``normalize(a)``."""
    size, alpha, beta, _, _ = normalization
    s = scale(a, normalization)
    direct = db * s**-beta
    # The channels whose windows contain channel j: the window mirrored.
    total = window_sum(direct * a / s, normalization.after, normalization.before)
    return direct - (2 * alpha * beta / size) * a * total


def normalize_tangent(da: Tensor, a: Tensor, normalization: Normalization) -> Tensor:
    """The tangent of ``normalize(a)`` along ``da``."""
    size, alpha, beta, _, _ = normalization
    s = scale(a, normalization)
    total = window_sum(a * da, normalization.before, normalization.after)
    return (da - (2 * alpha * beta / size) * a / s * total) * s**-beta


# Max pooling of [N, H, W, G, C / G]. PyTorch's argmax indices count elements of the whole map, ours of the window.


def window_starts(pooling: Pooling, axis: int, windows: int, device: torch.device) -> Tensor:
    """The row (axis 0) or column where each window begins."""
    return torch.arange(windows, device=device) * pooling.stride[axis] - pooling.padding[axis]


def rows_and_columns(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """One number per row and one per column, in shapes that broadcast to ``[N, H, W, G, C / G]``."""
    return rows[:, None, None, None], columns[:, None, None]


def _starts(pooling: Pooling, windows: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """The row and column where each window begins, in shapes that broadcast."""
    return rows_and_columns(*(window_starts(pooling, axis, windows[axis], device) for axis in (0, 1)))


def pool(values: Tensor, pooling: Pooling, save: bool) -> tuple[Tensor, Tensor]:
    """The maximum of each window, and its row-major argmax index in the window.

    Without ``save`` the indices are empty.
    """
    kernel_size, stride, padding, dilation, ceil_mode = pooling
    groups, columns = values.shape[-2], values.shape[2]
    maps = channels_first(values)
    output, indices = F.max_pool2d(maps, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
    output, indices = channels_last(output, groups), channels_last(indices, groups)
    if not save:
        return output, values.new_empty(0, dtype=pooling.offset_dtype)
    first_row, first_column = _starts(pooling, output.shape[1:3], values.device)
    row = (indices // columns - first_row) // dilation[0]
    column = (indices % columns - first_column) // dilation[1]
    return output, (row * kernel_size[1] + column).to(pooling.offset_dtype)


def _indices(offsets: Tensor, columns: int, pooling: Pooling) -> Tensor:
    """The argmax indices in the whole map, given its number of columns: int64, like PyTorch's."""
    offsets = offsets.long()
    first_row, first_column = _starts(pooling, offsets.shape[1:3], offsets.device)
    row = first_row + offsets // pooling.kernel_size[1] * pooling.dilation[0]
    column = first_column + offsets % pooling.kernel_size[1] * pooling.dilation[1]
    return row * columns + column


def pool_backward(output_gradient: Tensor, offsets: Tensor, size: tuple[int, int], pooling: Pooling) -> Tensor:
    """Scatters each output's gradient to the element it came from: ``[N, *size, G, C / G]``."""
    kernel_size, stride, padding, dilation, ceil_mode = pooling
    gradient = torch.ops.aten.max_pool2d_with_indices_backward(
        channels_first(output_gradient.contiguous()),
        channels_first(output_gradient.new_empty((len(offsets), *size, *offsets.shape[3:]))),
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode,
        channels_first(_indices(offsets, size[1], pooling).contiguous()),
    )
    return channels_last(gradient, offsets.shape[-2])


def pool_tangent(tangent: Tensor, offsets: Tensor, pooling: Pooling) -> Tensor:
    """The tangent of each output, which is that of the element it came from."""
    indices = _indices(offsets, tangent.shape[2], pooling)
    flat = tangent.reshape(len(tangent), -1, *tangent.shape[3:])
    taken: Tensor = flat.gather(1, indices.reshape(len(indices), -1, *indices.shape[3:])).reshape(indices.shape)
    return taken


# The chain


def forward(
    input: Tensor,
    bias: Tensor | None,
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The chain's output, and the argmax indices of its windows.

    Args:
        input: ``[N, C, ...]``; ``[N, C, H, W]`` with ``pooling``.
        bias: ``[C]``, or None.
        relu, normalization, pooling: the parts of the chain.
        save: whether to compute argmax indices.

    Returns:
        the output, in ``input``'s dtype and memory format, and the indices, of the output's shape in
        ``pooling.offset_dtype``; empty without pooling or ``save``. Neither is a view.
    """
    values = activation(input, bias, relu, groups_of(normalization))
    if normalization is not None:
        values = normalize(values, normalization)
    offsets = values.new_empty(0, dtype=torch.uint8)
    if pooling is not None:
        values, offsets = pool(values, pooling, save)
        offsets = channels_first(offsets) if save else offsets
    output = channels_first(cast(values, input.dtype))
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
    """The gradients of ``input``, in ``dtype``, and of the bias, in the compute type.

    Args:
        output_gradient: the gradient of the output.
        input, bias: those of the forward pass; ``input`` is None without ``normalization``.
        output: that of the forward pass, if there are ReLU and pooling but no normalization; otherwise None.
        offsets: the argmax indices; None without pooling.
        size: rows and columns of ``input``; only pooling needs them.
        relu, normalization, pooling: the parts of the chain.
        dtype, format: of the gradient: ``input``'s.
        bias_wanted: whether to sum the bias gradient; otherwise it is None.
    """
    groups = groups_of(normalization)
    gradient = cast(channels_last(output_gradient, groups), compute_dtype(output_gradient.dtype))
    if pooling is not None:
        assert offsets is not None
        if output is not None:
            # Without a normalization, the maximum is zero only where the ReLU's input was not positive.
            gradient = relu_backward(gradient, channels_last(output, groups))
        gradient = pool_backward(gradient, channels_last(offsets, groups), size, pooling)
    if normalization is not None:
        assert input is not None
        a = activation(input, bias, relu, groups)
        gradient = normalize_backward(gradient, a, normalization)
        if relu:
            gradient = relu_backward(gradient, a)
    finished = channels_first(cast(gradient, dtype)).contiguous(memory_format=format)
    return finished, bias_sum(gradient) if bias_wanted else None


def bias_sum(gradient: Tensor) -> Tensor:
    """The sum over all dimensions except the channels, ``[C]``."""
    return gradient.sum(list(range(gradient.dim() - 2))).reshape(-1)


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
    groups = groups_of(normalization)
    a = activation(input, bias, relu, groups)
    result = torch.zeros_like(a) if input_tangent is None else cast(channels_last(input_tangent, groups), a.dtype)
    if bias_tangent is not None:
        result = result + by_group(cast(bias_tangent, a.dtype), groups)
    if relu:
        result = relu_backward(result, a)
    if normalization is not None:
        result = normalize_tangent(result, a, normalization)
    if pooling is not None:
        assert offsets is not None
        result = pool_tangent(result, channels_last(offsets, groups), pooling)
    return channels_first(cast(result, input.dtype))
