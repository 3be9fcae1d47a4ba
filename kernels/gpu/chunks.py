"""The chain on equal chunks of the channels, stored in one tensor or in one tensor each.

In a network with towers, layers that read all channels need one tensor, and layers that read only their tower need one
tensor per tower. The kernels read and write either layout at no cost, forward and backward, so nothing is copied in
between, and the bias gradients of all chunks are one tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..arguments import Normalization, Pooling
from . import bias_relu
from .launch import backward_launch, forward_launch


def _chunks(tensors: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """One tensor per chunk, from ``count`` tensors or from a single one."""
    return tuple(tensors) if len(tensors) == count else tensors[0].chunk(count, 1)


def _empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor in channels_last memory format, on the device of ``like``."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


class Chunks(torch.autograd.Function):
    """``relu(input + bias)`` of each chunk, with normalization and pooling if given.

    Takes the bias, the number of chunks, the normalization, the pooling, whether the outputs are joined in one tensor,
    and the inputs: one tensor per chunk or a single one, ``[N, C, H, W]`` and dense in channels_last memory format.
    Returns one tensor per chunk, or a single one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        bias: Tensor,
        count: int,
        normalization: Normalization | None,
        pooling: Pooling | None,
        joined: bool,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        parts = _chunks(inputs, count)
        images, _, *size = parts[0].shape
        windows = size if pooling is None else [pooling.output_size(size[axis], axis) for axis in (0, 1)]
        wanted = 1 if joined else count
        shape = (images, bias.shape[0] // wanted, *windows)
        outputs = [_empty(shape, parts[0]) for _ in range(wanted)]
        save = any(ctx.needs_input_grad)
        if pooling is not None and save:
            offsets = [_empty(shape, parts[0], pooling.offset_dtype) for _ in range(wanted)]
        else:
            offsets = [bias.new_empty(0, dtype=torch.uint8)] * count
        if normalization is None and pooling is None:
            bias_relu.forward(parts, bias.contiguous(), _chunks(outputs, count))
        else:
            each = zip(parts, bias.chunk(count), _chunks(outputs, count), _chunks(offsets, count), strict=True)
            for part, part_bias, output, offset in each:
                launch = forward_launch(part, part_bias, True, normalization, pooling, save, output, offset)
                launch.run(part.device)
        kept = outputs if normalization is None else inputs
        ctx.save_for_backward(bias, *kept, *offsets)
        ctx.kept, ctx.inputs, ctx.size, ctx.dtype = len(kept), len(inputs), size, parts[0].dtype
        ctx.chain, ctx.count = (normalization, pooling), count
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        normalization, pooling = ctx.chain
        count = ctx.count
        bias, *rest = ctx.saved_tensors
        kept, taken = _chunks(rest[: ctx.kept], count), rest[ctx.kept :]
        # Per chunk: input and bias with a normalization, output without one; offsets.
        nothing = (None,) * count
        inputs, biases, outputs = (
            (nothing, nothing, kept) if normalization is None else (kept, bias.chunk(count), nothing)
        )
        offsets = nothing if pooling is None else _chunks(taken, count)
        # Copy here if they are not; otherwise each chunk's offsets would be copied too.
        dense = [each.contiguous(memory_format=torch.channels_last) for each in output_gradients]
        parts = list(zip(_chunks(dense, count), inputs, biases, outputs, offsets, strict=True))
        if torch.is_grad_enabled():
            # Double backward needs operators that are themselves differentiable.
            chain = tuple(ctx.size), normalization, pooling, ctx.dtype
            results, totals = zip(*(_differentiable(*part, *chain) for part in parts), strict=True)
            if ctx.inputs < count:
                results = (torch.cat(results, 1),)
            return torch.cat(totals).to(bias.dtype), None, None, None, None, *results
        shape = (dense[0].shape[0], bias.shape[0] // ctx.inputs, *ctx.size)
        gradients = [_empty(shape, bias, ctx.dtype) for _ in range(ctx.inputs)]
        results = _chunks(gradients, count)
        if normalization is None and pooling is None:
            sums = bias.new_empty((bias_relu.rows(results[0]), bias.shape[0]), dtype=torch.float32)
            bias_relu.gradients(_chunks(dense, count), kept, results, sums)
            total = sums.sum(0)
        else:
            launches = [
                backward_launch(*part, True, normalization, pooling, result, True)
                for part, result in zip(parts, results, strict=True)
            ]
            # Chunks with the same layout have the same number of programs; one launch adds the sums of all.
            sums = bias.new_empty((bias.shape[0], launches[0][1].shape[1]), dtype=torch.float32)
            for (launch, own), part_sums in zip(launches, sums.chunk(count), strict=True):
                assert own.shape == part_sums.shape
                launch.arguments["sums"] = part_sums
                launch.run(bias.device)
            total = sums.sum(1)
        return total.to(bias.dtype), None, None, None, None, *gradients


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
        gradient = reference.relu_backward(output_gradient, output)
        return gradient, gradient.sum((0, 2, 3), dtype=torch.float32)
    gradient, total = reference.backward(
        output_gradient, input, bias, output, offsets, size, True, normalization, pooling, dtype,
        torch.channels_last, True,
    )  # fmt: skip
    assert total is not None
    return gradient, total
