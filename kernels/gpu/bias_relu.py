"""Bias and ReLU in one pass, and their gradients in one: what follows a convolution without normalization or pooling.

Forward reads and writes ``n`` elements; backward reads the output and its gradient and writes the input's gradient,
``3 n``, with the bias's gradient summed on the way. PyTorch's own operators take ``4 n`` and ``4 n``, and sum a
bfloat16 gradient in a kernel that costs more than all the rest (an H100, ``reports/LOG.md``).
"""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Pixels and channels of a tile, and tiles that a program of the backward pass goes through.
PIXELS, CHANNELS, TILES = 32, 64, 4
#: Fused multiply-adds are more exact than two roundings; Triton's default for them changes with its versions.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def forward_kernel(input, bias, output, pixels, channels, stride, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """``max(input + bias, 0)`` of a tile; NaN propagates."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (pixel < pixels) & (channel < channels)
    value = tl.load(input + pixel * stride + channel, mask=inside).to(tl.float32)
    value += tl.load(bias + channel, mask=channel < channels).to(tl.float32)
    value = tl.where(value < 0, 0.0, value)
    tl.store(output + pixel * channels + channel, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    gradient,
    output,
    result,
    sums,
    pixels,
    channels,
    stride,
    result_stride,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The gradient where the output is not zero, and its sum over the program's pixels; NaN passes the gradient on."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    first = tl.program_id(0).to(tl.int64) * (TILES * PIXELS)
    # Pointers that move take fewer registers than offsets in 64 bits for each of the strides.
    gradient += first * stride
    output += first * channels
    result += first * result_stride
    left = tl.minimum(pixels - first, TILES * PIXELS).to(tl.int32)
    pixel = tl.arange(0, PIXELS)[:, None]
    for tile in range(TILES):
        inside = (pixel < left - tile * PIXELS) & (channel < channels)
        value = tl.load(gradient + pixel * stride + channel, mask=inside, other=0.0).to(tl.float32)
        kept = tl.load(output + pixel * channels + channel, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(kept <= 0, 0.0, value)
        tl.store(result + pixel * result_stride + channel, value.to(result.dtype.element_ty), mask=inside)
        total += value
        gradient += PIXELS * stride
        output += PIXELS * channels
        result += PIXELS * result_stride
    tl.store(sums + tl.program_id(0) * channels + channel, tl.sum(total, 0)[None, :], mask=channel < channels)


def pixel_stride(tensor: Tensor) -> int | None:
    """Elements from one pixel to the next where ``[N, C, H, W]`` lies pixel by pixel, channels together; None else.

    A slice of the channels does.
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


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def forward(input: Tensor, bias: Tensor) -> Tensor:
    """``relu(input + bias)``.

    Args:
        input: ``[N, C, H, W]`` for which :func:`pixel_stride` is not None; any dtype but float64.
        bias: ``[C]``, contiguous.

    Returns:
        In ``input``'s dtype, contiguous in channels_last memory format.
    """
    stride = pixel_stride(input)
    assert stride is not None
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
    channels = input.shape[1]
    pixels = input.numel() // channels
    grid = (triton.cdiv(pixels, PIXELS), triton.cdiv(channels, CHANNELS))
    with _on(input.device):
        forward_kernel[grid](input, bias, output, pixels, channels, stride, PIXELS, CHANNELS, **OPTIONS)
    return output


def gradients(output_gradient: Tensor, output: Tensor, result: Tensor) -> Tensor:
    """The input's gradient into ``result``, and rows, whose number depends on the number of pixels alone, of which the
    sum is the bias's gradient: float32 ``[rows, C]``.

    Args:
        output_gradient: of ``output``'s shape; copied where :func:`pixel_stride` is None.
        output: what :func:`forward` returned.
        result: of ``output``'s shape and dtype, for which :func:`pixel_stride` is not None.
    """
    stride = pixel_stride(output_gradient)
    if stride is None:
        output_gradient = output_gradient.contiguous(memory_format=torch.channels_last)
        stride = output.shape[1]
    result_stride = pixel_stride(result)
    assert result_stride is not None
    channels = output.shape[1]
    pixels = output.numel() // channels
    programs = triton.cdiv(pixels, PIXELS * TILES)
    sums = torch.empty(programs, channels, dtype=torch.float32, device=output.device)
    grid = (programs, triton.cdiv(channels, CHANNELS))
    sizes = pixels, channels, stride, result_stride
    with _on(output.device):
        backward_kernel[grid](output_gradient, output, result, sums, *sizes, PIXELS, CHANNELS, TILES, **OPTIONS)
    return sums


class BiasReLU(torch.autograd.Function):
    """``relu(input + bias)`` of what :func:`pixel_stride` allows, and its gradients."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        output = forward(input, bias.contiguous())
        ctx.save_for_backward(output)
        ctx.bias_dtype = bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, Tensor]:
        (output,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Gradients of gradients need operators that are differentiable themselves.
            gradient = torch.where(output <= 0, torch.zeros_like(output_gradient), output_gradient)
            return gradient, gradient.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
        result = torch.empty_like(output)
        return result, gradients(output_gradient, output, result).sum(0).to(ctx.bias_dtype)
