"""Operation counts of the formulas, for rooflines and for :mod:`torch.utils.flop_counter`.

An addition, multiplication, comparison, root or power in the formulas of :mod:`kernels.functional` counts as one. Work
that an implementation repeats or avoids does not change the count. PyTorch's counter ignores its own elementwise
operators, including normalization and pooling, so a network with these operators counts slightly more FLOPs.
"""

from .arguments import Normalization, Pooling

#: Roots and products of ``s ** -0.75``; other powers count the same.
_POWER = 3


def forward_flops(
    elements: int, windows: int, bias: bool, relu: bool, normalization: Normalization | None, pooling: Pooling | None
) -> int:
    """Operations of the chain forward.

    Args:
        elements: of the input.
        windows: times channels; elements of the output where there is pooling.
        bias, relu, normalization, pooling: the parts of the chain.
    """
    each = bias + relu
    if normalization:
        # The squares' sum, times alpha / size, plus k; the power; the product with it.
        each += normalization.size + 2 + _POWER + 1
    return elements * each + (windows * (_elements(pooling) - 1) if pooling else 0)


def backward_flops(
    elements: int,
    windows: int,
    bias: bool,
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
    bias_wanted: bool,
) -> int:
    """Operations of the chain backward; see :func:`forward_flops`."""
    each = relu + bias_wanted
    if normalization:
        # Recomputed: the activation, its sums, the power. Then the direct term, its part in other channels' sums, those
        # sums, their product with 2 alpha beta / size and the activation, the difference.
        each += bias + relu + normalization.size + 2 + _POWER + 1 + 2 + (normalization.size - 1) + 3
    # For each element of a window: a comparison with the argmax index, and the sum over windows.
    return elements * each + (windows * 2 * _elements(pooling) if pooling else 0)


def _elements(pooling: Pooling) -> int:
    return pooling.kernel_size[0] * pooling.kernel_size[1]
