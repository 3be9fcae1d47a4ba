"""Parallel strategies by name."""

import torch.distributed as dist

from ..model.alexnet import AlexNet
from .data import data
from .hybrid import hybrid
from .part import Parallel
from .tower import tower

STRATEGIES = {"data": data, "tower": tower, "hybrid": hybrid}


def parallelize(
    model: AlexNet, strategy: str, group: dist.ProcessGroup | None = None, compression: str = "none"
) -> Parallel:
    """Turn ``model``, in place, into this rank's part.

    Args:
        model: the whole network with its weights, identical on every rank, on the device where it will run.
        strategy: ``none``, ``data``, ``tower`` or ``hybrid``.
        group: the ranks; ``none`` needs no group.
        compression: ``bf16`` reduces averaged gradients in bfloat16.

    Raises:
        UsageError: the strategy cannot use this network.
    """
    if strategy == "none":
        return Parallel(model, model)
    assert group is not None
    return STRATEGIES[strategy](model, group, compression)
