"""Layers of which a rank holds some rows, and conversion between its rows and the whole parameter."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.alexnet import Dense, Exchange
from .collectives import gather


@dataclass(frozen=True)
class Shard:
    """A parameter whose ``rows`` are split over ``group``.

    Every rank holds the same number of rows; if they do not divide evenly, the last ones are zero padding, which
    nothing reads.
    """

    rows: int
    group: dist.ProcessGroup

    def local(self, whole: Tensor) -> Tensor:
        """This rank's rows of ``whole``, in its memory format."""
        share = -(-self.rows // self.group.size())
        first = self.group.rank() * share
        part = whole[first : first + share]
        if missing := share - len(part):
            part = F.pad(part, [0, 0] * (whole.dim() - 1) + [0, missing])
        return part.clone(memory_format=torch.preserve_format)

    def whole(self, local: Tensor) -> Tensor:
        """All rows, on every rank; a collective."""
        return gather(local.detach(), 0, self.group)[: self.rows].clone()


def split_rows(module: nn.Module, group: dist.ProcessGroup) -> Shard:
    """Reduce ``module.weight`` and ``module.bias``, which have equally many rows, to this rank's rows."""
    parameters = dict(module.named_parameters(recurse=False))
    shard = Shard(len(parameters["weight"]), group)
    for name, parameter in parameters.items():
        setattr(module, name, nn.Parameter(shard.local(parameter.detach()), parameter.requires_grad))
    return shard


class SplitDense(Dense):
    """A dense layer of which each rank computes some neurons.

    Args:
        dense: the whole layer, whose parameters are reused.
        collect: assembles the layer's input from this rank's tensors.
        deliver: applied to the rank's outputs.
    """

    def __init__(self, dense: Dense, collect: Exchange, deliver: Callable[[Tensor], Tensor] | None = None) -> None:
        with torch.device("meta"):
            super().__init__(dense.layer, "all", 1)
        self.weight, self.bias = dense.weight, dense.bias
        self.collect, self.deliver = collect, deliver

    def forward(self, towers: list[Tensor], exchange: Exchange) -> list[Tensor]:
        (outputs,) = super().forward(towers, self.collect)
        return [outputs if self.deliver is None else self.deliver(outputs)]
