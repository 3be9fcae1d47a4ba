"""Bias and ReLU behind a convolution, for layers with neither normalization nor pooling."""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, private
from .arguments import check_bias, check_input

if importlib.util.find_spec("triton") is not None:
    from .gpu import bias_relu as kernel
else:
    # Triton exists for Linux only.
    kernel = None  # type: ignore[assignment]


class _BiasReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        output = kernel.forward(input, bias.contiguous())
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
        gradient, total = kernel.backward(output_gradient, output)
        return gradient, total.to(ctx.bias_dtype)


def bias_relu(input: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(input + bias)``, the bias one for each channel.

    On a GPU, eagerly and in channels_last memory format, one pass forward and one backward; elsewhere PyTorch's
    operators, which ``torch.compile`` fuses. Gradients are PyTorch's: none where the sum is at most zero.

    Args:
        input: ``[N, C, ...]``, a convolution's output; float64, float32, float16 or bfloat16.
        bias: ``[C]``, the bias of the convolution before; ``None`` adds nothing.

    Returns:
        ``input``'s shape, dtype and memory format.

    Raises:
        TypeError, ValueError: an argument that is not allowed, by its name; or the implementation ``triton`` where it
            cannot run.
    """
    name = "bias_relu"
    check_input(input, name, at_least=2)
    check_bias(input, bias, 1, name)
    if bias is None:
        return F.relu(input)
    if _kernel_suits(input):
        result: Tensor = _BiasReLU.apply(input, bias)
        return result
    return F.relu(input + bias.to(input.dtype).reshape(-1, *[1] * (input.dim() - 2)))


def _kernel_suits(input: Tensor) -> bool:
    if input.numel() == 0 or torch.compiler.is_compiling() or autograd.named(input, None) != "triton":
        return False
    # Forward mode and functorch's transforms go through PyTorch's operators.
    if private.derivatives_beyond_autograd():
        return False
    return type(input) in (Tensor, torch.nn.Parameter) and kernel.pixel_stride(input) is not None
