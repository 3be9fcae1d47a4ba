"""Local response normalization across channels, alone and behind a bias and a ReLU.

Formula (Krizhevsky et al. 2012, section 3.3), for channel ``i`` of one pixel::

    s_i = k + alpha / size * sum over j of a_j ** 2        j from i - size // 2 to i + (size - 1) // 2
    b_i = a_i * s_i ** -beta

Channels outside ``input``, or outside the group of channel ``i``, count as zero. Gradient::

    da_j = db_j * s_j ** -beta
           - 2 * alpha * beta / size * a_j * sum over i of db_i * a_i * s_i ** (-beta - 1)
                                                           i from j - (size - 1) // 2 to j + size // 2

alpha is divided by ``size``, as in :func:`torch.nn.functional.local_response_norm`. The paper's text does not divide:
its alpha of 1e-4 with ``size=5`` is ``alpha=5e-4`` here.

Backward keeps the input and nothing else; the sums are computed again. Bytes moved, for ``n`` elements of ``b`` bytes:
``2 n b`` forward, ``3 n b`` backward.
"""

from torch import Tensor

from . import stage
from .arguments import check_bias, check_input, check_normalization


def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, groups: int = 1
) -> Tensor:
    """Local response normalization; :func:`torch.nn.functional.local_response_norm` with ``groups``.

    Args:
        input: ``[N, C, ...]``, three or more dimensions; float64, float32, float16 or bfloat16. The half types are
            computed in float32 and rounded once.
        size: channels in the window: ``size // 2`` behind a channel, ``(size - 1) // 2`` ahead of it, and itself.
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
    return stage.run(input, None, False, check_normalization(input, name, size, alpha, beta, k, groups), None)


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
        bias: ``[C]``, the bias of the convolution before; ``None`` adds nothing.

    Returns:
        A new tensor of ``input``'s shape and dtype.

    Raises:
        TypeError, ValueError: as :func:`local_response_norm`, and when ``bias`` does not fit ``input``.
    """
    name = "relu_local_response_norm"
    check_input(input, name, at_least=3)
    check_bias(input, bias, 1, name)
    return stage.run(input, bias, True, check_normalization(input, name, size, alpha, beta, k, groups), None)
