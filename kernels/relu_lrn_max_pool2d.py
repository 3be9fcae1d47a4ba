"""A whole stage of the paper's network behind a convolution: bias, ReLU, local response normalization, max pooling."""

from torch import Tensor

from .arguments import check_input
from .local_response_norm import relu_local_response_norm
from .max_pool2d import Pair, max_pool2d


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
    check_input(input, "relu_lrn_max_pool2d", at_least=4, at_most=4)
    normalized = relu_local_response_norm(input, size, alpha, beta, k, groups=groups, bias=bias)
    return max_pool2d(normalized, kernel_size, stride, padding, dilation, ceil_mode)
