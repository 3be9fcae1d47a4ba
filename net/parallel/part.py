"""A parallel network as one rank holds it: the result of a strategy."""

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn

from ..model.alexnet import AlexNet
from .shards import Shard


@dataclass(frozen=True)
class Share:
    """Which slice of each batch a rank sees; ``group`` holds the ranks of all slices."""

    rank: int = 0
    replicas: int = 1
    group: dist.ProcessGroup | None = None

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all slices, on every rank."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor


@dataclass(frozen=True)
class Parallel:
    """This rank's part of a network.

    Attributes:
        model: the part itself; the optimizer updates its parameters.
        forward: the module that training calls: ``model``, or DistributedDataParallel around it.
        training, evaluation: the rank's slice of each batch.
        weight: of this rank's loss in the mean over the global batch.
        shards: by name, the parameters of which this rank holds some rows.
    """

    model: AlexNet
    forward: nn.Module
    training: Share = Share()
    evaluation: Share = Share()
    weight: float = 1.0
    shards: dict[str, Shard] = field(default_factory=dict)

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The process groups that this rank communicates in."""
        groups = [self.training.group, self.evaluation.group, *(shard.group for shard in self.shards.values())]
        return [group for group in groups if group is not None]

    def whole(self, name: str, local: Tensor) -> Tensor:
        """Gather the whole parameter ``name``, or its optimizer state, from the ranks' rows; a collective."""
        return self.shards[name].whole(local) if name in self.shards else local

    def local(self, name: str, whole: Tensor) -> Tensor:
        """This rank's rows of the whole parameter ``name``, or of its optimizer state."""
        return self.shards[name].local(whole) if name in self.shards else whole
