"""Overlapping max pooling (Krizhevsky et al. 2012, section 3.4), alone and behind a bias and a ReLU.

The largest value of every ``kernel_size`` window, windows ``stride`` apart; with ``stride < kernel_size`` they overlap
(the paper's are 3 wide and 2 apart). The gradient of an output goes to the first of the largest values of its window in
row-major order; a NaN in the window is its largest value.
"""

import torch.nn.functional as F
from torch import Tensor

from .arguments import add_bias, check_bias, check_input

#: An integer for both, or (rows, columns).
Pair = int | tuple[int, int]


def _check_pair(value: Pair, name: str, operator: str, least: int) -> None:
    pair = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) not in (1, 2)
        or any(isinstance(item, bool) or not isinstance(item, int) or item < least for item in pair)
    ):
        raise ValueError(f"{operator}: {name} must be an integer of at least {least} or two of them; got {value!r}")


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
        padding: rows and columns of minus infinity around the input; at most half the window.
        dilation: distance between the elements of a window.
        ceil_mode: round the number of windows up instead of down.

    Returns:
        A new tensor of ``input``'s dtype and memory format.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: a shape or a parameter that is not allowed.
    """
    operator = "max_pool2d"
    check_input(input, operator, at_least=3, at_most=4)
    _check_pair(kernel_size, "kernel_size", operator, 1)
    if stride is not None:
        _check_pair(stride, "stride", operator, 1)
    _check_pair(padding, "padding", operator, 0)
    _check_pair(dilation, "dilation", operator, 1)
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


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
        bias: ``[C]``, the bias of the convolution before; ``None`` adds nothing.

    Returns:
        A new tensor of ``input``'s dtype and memory format.

    Raises:
        TypeError, ValueError: as :func:`max_pool2d`, and when ``bias`` does not fit ``input``.
    """
    check_input(input, "relu_max_pool2d", at_least=3, at_most=4)
    check_bias(input, bias, input.dim() - 3, "relu_max_pool2d")
    return max_pool2d(F.relu(add_bias(input, bias, input.dim() - 3)), kernel_size, stride, padding, dilation, ceil_mode)
