"""The chain bias, ReLU, local response normalization, max pooling as one differentiable function.

The public operators check their arguments and call :func:`run` with the parts they have. Here stands what all of them
share: which implementation runs, what is kept for the backward pass, and the rules for gradients of gradients, forward
mode and ``vmap``.

Kept for backward: the input where there is a normalization, whose sums are computed again; the output where ReLU and
pooling stand without one; and a small integer for each pooling window, the number of the element that was largest.
Nothing is kept, and no such numbers are computed, where no gradient is asked for.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from . import aten, cpu, dispatch, inductor, private, reference
from .arguments import Normalization, Pooling
from .gpu.config import INTERPRETED

_IMPLEMENTATIONS = {"reference": reference, "cpu": cpu, "inductor": inductor}
if importlib.util.find_spec("triton") is not None:
    # Triton exists for Linux only.
    from .gpu import ops

    _IMPLEMENTATIONS["triton"] = ops


def _differentiating(*tensors: Tensor | None) -> bool:
    """Whether a derivative may be asked for; only then the offsets of the maxima are needed."""
    if any(tensor is not None and tensor.requires_grad for tensor in tensors) and torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    return private.derivatives_beyond_autograd()


class _Stage(torch.autograd.Function):
    """See :func:`run`."""

    @staticmethod
    def forward(
        input: Tensor,
        bias: Tensor | None,
        relu: bool,
        normalization: Normalization | None,
        pooling: Pooling | None,
        implementation: str,
    ) -> tuple[Tensor, Tensor]:
        results: tuple[Tensor, Tensor] = _IMPLEMENTATIONS[implementation].forward(
            input, bias, relu, normalization, pooling, True
        )
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        input, bias, relu, normalization, pooling, implementation = inputs
        output, offsets = outputs
        ctx.mark_non_differentiable(offsets)
        ctx.set_materialize_grads(False)
        ctx.relu, ctx.normalization, ctx.pooling, ctx.implementation = relu, normalization, pooling, implementation
        ctx.size = tuple(input.shape[-2:])
        ctx.dtype, ctx.format = input.dtype, reference.memory_format(input)
        ctx.bias_dtype = None if bias is None else bias.dtype
        taken = None if pooling is None else offsets
        if normalization is None:
            ctx.save_for_backward(None, None, output if relu and pooling is not None else None, taken)
        else:
            ctx.save_for_backward(input, bias, None, taken)
        ctx.save_for_forward(input, bias, taken)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if output_gradient is None:
            return (None,) * 6
        input, bias, output, offsets = ctx.saved_tensors
        # Gradients of gradients need formulas that are differentiable themselves.
        implementation = "reference" if torch.is_grad_enabled() else ctx.implementation
        gradient, bias_sum = _IMPLEMENTATIONS[implementation].backward(
            output_gradient, input, bias, output, offsets, ctx.size,
            ctx.relu, ctx.normalization, ctx.pooling, ctx.dtype, ctx.format, ctx.needs_input_grad[1],
        )  # fmt: skip
        bias_gradient = None if bias_sum is None else reference.cast(bias_sum, ctx.bias_dtype)
        return gradient, bias_gradient, None, None, None, None


class _EagerStage(_Stage):
    """With forward mode and ``vmap``, which Dynamo does not trace."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        output, offsets = _Stage.forward(*arguments)
        # Autograd lets nobody write in place to a view that a Function has made.
        return output.data if private.is_view(output) else output, offsets

    @staticmethod
    def jvp(ctx: Any, input_tangent: Tensor | None, bias_tangent: Tensor | None, *_: None) -> tuple[Tensor, None]:
        input, bias, offsets = ctx.saved_tensors
        parts = (ctx.relu, ctx.normalization, ctx.pooling)
        return reference.tangent(input_tangent, bias_tangent, input, bias, offsets, *parts), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], input: Tensor, bias: Tensor | None, *parts: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
        if in_dims[0] is None or in_dims[1] is not None:
            # A bias for each example: one by one.
            results = [
                _EagerStage.apply(
                    input if in_dims[0] is None else input.select(in_dims[0], example),
                    bias if bias is None or in_dims[1] is None else bias.select(in_dims[1], example),
                    *parts,
                )
                for example in range(info.batch_size)
            ]
            outputs, offsets = zip(*results, strict=True)
            return (torch.stack(outputs), torch.stack(offsets)), (0, 0)
        examples = input.movedim(in_dims[0], 0)
        output, offset = _EagerStage.apply(examples.flatten(0, 1), bias, *parts)
        output = output.unflatten(0, examples.shape[:2])
        if offset.dim() == 1:
            return (output, offset), (0, None)
        return (output, offset.unflatten(0, examples.shape[:2])), (0, 0)


def _implementation(input: Tensor, normalization: Normalization | None) -> str:
    """What runs on ``input``, by its name in ``_IMPLEMENTATIONS``, or ``aten``."""
    name = named(input, normalization)
    return "cpu" if name == "reference" and cpu.suits(input) else name


def named(input: Tensor, normalization: Normalization | None) -> str:
    """The implementation that runs on ``input``, by the name that users know.

    Raises:
        ValueError: ``triton`` is chosen and cannot run on it.
    """
    name = dispatch.selected()
    if name == "auto":
        # The formulas were written for these devices and tried there; on Apple's GPU PyTorch's operators have kernels.
        name = {"cuda": "triton", "mps": "aten"}.get(input.device.type, "reference")
        if name not in _IMPLEMENTATIONS and name != "aten":
            name = "reference"
    if name == "triton":
        if "triton" not in _IMPLEMENTATIONS:
            raise ValueError("the implementation 'triton' needs the package triton, which is not installed")
        if input.dtype == torch.float64:
            # A GPU's roots are approximate, and nobody is in a hurry in float64.
            return "reference"
        if normalization is not None and (normalization.alpha < 0 or normalization.k < 0 or normalization.beta == 0):
            # The kernels' powers are of what is positive, by way of its logarithm.
            return "reference"
        if input.device.type != "cuda" and not INTERPRETED:
            raise ValueError(
                f"the implementation 'triton' needs a tensor on a GPU, or TRITON_INTERPRET=1; got one on {input.device}"
            )
    if name == "inductor" and torch.compiler.is_compiling():
        # Traced into the caller's graph, where Inductor fuses it with what stands around it.
        return "reference"
    return name


def run(
    input: Tensor,
    bias: Tensor | None,
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
) -> Tensor:
    """The chain on checked arguments.

    Args:
        input: ``[N, C, ...]``; ``[N, C, H, W]`` with ``pooling``.
        bias: ``[C]``, added first; None adds nothing.
        relu: whether a ReLU comes next.
        normalization, pooling: what comes then; None leaves it out.

    Returns:
        A new tensor in ``input``'s dtype and memory format.
    """
    assert normalization is not None or pooling is not None, "nothing would be kept to mask a ReLU's gradient with"
    implementation = _implementation(input, normalization)
    if input.numel() == 0 or implementation == "aten":
        return aten.forward(input, bias, relu, normalization, pooling)
    if not _differentiating(input, bias):
        output: Tensor
        output, _ = _IMPLEMENTATIONS[implementation].forward(input, bias, relu, normalization, pooling, False)
        return output
    function = _Stage if torch.compiler.is_compiling() else _EagerStage
    output, _ = function.apply(input, bias, relu, normalization, pooling, implementation)
    return output
