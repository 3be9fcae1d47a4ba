"""Bias and ReLU in one pass, and their gradients in one, for convolutions without normalization or pooling.

Forward reads and writes ``n`` elements. Backward reads the output and its gradient, writes the input gradient (``3 n``)
and sums the bias gradient in the same pass. PyTorch's own operators move ``4 n`` and ``4 n``, and sum a bfloat16
gradient in a kernel that takes longer than all the rest (on an H100, ``reports/LOG.md``). One launch takes the tensors
of several towers, as tuples of pointers; a program selects its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import relu_backward
from .config import FOUR_WARPS
from .runtime import launch

#: Pixels and channels of a tile, and tiles per program of the backward pass.
PIXELS, CHANNELS, TILES = 32, 64, 4


@triton.jit
def bias_relu_kernel(
    inputs, bias, outputs, pixels, channels, stride, output_stride, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """``max(input + bias, 0)`` of a tile of one of the tensors; NaN propagates."""
    number = tl.program_id(2)
    input, output = inputs[0], outputs[0]
    for each in tl.static_range(1, len(inputs)):
        input = tl.where(number >= each, inputs[each], input)
        output = tl.where(number >= each, outputs[each], output)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (pixel < pixels) & (channel < channels)
    value = tl.load(input + pixel * stride + channel, mask=inside).to(tl.float32)
    value += tl.load(bias + number * channels + channel, mask=channel < channels).to(tl.float32)
    value = tl.where(value < 0, 0.0, value)
    tl.store(output + pixel * output_stride + channel, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def bias_relu_backward_kernel(
    gradients,
    outputs,
    results,
    sums,
    pixels,
    channels,
    stride,
    output_stride,
    result_stride,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The gradient where the output is nonzero, and its sum over the program's pixels; NaN passes the gradient."""
    number = tl.program_id(2)
    gradient, output, result = gradients[0], outputs[0], results[0]
    for each in tl.static_range(1, len(gradients)):
        gradient = tl.where(number >= each, gradients[each], gradient)
        output = tl.where(number >= each, outputs[each], output)
        result = tl.where(number >= each, results[each], result)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    first = tl.program_id(0).to(tl.int64) * (TILES * PIXELS)
    # Offsets from here fit into 32 bits.
    gradient += first * stride
    output += first * output_stride
    result += first * result_stride
    left = tl.minimum(pixels - first, TILES * PIXELS).to(tl.int32)
    for tile in range(TILES):
        pixel = tile * PIXELS + tl.arange(0, PIXELS)[:, None]
        inside = (pixel < left) & (channel < channels)
        value = tl.load(gradient + pixel * stride + channel, mask=inside, other=0.0).to(tl.float32)
        kept = tl.load(output + pixel * output_stride + channel, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(kept <= 0, 0.0, value)
        tl.store(result + pixel * result_stride + channel, value.to(result.dtype.element_ty), mask=inside)
        total += value
    # A row of sums holds the channels of all tensors.
    place = (tl.program_id(0) * len(gradients) + number) * channels + channel
    tl.store(sums + place, tl.sum(total, 0)[None, :], mask=channel < channels)


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


def _strides(tensors: Sequence[Tensor]) -> int:
    """The one :func:`pixel_stride` of all tensors."""
    (stride,) = {pixel_stride(tensor) for tensor in tensors}
    assert stride is not None
    return stride


def forward(inputs: Sequence[Tensor], bias: Tensor, outputs: Sequence[Tensor]) -> None:
    """Writes ``relu(input + bias)`` of each input to its output, in one launch.

    Args:
        inputs: ``[N, C, H, W]`` each, with the same :func:`pixel_stride`; any dtype but float64.
        bias: ``[len(inputs) * C]``, contiguous.
        outputs: of the inputs' shape and dtype, with the same :func:`pixel_stride`.
    """
    channels = inputs[0].shape[1]
    pixels = inputs[0].numel() // channels
    grid = (triton.cdiv(pixels, PIXELS), triton.cdiv(channels, CHANNELS), len(inputs))
    tensors = tuple(inputs), bias, tuple(outputs)
    sizes = pixels, channels, _strides(inputs), _strides(outputs)
    launch(bias_relu_kernel, grid, bias.device, *tensors, *sizes, PIXELS, CHANNELS, **FOUR_WARPS)


def gradients(
    output_gradients: Sequence[Tensor], outputs: Sequence[Tensor], results: Sequence[Tensor], sums: Tensor
) -> None:
    """Writes the input gradients, and partial sums of the bias gradient to the rows of ``sums``, in one launch.

    Args:
        output_gradients: of the outputs' shape, with the same :func:`pixel_stride`.
        outputs: the results of :func:`forward`.
        results: of the outputs' shape and dtype, with the same :func:`pixel_stride`.
        sums: float32 ``[rows(outputs[0]), len(outputs) * C]``, contiguous.
    """
    channels = outputs[0].shape[1]
    pixels = outputs[0].numel() // channels
    grid = (rows(outputs[0]), triton.cdiv(channels, CHANNELS), len(outputs))
    tensors = tuple(output_gradients), tuple(outputs), tuple(results), sums
    sizes = pixels, channels, _strides(output_gradients), _strides(outputs), _strides(results)
    launch(bias_relu_backward_kernel, grid, sums.device, *tensors, *sizes, PIXELS, CHANNELS, TILES, **FOUR_WARPS)


def rows(output: Tensor) -> int:
    """The number of rows of sums in :func:`gradients`; it depends only on the number of pixels."""
    return triton.cdiv(output.numel() // output.shape[1], PIXELS * TILES)


class BiasReLU(torch.autograd.Function):
    """``relu(input + bias)`` and its gradients, for inputs that :func:`pixel_stride` allows."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        output = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
        forward([input], bias.contiguous(), [output])
        ctx.save_for_backward(output)
        ctx.bias_dtype = bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, Tensor]:
        (output,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Double backward needs operators that are themselves differentiable.
            gradient = relu_backward(output_gradient, output)
            return gradient, gradient.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
        result = torch.empty_like(output)
        sums = output.new_empty((rows(output), output.shape[1]), dtype=torch.float32)
        if pixel_stride(output_gradient) is None:
            output_gradient = output_gradient.contiguous(memory_format=torch.channels_last)
        gradients([output_gradient], [output], [result], sums)
        return result, sums.sum(0).to(ctx.bias_dtype)
