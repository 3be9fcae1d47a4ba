"""The Triton kernels as registered PyTorch operators, forward and backward, with fake tensors and FLOP formulas."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..arguments import Normalization, Pooling
from ..flops import backward_flops, forward_flops
from .launch import backward_launch, forward_launch


def _parts(
    size: int, alpha: float, beta: float, k: float, groups: int, pooling: Sequence[int]
) -> tuple[Normalization | None, Pooling | None]:
    """The parts of the chain that an operator's arguments encode."""
    normalization = Normalization(size, alpha, beta, k, groups) if size else None
    return normalization, Pooling.of(pooling) if pooling else None


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor in the memory format of ``like``."""
    if len(shape) != 4:
        return torch.empty(shape, dtype=dtype, device=like.device)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=reference.memory_format(like))


def outputs(input: Tensor, pooling: Pooling | None, save: bool) -> tuple[Tensor, Tensor]:
    """The tensors that the forward pass writes: output and offsets."""
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
    """A ``size`` of 0 means no normalization; ``pooling`` is empty for none, else its nine numbers."""
    normalization, pool = _parts(size, alpha, beta, k, groups, pooling)
    output, offsets = outputs(input, pool, save)
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
    return outputs(input, _parts(size, alpha, beta, k, groups, pooling)[1], save)


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


def _gradient(
    output_gradient: Tensor, size: Sequence[int], pooling: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """An empty gradient: the output's shape, except for the rows and columns, which pooling reduced."""
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
    """The gradient in ``dtype``, and its float32 sum over all but the channels, which is empty if not wanted."""
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
    """The parts of the chain, encoded as an operator's arguments."""
    return list(normalization or (0, 0.0, 0.0, 0.0, 1)), [] if pooling is None else pooling.numbers()


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
