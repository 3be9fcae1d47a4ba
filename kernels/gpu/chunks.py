"""The chain on equal chunks of a tensor's channels, each with an output of its own.

Two towers that one convolution computes lie side by side in a tensor, and what reads them apart wants two. The chain
writes two at no cost, and its backward pass writes the gradients side by side again: nothing is copied on the way.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..arguments import Normalization, Pooling
from . import bias_relu, ops
from .launch import backward_launch


class Chunks(torch.autograd.Function):
    """``relu(input + bias)``, with normalization and pooling where there are any, of each chunk.

    Takes the input, ``[N, C, H, W]`` and dense in channels_last memory format, the bias, the number of chunks, which
    divides ``C``, and the two parts of the chain; returns a tensor for each chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor,
        chunks: int,
        normalization: Normalization | None,
        pooling: Pooling | None,
    ) -> tuple[Tensor, ...]:
        ctx.chain, ctx.dtypes = (normalization, pooling), (input.dtype, bias.dtype)
        ctx.shape, ctx.device = input.shape, input.device
        outputs: list[Tensor] = []
        offsets: list[Tensor] = []
        for part, part_bias in zip(input.chunk(chunks, 1), bias.chunk(chunks), strict=True):
            if normalization is None and pooling is None:
                outputs.append(bias_relu.forward(part, part_bias))
            else:
                save = any(ctx.needs_input_grad)
                output, offset = ops.forward(part, part_bias, True, normalization, pooling, save)
                outputs.append(output)
                offsets.append(offset)
        if normalization is None:
            ctx.save_for_backward(*outputs, *offsets)
        else:
            ctx.save_for_backward(input, bias, *offsets)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        normalization, pooling = ctx.chain
        dtype, bias_dtype = ctx.dtypes
        count = len(output_gradients)
        # Of each chunk: input and bias, where there is a normalization; output, where there is none; offsets, which
        # are empty without pooling.
        nothing = [None] * count
        if normalization is None:
            inputs, biases, outputs, offsets = nothing, nothing, ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        else:
            input, bias, *offsets = ctx.saved_tensors
            inputs, biases, outputs = input.chunk(count, 1), bias.chunk(count), nothing
        if pooling is None:
            offsets = nothing
        kept = list(zip(output_gradients, inputs, biases, outputs, offsets, strict=True))
        if torch.is_grad_enabled():
            # Gradients of gradients need operators that are differentiable themselves.
            size = tuple(ctx.shape[2:])
            found = [_differentiable(*each, size, normalization, pooling, dtype) for each in kept]
            gradients, totals = zip(*found, strict=True)
            return torch.cat(gradients, 1), torch.cat(totals).to(bias_dtype), None, None, None
        gradient = torch.empty(ctx.shape, dtype=dtype, device=ctx.device, memory_format=torch.channels_last)
        total = torch.empty(ctx.shape[1], dtype=torch.float32, device=ctx.device)
        for each, part, part_total in zip(kept, gradient.chunk(count, 1), total.chunk(count), strict=True):
            if normalization is None and pooling is None:
                sums = bias_relu.gradients(each[0], each[3], part)
                torch.sum(sums, 0, out=part_total)
            else:
                launch, sums = backward_launch(*each, True, normalization, pooling, part, True)
                launch.run(ctx.device)
                torch.sum(sums, 1, out=part_total)
        return gradient, total.to(bias_dtype), None, None, None


def _differentiable(
    output_gradient: Tensor,
    input: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    offsets: Tensor | None,
    size: tuple[int, int],
    normalization: Normalization | None,
    pooling: Pooling | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradients of a chunk and of its bias, by operators."""
    if normalization is None and pooling is None:
        assert output is not None
        gradient = torch.where(output <= 0, torch.zeros_like(output_gradient), output_gradient)
        return gradient, gradient.sum((0, 2, 3), dtype=torch.float32)
    gradient, total = reference.backward(
        output_gradient, input, bias, output, offsets, size, True, normalization, pooling, dtype,
        torch.channels_last, True,
    )  # fmt: skip
    assert total is not None
    return gradient, total
