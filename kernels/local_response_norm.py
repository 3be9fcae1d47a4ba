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

Backward keeps the normalized activations' input and nothing else; the sums are computed again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .arguments import add_bias, check_bias, check_groups, check_input, check_positive_integer


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type arithmetic is done in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``.

    A cast to the same type must not be traced: PyTorch 2.11 compiles an ``autograd.Function`` whose output has such an
    alias to one with a gradient of zero (pytorch/pytorch#180642).
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _window_sum(values: Tensor, behind: int, ahead: int, groups: int) -> Tensor:
    """Sum over the channels ``i - behind`` to ``i + ahead`` of dimension 1, inside each group."""
    channels = values.shape[1] // groups
    behind, ahead = min(behind, channels - 1), min(ahead, channels - 1)
    grouped: Tensor = values.unflatten(1, (groups, channels))
    if torch.compiler.is_compiling():
        # Inductor makes one fused loop of this form; of the additions in place below it makes a chain of selections
        # that runs 19 times slower (stage 1 of the paper's network on a CPU).
        padded = F.pad(grouped, (0, 0) * (values.dim() - 2) + (behind, ahead))
        total = padded.narrow(2, 0, channels)
        for start in range(1, behind + ahead + 1):
            total = total + padded.narrow(2, start, channels)
        return total.flatten(1, 2)
    total = grouped.clone()
    for distance in range(1, behind + 1):
        total[:, :, distance:] += grouped[:, :, : channels - distance]
    for distance in range(1, ahead + 1):
        total[:, :, : channels - distance] += grouped[:, :, distance:]
    return total.flatten(1, 2)


def _negative_power(base: Tensor, beta: float) -> Tensor:
    """``base ** -beta``; the paper's 0.75 costs one reciprocal square root and one square root."""
    if beta == 0.75:
        root = base.rsqrt()
        return root * root.sqrt()
    return torch.pow(base, -beta)


class _LocalResponseNorm(torch.autograd.Function):
    """The formula at the head of this file, forward and backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
        a = _cast(input, _compute_dtype(input.dtype))
        s = _window_sum(a * a, size // 2, (size - 1) // 2, groups) * (alpha / size) + k
        return _cast(a * _negative_power(s, beta), input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, *ctx.parameters = inputs
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        size, alpha, beta, k, groups = ctx.parameters
        a = _cast(input, _compute_dtype(input.dtype))
        db = _cast(output_gradient, a.dtype)
        s = _window_sum(a * a, size // 2, (size - 1) // 2, groups) * (alpha / size) + k
        power = _negative_power(s, beta)
        # The channels whose windows hold channel j lie the other way round: (size - 1) // 2 behind it, size // 2 ahead.
        total = _window_sum(db * a * power / s, (size - 1) // 2, size // 2, groups)
        input_gradient = db * power - (2 * alpha * beta / size) * a * total
        return _cast(input_gradient, input.dtype), None, None, None, None, None


def _aten(input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    if groups == 1:
        return F.local_response_norm(input, size, alpha, beta, k)
    parts = [F.local_response_norm(part, size, alpha, beta, k) for part in input.chunk(groups, 1)]
    return torch.cat(parts, 1)


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
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: ``input`` has fewer than three dimensions, ``size`` or ``groups`` is not a positive integer, or
            ``groups`` does not divide the channels.
    """
    check_input(input, "local_response_norm", at_least=3)
    check_positive_integer(size, "size", "local_response_norm")
    check_groups(input, groups, "local_response_norm")
    if input.numel() == 0:
        return input.clone()
    if dispatch.selected() == "aten":
        return _aten(input, size, alpha, beta, k, groups)
    output: Tensor = _LocalResponseNorm.apply(input, size, alpha, beta, k, groups)
    return output


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
    check_input(input, "relu_local_response_norm", at_least=3)
    check_bias(input, bias, 1, "relu_local_response_norm")
    return local_response_norm(F.relu(add_bias(input, bias, 1)), size, alpha, beta, k, groups=groups)
