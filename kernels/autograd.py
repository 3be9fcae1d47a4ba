"""The chain bias, ReLU, local response normalization, max pooling as one differentiable function.

The public operators check their arguments and call :func:`run` with the parts they have. This module decides what is
saved for the backward pass, and defines double backward, forward mode and ``vmap``. :mod:`kernels.dispatch` chooses
the implementation.

Saved for backward: with a normalization the input, from which the sums are recomputed; with ReLU and pooling but no
normalization the output; and each pooling window's argmax index, a small integer. If no gradient is needed, nothing is
saved and no indices are computed.
"""

import hashlib
import os
import pkgutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import aten, dispatch, private, reference
from .arguments import Normalization, Pooling


def _differentiating(*tensors: Tensor | None) -> bool:
    """Whether a derivative may be requested; only then are argmax indices needed."""
    if any(tensor is not None and tensor.requires_grad for tensor in tensors) and torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    return private.derivatives_beyond_autograd()


class _Stage(torch.autograd.Function):
    """The chain with its derivatives; see :func:`run`."""

    @staticmethod
    def forward(
        input: Tensor,
        bias: Tensor | None,
        relu: bool,
        normalization: Normalization | None,
        pooling: Pooling | None,
        implementation: str,
    ) -> tuple[Tensor, Tensor]:
        output, offsets = dispatch.MODULES[implementation].forward(input, bias, relu, normalization, pooling, True)
        # Autograd forbids in-place writes to a view that a Function returned.
        return output.data if private.is_view(output) else output, offsets

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
        implementation = dispatch.choose_backward(ctx.implementation, output_gradient)
        gradient, bias_sum = dispatch.MODULES[implementation].backward(
            output_gradient, input, bias, output, offsets, ctx.size,
            ctx.relu, ctx.normalization, ctx.pooling, ctx.dtype, ctx.format, ctx.needs_input_grad[1],
        )  # fmt: skip
        bias_gradient = None if bias_sum is None else reference.cast(bias_sum, ctx.bias_dtype)
        return gradient, bias_gradient, None, None, None, None

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
            results = [_Stage.apply(*pair, *parts) for pair in _examples(info, in_dims, input, bias)]
            outputs, offsets = zip(*results, strict=True)
            return (torch.stack(outputs), torch.stack(offsets)), (0, 0)
        examples = input.movedim(in_dims[0], 0)
        output, offset = _Stage.apply(examples.flatten(0, 1), bias, *parts)
        output = output.unflatten(0, examples.shape[:2])
        if offset.dim() == 1:
            return (output, offset), (0, None)
        return (output, offset.unflatten(0, examples.shape[:2])), (0, 0)


def _examples(
    info: Any, in_dims: tuple[int | None, ...], input: Tensor, bias: Tensor | None
) -> list[tuple[Tensor, Tensor | None]]:
    """The examples of a ``vmap`` in which each has its own bias, to run one by one."""
    return [
        (
            input if in_dims[0] is None else input.select(in_dims[0], example),
            bias if bias is None or in_dims[1] is None else bias.select(in_dims[1], example),
        )
        for example in range(info.batch_size)
    ]


def _code() -> str:
    """A hash of the code that a compiled graph is made from.

    Without the sources it is random, so that nothing is found in a cache.
    """
    digest = hashlib.sha256()
    for module in ("arguments", "autograd", "dispatch", "reference", "traced", "gpu/ops"):
        try:
            digest.update(pkgutil.get_data(__package__, f"{module}.py") or os.urandom(16))
        except OSError:
            digest.update(os.urandom(16))
    return digest.hexdigest()[:16]


# In a compiled graph the chain is an operator without kernels of its own. Dynamo keeps it as one node, and AOTAutograd
# replaces that by what _node runs. Otherwise Dynamo would interpret the formulas' bytecode, which takes longer than the
# rest of a compilation whose code is cached, and AOTAutograd would not cache the graph, because it contains an
# autograd.Function. The caches see only the node, so it carries the hash of the code.
_CODE = _code()
_LIBRARY = torch.library.Library("alexnet_fused", "FRAGMENT")
_LIBRARY.define(
    "stage(Tensor input, Tensor? bias, bool relu, float[] normalization, int[] pooling, str implementation, "
    "bool differentiating, str code) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _node(
    input: Tensor,
    bias: Tensor | None,
    relu: bool,
    normalization: Sequence[float],
    pooling: Sequence[int],
    implementation: str,
    differentiating: bool,
    code: str,
) -> Tensor:
    """``normalization`` and ``pooling`` are flat sequences of numbers, empty for None."""
    norm = None
    if normalization:
        size, alpha, beta, k, groups = normalization
        norm = Normalization(int(size), alpha, beta, k, int(groups))
    pool = Pooling.of(pooling) if pooling else None
    output: Tensor
    if differentiating:
        output, _ = _Stage.apply(input, bias, relu, norm, pool, implementation)
    else:
        output, _ = dispatch.MODULES[implementation].forward(input, bias, relu, norm, pool, False)
    return output


_LIBRARY.impl("stage", _node, "CompositeImplicitAutograd")
_OPERATOR = torch.ops.alexnet_fused.stage.default


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], input: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, int]:
    if in_dims[0] is not None and in_dims[1] is None:
        examples = input.movedim(in_dims[0], 0)
        return _OPERATOR(examples.flatten(0, 1), bias, *rest).unflatten(0, examples.shape[:2]), 0
    pairs = _examples(info, in_dims, input, bias)
    return torch.stack([_OPERATOR(*pair, *rest) for pair in pairs]), 0


torch.library.register_vmap("alexnet_fused::stage", _vmap, lib=_LIBRARY)


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
    implementation = dispatch.choose(input, normalization)
    if implementation == "aten":
        return aten.forward(input, bias, relu, normalization, pooling)
    differentiating = _differentiating(input, bias)
    if torch.compiler.is_compiling() and not private.exporting():
        norm = [] if normalization is None else [float(number) for number in normalization]
        pool = [] if pooling is None else pooling.numbers()
        output: Tensor = _OPERATOR(input, bias, relu, norm, pool, implementation, differentiating, _CODE)
        return output
    # Autograd differentiates an exported formula: strict export records a Function without its derivative.
    if not differentiating or torch.compiler.is_compiling():
        output, _ = dispatch.MODULES[implementation].forward(input, bias, relu, normalization, pooling, False)
        return output
    output, _ = _Stage.apply(input, bias, relu, normalization, pooling, implementation)
    return output
