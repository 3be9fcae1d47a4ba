"""A whole stage of the paper's network behind a convolution: bias, ReLU, local response normalization, max pooling.

One pass over the input forward and one backward, where a composition of the operators takes at least four each way and
keeps every tensor in between. Bytes moved, for ``n`` elements of ``b`` bytes and ``w`` windows: ``n b + w b`` forward,
``2 n b + w b`` backward, and ``w`` for the numbers of the largest elements each way. In the half types the maximum is
taken of the float32 values, before rounding.
"""

from torch import Tensor

from . import stage
from .arguments import Pair, check_bias, check_input, check_normalization, check_pooling


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
        bias: ``[C]``, the bias of the convolution before; ``None`` adds nothing.
        kernel_size, stride, padding, dilation, ceil_mode: as in :func:`kernels.max_pool2d`; the paper's window of 3
            and stride of 2 are the defaults.

    Returns:
        ``[N, C, H', W']`` in ``input``'s dtype and memory format.

    Raises:
        TypeError, ValueError: an argument that is not allowed, by its name.
    """
    name = "relu_lrn_max_pool2d"
    check_input(input, name, at_least=4, at_most=4)
    check_bias(input, bias, 1, name)
    normalization = check_normalization(input, name, size, alpha, beta, k, groups)
    pooling = check_pooling(input, name, kernel_size, stride, padding, dilation, ceil_mode)
    return stage.run(input, bias, True, normalization, pooling)
