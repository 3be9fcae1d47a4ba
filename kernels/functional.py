"""The operators, with :mod:`torch.nn.functional`'s argument order, defaults and semantics.

Every operator is a part of one chain: bias, ReLU, local response normalization, max pooling.

**Local response normalization** (Krizhevsky et al. 2012, section 3.3), for channel ``i`` of one pixel::

    s_i = k + alpha / size * sum over j of a_j ** 2        j from i - size // 2 to i + (size - 1) // 2
    b_i = a_i * s_i ** -beta

Channels outside ``input`` or outside channel ``i``'s group count as zero. Gradient::

    da_j = db_j * s_j ** -beta
           - 2 * alpha * beta / size * a_j * sum over i of db_i * a_i * s_i ** (-beta - 1)
                                                           i from j - (size - 1) // 2 to j + size // 2

alpha is divided by ``size``, as in :func:`torch.nn.functional.local_response_norm`. The paper does not divide: its
alpha of 1e-4 with ``size=5`` is ``alpha=5e-4`` here. Only the input is saved for backward; the sums are recomputed.

**Overlapping max pooling** (section 3.4): the largest value of every ``kernel_size`` window, with windows ``stride``
apart. They overlap if ``stride < kernel_size`` (in the paper, 3 wide and 2 apart). An output's gradient goes to the
first maximum of its window in row-major order. NaN propagates; if a window has several NaN, the last one gets the
gradient. Saved for backward: each window's argmax index (its row-major offset in the window), in one byte for windows
of up to 256 elements; after a ReLU without normalization, also the output.

Bytes moved, for ``n`` input elements of ``b`` bytes and ``w`` windows (times channels):

==============================  ==================  ======================
operator                        forward             backward
==============================  ==================  ======================
``local_response_norm``         ``2 n b``           ``3 n b``
``relu_local_response_norm``    ``2 n b``           ``3 n b``
``bias_relu``                   ``2 n b``           ``3 n b``
``max_pool2d``                  ``n b + w b + w``   ``n b + w b + w``
``relu_max_pool2d``             ``n b + w b + w``   ``n b + 2 w b + w``
``relu_lrn_max_pool2d``         ``n b + w b + w``   ``2 n b + w b + w``
==============================  ==================  ======================

``relu_chunks`` moves what the same chain without chunks moves. The ``w`` bytes of argmax indices are written only if a
gradient is needed. Half types are computed in float32 and rounded once; ``relu_lrn_max_pool2d`` takes the maximum of
the float32 values, before rounding.

While ``kernels.implementation("triton")`` is selected, every operator raises a ``ValueError`` for a tensor that is not
on a GPU, or if the package triton is missing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import autograd, dispatch, reference
from .arguments import Pair, check_bias, check_input, check_normalization, check_pooling

_Parameters = ParamSpec("_Parameters")


def _overridable(function: Callable[_Parameters, Tensor]) -> Callable[_Parameters, Tensor]:
    """Let an input that is no tensor but has ``__torch_function__``, such as a proxy of torch.fx, take the call."""

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> Tensor:
        input = args[0] if args else kwargs.get("input")
        if not isinstance(input, Tensor) and has_torch_function((input,)):
            result: Tensor = handle_torch_function(call, (input,), *args, **kwargs)
            return result
        return function(*args, **kwargs)

    return call


@_overridable
def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, groups: int = 1
) -> Tensor:
    """Local response normalization; :func:`torch.nn.functional.local_response_norm` with ``groups``.

    Args:
        input: ``[N, C, ...]``, three or more dimensions; float64, float32, float16 or bfloat16. The half types are
            computed in float32 and rounded once.
        size: channels in the window: ``size // 2`` before a channel, itself, and ``(size - 1) // 2`` after it.
        alpha: scale of the mean square; divided by ``size``, so the paper's 1e-4 is ``5e-4`` here.
        beta: exponent.
        k: additive constant; the paper's is 2.
        groups: the window never crosses one of ``groups`` equal groups of channels (the paper's towers).

    Returns:
        A new tensor of ``input``'s shape and dtype.

    Raises:
        TypeError: ``input`` is not a floating-point tensor, or ``alpha``, ``beta`` or ``k`` not a number.
        ValueError: ``input`` has fewer than three dimensions, ``size`` or ``groups`` is not a positive integer, or
            ``groups`` does not divide the channels.
    """
    name = "local_response_norm"
    check_input(input, name, at_least=3)
    return autograd.run(input, None, False, check_normalization(input, name, size, alpha, beta, k, groups), None)


@_overridable
def relu_local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    groups: int = 1,
    bias: Tensor | None = None,
) -> Tensor:
    """``local_response_norm(relu(input + bias))``: what follows a convolution in the paper's network.

    Args:
        input: ``[N, C, ...]``; the other arguments are those of :func:`local_response_norm`.
        bias: ``[C]``, the bias of the preceding convolution; ``None`` adds nothing.

    Returns:
        A new tensor of ``input``'s shape and dtype.

    Raises:
        TypeError, ValueError: as :func:`local_response_norm`, and if ``bias`` does not fit ``input``.
    """
    name = "relu_local_response_norm"
    check_input(input, name, at_least=3)
    check_bias(input, bias, 1, name)
    return autograd.run(input, bias, True, check_normalization(input, name, size, alpha, beta, k, groups), None)


@_overridable
def max_pool2d(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling; :func:`torch.nn.functional.max_pool2d` with checked arguments.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; float64, float32, float16 or bfloat16.
        kernel_size: rows and columns of a window.
        stride: distance between windows; ``None`` is ``kernel_size``.
        padding: rows and columns of minus infinity around the input; at most half of the undilated window.
        dilation: distance between the elements of a window.
        ceil_mode: round the number of windows up instead of down.

    Returns:
        A new tensor of ``input``'s dtype and memory format.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: a shape or a parameter is not allowed, or the dilation leaves a window with nothing but padding
            (PyTorch writes that window's gradient out of bounds).
    """
    return _pooled("max_pool2d", input, None, False, kernel_size, stride, padding, dilation, ceil_mode)


@_overridable
def relu_max_pool2d(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """``max_pool2d(relu(input + bias))``: what follows the paper's fifth convolution.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; the other arguments are those of :func:`max_pool2d`.
        bias: ``[C]``, the bias of the preceding convolution; ``None`` adds nothing.

    Returns:
        A new tensor of ``input``'s dtype and memory format.

    Raises:
        TypeError, ValueError: as :func:`max_pool2d`, and if ``bias`` does not fit ``input``.
    """
    return _pooled("relu_max_pool2d", input, bias, True, kernel_size, stride, padding, dilation, ceil_mode)


def _pooled(
    name: str,
    input: Tensor,
    bias: Tensor | None,
    relu: bool,
    kernel_size: Pair,
    stride: Pair | None,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
) -> Tensor:
    check_input(input, name, at_least=3, at_most=4)
    pooling = check_pooling(input, name, kernel_size, stride, padding, dilation, ceil_mode)
    check_bias(input, bias, input.dim() - 3, name)
    if input.dim() == 3:
        return autograd.run(input.unsqueeze(0), bias, relu, None, pooling).squeeze(0)
    return autograd.run(input, bias, relu, None, pooling)


@_overridable
def relu_lrn_max_pool2d(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    groups: int = 1,
    bias: Tensor | None = None,
    kernel_size: Pair = 3,
    stride: Pair | None = 2,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``max_pool2d(local_response_norm(relu(input + bias)))`` (Krizhevsky et al. 2012, section 3.5).

    Args:
        input: ``[N, C, H, W]``, a convolution's output; float64, float32, float16 or bfloat16.
        size, alpha, beta, k, groups: as in :func:`kernels.local_response_norm`.
        bias: ``[C]``, the bias of the preceding convolution; ``None`` adds nothing.
        kernel_size, stride, padding, dilation, ceil_mode: as in :func:`kernels.max_pool2d`; the paper's window of 3
            and stride of 2 are the defaults.

    Returns:
        ``[N, C, H', W']`` in ``input``'s dtype and memory format.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
    """
    name = "relu_lrn_max_pool2d"
    check_input(input, name, at_least=4, at_most=4)
    check_bias(input, bias, 1, name)
    normalization = check_normalization(input, name, size, alpha, beta, k, groups)
    pooling = check_pooling(input, name, kernel_size, stride, padding, dilation, ceil_mode)
    return autograd.run(input, bias, True, normalization, pooling)


@_overridable
def bias_relu(input: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(input + bias)``, with one bias per channel.

    On a GPU, for eager calls in channels_last memory format, this takes one pass forward and one backward. Otherwise
    it runs PyTorch's operators, which ``torch.compile`` fuses. As in PyTorch, the gradient is zero where the sum is at
    most zero.

    Args:
        input: ``[N, C, ...]``, a convolution's output; float64, float32, float16 or bfloat16.
        bias: ``[C]``, the bias of the preceding convolution; ``None`` adds nothing.

    Returns:
        ``input``'s shape, dtype and memory format.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
    """
    name = "bias_relu"
    check_input(input, name, at_least=2)
    check_bias(input, bias, 1, name)
    if bias is None:
        return F.relu(input)
    if dispatch.runs_bias_relu_kernel(input):
        # Triton exists for Linux only.
        from .gpu.bias_relu import BiasReLU

        result: Tensor = BiasReLU.apply(input, bias)
        return result
    compute = reference.compute_dtype(input.dtype)
    sums = input.to(compute) + bias.to(compute).reshape(-1, *[1] * (input.dim() - 2))
    return F.relu(sums).to(input.dtype)


def relu_chunks(
    inputs: Sequence[Tensor],
    bias: Tensor,
    chunks: int,
    normalization: Mapping[str, Any] | None = None,
    pooling: Mapping[str, Any] | None = None,
    *,
    joined: bool = False,
) -> list[Tensor]:
    """``relu(input + bias)``, optionally normalized and pooled, of equal chunks of the channels, such as towers.

    Inputs and outputs can each be one tensor for all chunks or one tensor per chunk. On a GPU, for eager calls in
    channels_last memory format, no chunk is copied, and neither is its gradient. Otherwise the chain's operators run
    on each chunk.

    Args:
        inputs: outputs of convolutions: one ``[N, C, H, W]``, or one ``[N, C / chunks, H, W]`` per chunk.
        bias: ``[C]``, the biases of all chunks.
        chunks: the number of chunks; must divide ``C``.
        normalization: arguments of :func:`local_response_norm`, applied within each chunk; None for none.
        pooling: arguments of :func:`max_pool2d`; None for none.
        joined: return all chunks in one tensor.

    Returns:
        One tensor per chunk, or a single one if ``joined``, in the inputs' dtype and memory format.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
    """
    name = "relu_chunks"
    if isinstance(inputs, Tensor):
        raise TypeError(f"{name}: inputs must be a sequence of tensors; got Tensor")
    inputs = tuple(inputs)
    if not isinstance(chunks, int) or chunks < 1 or len(inputs) not in (1, chunks):
        raise ValueError(
            f"{name}: chunks must be a positive integer, and inputs one tensor or one per chunk; "
            f"got chunks={chunks!r} and {len(inputs)} inputs"
        )
    for each in inputs:
        check_input(each, name, at_least=4, at_most=4)
    input = inputs[0]
    if any((each.shape, each.dtype, each.device) != (input.shape, input.dtype, input.device) for each in inputs):
        raise ValueError(
            f"{name}: inputs must have one shape, dtype and device; got "
            + ", ".join(f"{tuple(each.shape)} {each.dtype} {each.device}" for each in inputs)
        )
    if len(inputs) == 1 and input.shape[1] % chunks:
        raise ValueError(f"{name}: chunks={chunks} does not divide the input's {input.shape[1]} channels")
    if bias is None:
        raise TypeError(f"{name}: bias must be a torch.Tensor; got None")
    check_bias(input, bias, 1, name, inputs=len(inputs))
    parts = inputs if len(inputs) == chunks else input.chunk(chunks, 1)
    norm = None if normalization is None else check_normalization(parts[0], name, **{**_NORMALIZATION, **normalization})
    pool = None if pooling is None else check_pooling(input, name, **{**_POOLING, **pooling})
    if dispatch.runs_chunks_kernel(inputs, norm):
        from .gpu.chunks import Chunks

        return list(Chunks.apply(bias, chunks, norm, pool, joined, *inputs))
    outputs = [
        bias_relu(part, part_bias) if norm is None and pool is None else autograd.run(part, part_bias, True, norm, pool)
        for part, part_bias in zip(parts, bias.chunk(chunks), strict=True)
    ]
    return [torch.cat(outputs, 1)] if joined and chunks > 1 else outputs


#: The defaults of :func:`local_response_norm` and of :func:`max_pool2d`.
_NORMALIZATION: dict[str, Any] = {"alpha": 1e-4, "beta": 0.75, "k": 1.0, "groups": 1}
_POOLING: dict[str, Any] = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
