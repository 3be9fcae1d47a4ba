"""Differentiable collectives."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import private

_all_gather = private.found(*private.RENAMED[0])
_all_to_all = private.found("torch.distributed._functional_collectives:all_to_all_single_autograd")
_Waiting = private.found("torch.distributed._functional_collectives:AsyncCollectiveTensor")


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """All-gather: the ranks' ``x`` concatenated along ``dim``. ``x`` has the same shape on every rank.

    Each rank uses the result differently, so the backward pass is a reduce-scatter: gradients are summed over the ranks
    and each rank gets its slice of the sum.
    """
    if x.dim() == 4 and dim == 1 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        # Gather without a copy: in memory, channels are the last dimension.
        return gather(x.permute(0, 2, 3, 1), 3, group).permute(0, 3, 1, 2)
    result: Tensor = _all_gather(x.contiguous(), dim, group)
    # Eager calls may return an AsyncCollectiveTensor, which autograd would save for backward.
    return result.wait() if isinstance(result, _Waiting) else result


def replicate(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Like :func:`gather`, for a result that every rank uses identically, such as the logits of a loss.

    Every rank then computes the whole gradient and keeps its own slice: backward needs no communication.
    """
    parts = list(gather(x.detach(), dim, group).chunk(group.size(), dim))
    parts[group.rank()] = x
    return torch.cat(parts, dim)


def transpose(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-to-all, forward and backward: from a rank's columns of all rows to all columns of a rank's rows.

    Args:
        x: ``[rows, columns]``, the rank's columns; ``rows`` is a multiple of the group's size.
        group: the ranks.

    Returns:
        ``[rows / ranks, columns * ranks]``, the rank's rows.
    """
    ranks = group.size()
    share = x.shape[0] // ranks
    blocks: Tensor = _all_to_all(x.contiguous(), [share] * ranks, [share] * ranks, group)
    return blocks.view(ranks, share, -1).transpose(0, 1).reshape(share, -1)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The identity, whose gradient is multiplied by ``factor``."""
    return _ScaleGradient.apply(x, factor)  # type: ignore[no-any-return]
