"""Bias and ReLU in one pass, and their gradients in one, for convolutions without normalization or pooling.

Forward reads and writes ``n`` elements. Backward reads the output and its gradient, writes the input gradient (``3 n``)
and sums the bias gradient in the same pass. PyTorch's own operators move ``4 n`` and ``4 n``, and sum a bfloat16
gradient in a kernel that takes longer than all the rest (on an H100, ``reports/LOG.md``).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import launch

#: Pixels and channels of a tile, and tiles per program of the backward pass.
PIXELS, CHANNELS, TILES = 32, 64, 4
#: Fused multiply-adds are more accurate than two roundings; Triton's default for them varies between versions.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def forward_kernel(
    input, bias, output, pixels, channels, stride, output_stride, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """``max(input + bias, 0)`` of a tile; NaN propagates."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (pixel < pixels) & (channel < channels)
    value = tl.load(input + pixel * stride + channel, mask=inside).to(tl.float32)
    value += tl.load(bias + channel, mask=channel < channels).to(tl.float32)
    value = tl.where(value < 0, 0.0, value)
    tl.store(output + pixel * output_stride + channel, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    gradient,
    output,
    result,
    sums,
    pixels,
    channels,
    stride,
    output_stride,
    result_stride,
    sums_stride,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The gradient where the output is nonzero, and its sum over the program's pixels; NaN passes the gradient."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    first = tl.program_id(0).to(tl.int64) * (TILES * PIXELS)
    # Advancing pointers takes fewer registers than 64-bit offsets for each stride.
    gradient += first * stride
    output += first * output_stride
    result += first * result_stride
    left = tl.minimum(pixels - first, TILES * PIXELS).to(tl.int32)
    pixel = tl.arange(0, PIXELS)[:, None]
    for tile in range(TILES):
        inside = (pixel < left - tile * PIXELS) & (channel < channels)
        value = tl.load(gradient + pixel * stride + channel, mask=inside, other=0.0).to(tl.float32)
        kept = tl.load(output + pixel * output_stride + channel, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(kept <= 0, 0.0, value)
        tl.store(result + pixel * result_stride + channel, value.to(result.dtype.element_ty), mask=inside)
        total += value
        gradient += PIXELS * stride
        output += PIXELS * output_stride
        result += PIXELS * result_stride
    tl.store(sums + tl.program_id(0) * sums_stride + channel, tl.sum(total, 0)[None, :], mask=channel < channels)


def pixel_stride(tensor: Tensor) -> int | None:
    """Elements from one pixel to the next if ``[N, C, H, W]`` is stored pixel by pixel with adjacent channels.

    Otherwise None. A slice of the channels of such a tensor qualifies.
    """
    if tensor.dim() != 4 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
        return None
    first, expected = None, 0
    for axis in (3, 2, 0):
        size, stride = tensor.shape[axis], tensor.stride(axis)
        if size == 1:
            continue
        if first is None:
            first = stride
        elif stride != expected:
            return None
        expected = stride * size
    return tensor.shape[1] if first is None else first


def forward(input: Tensor, bias: Tensor, output: Tensor) -> None:
    """Writes ``relu(input + bias)`` to ``output``.

    Args:
        input: ``[N, C, H, W]`` for which :func:`pixel_stride` is not None; any dtype but float64.
        bias: ``[C]``, contiguous.
        output: of ``input``'s shape and dtype, for which :func:`pixel_stride` is not None.
    """
    stride, output_stride = pixel_stride(input), pixel_stride(output)
    assert stride is not None
    assert output_stride is not None
    channels = input.shape[1]
    pixels = input.numel() // channels
    grid = (triton.cdiv(pixels, PIXELS), triton.cdiv(channels, CHANNELS))
    sizes = pixels, channels, stride, output_stride
    launch(forward_kernel, grid, input.device, input, bias, output, *sizes, PIXELS, CHANNELS, **OPTIONS)


def gradients(output_gradient: Tensor, output: Tensor, result: Tensor, sums: Tensor) -> None:
    """Writes the input gradient to ``result``, and partial sums of the bias gradient to the rows of ``sums``.

    Args:
        output_gradient: of ``output``'s shape; copied where :func:`pixel_stride` is None.
        output: the result of :func:`forward`.
        result: of ``output``'s shape and dtype, for which :func:`pixel_stride` is not None.
        sums: float32 ``[rows(output), C]``, contiguous but for its rows.
    """
    stride = pixel_stride(output_gradient)
    if stride is None:
        output_gradient = output_gradient.contiguous(memory_format=torch.channels_last)
        stride = output.shape[1]
    output_stride, result_stride = pixel_stride(output), pixel_stride(result)
    assert output_stride is not None
    assert result_stride is not None
    channels = output.shape[1]
    pixels = output.numel() // channels
    grid = (rows(output), triton.cdiv(channels, CHANNELS))
    sizes = pixels, channels, stride, output_stride, result_stride, sums.stride(0)
    tensors = output_gradient, output, result, sums
    launch(backward_kernel, grid, output.device, *tensors, *sizes, PIXELS, CHANNELS, TILES, **OPTIONS)


def rows(output: Tensor) -> int:
    """The number of rows of sums in :func:`gradients`; it depends only on the number of pixels."""
    return triton.cdiv(output.numel() // output.shape[1], PIXELS * TILES)


class BiasReLU(torch.autograd.Function):
    """``relu(input + bias)`` and its gradients, for inputs that :func:`pixel_stride` allows."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        output = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
        forward(input, bias.contiguous(), output)
        ctx.save_for_backward(output)
        ctx.bias_dtype = bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, Tensor]:
        (output,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Double backward needs operators that are themselves differentiable.
            gradient = torch.where(output <= 0, torch.zeros_like(output_gradient), output_gradient)
            return gradient, gradient.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
        result = torch.empty_like(output)
        sums = output.new_empty((rows(output), output.shape[1]), dtype=torch.float32)
        gradients(output_gradient, output, result, sums)
        return result, sums.sum(0).to(ctx.bias_dtype)
