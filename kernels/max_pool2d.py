"""Overlapping max pooling (Krizhevsky et al. 2012, section 3.4), alone and behind a bias and a ReLU.

The largest value of every ``kernel_size`` window, windows ``stride`` apart; with ``stride < kernel_size`` they overlap
(the paper's are 3 wide and 2 apart). The gradient of an output goes to the first of the largest values of its window in
row-major order; a NaN in the window is its largest value, the last one if there are several.

Backward keeps the number of the largest element of each window, in one byte for windows of up to 256 elements, and
behind a ReLU the output. Bytes moved, for ``n`` elements of ``b`` bytes and ``w`` windows: ``n b + w b`` forward and as
many backward, and ``w`` for the numbers each way.
"""

from torch import Tensor

from . import stage
from .arguments import Pair, check_bias, check_input, check_pooling


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
        padding: rows and columns of minus infinity around the input; at most half the window without its dilation.
        dilation: distance between the elements of a window.
        ceil_mode: round the number of windows up instead of down.

    Returns:
        A new tensor of ``input``'s dtype and memory format.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: a shape or a parameter that is not allowed; nor is a dilation that leaves a window nothing but
            padding, whose gradient PyTorch writes beyond the input's memory.
    """
    return _run("max_pool2d", input, None, False, kernel_size, stride, padding, dilation, ceil_mode)


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
    return _run("relu_max_pool2d", input, bias, True, kernel_size, stride, padding, dilation, ceil_mode)


def _run(
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
        return stage.run(input.unsqueeze(0), bias, relu, None, pooling).squeeze(0)
    return stage.run(input, bias, relu, None, pooling)
