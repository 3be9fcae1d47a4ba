"""The paper's two GPUs: each rank holds one tower, half of every layer's maps and neurons (section 3.2 and Figure 2).

A rank computes its half of every layer on the whole batch. The ranks exchange pool2's output before conv3, pool5's
before fc6, fc6's before fc7 and fc7's before fc8; normalization stays within a tower. The logits are gathered for the
softmax. With 2 K ranks, K such pairs split the batch and average their gradients.
"""

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ..common.errors import UsageError
from ..model.alexnet import AlexNet, Convolution, Dense, Stage
from .collectives import gather, replicate
from .data import averaged
from .part import Parallel, Share
from .shards import Shard, SplitDense, split_rows


def tower(model: AlexNet, group: dist.ProcessGroup, compression: str) -> Parallel:
    """This rank's tower of ``model``.

    Raises:
        UsageError: the network does not have two towers, or normalizes across them.
    """
    config = model.config
    if config.towers != 2:
        raise UsageError(f"--parallel tower needs a network with two towers; {config.variant} has {config.towers} here")
    if config.lrn and config.lrn_across_towers:
        raise UsageError(
            f"--parallel tower: {config.variant} normalizes across towers, but each rank has only the channels of its "
            "own; use --parallel data or hybrid, or --architecture lrn_across_towers=false"
        )
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (group.size() // 2, 2), mesh_dim_names=("pair", "tower"))
    towers, pairs = mesh.get_group("tower"), mesh.get_group("pair")

    def exchange(parts: list[Tensor]) -> Tensor:
        (own,) = parts
        return gather(own, 1, towers)

    def logits(own: Tensor) -> Tensor:
        return replicate(own, 1, towers)[:, : config.classes]

    model.exchange = exchange
    shards: dict[str, Shard] = {}
    for name, module in list(model.named_children()):
        if isinstance(module, Stage):
            module.towers = 1
        if isinstance(module, (Convolution, Dense)):
            if name == config.output_name:
                assert isinstance(module, Dense)
                module = SplitDense(module, exchange, logits)
                model.set_submodule(name, module)
            shard = split_rows(module, towers)
            module.towers = 1
            shards |= {f"{name}.weight": shard, f"{name}.bias": shard}
    forward = averaged(model, pairs, compression) if pairs.size() > 1 else model
    share = Share(pairs.rank(), pairs.size(), pairs)
    # Both towers of a pair compute the same loss; count it once.
    weight = 1 / pairs.size() if towers.rank() == 0 else 0.0
    return Parallel(model, forward, share, share, weight, shards)
