"""Convolutions data-parallel, dense layers split by neurons (Krizhevsky 2014, "One weird trick").

The convolutions have most of the arithmetic and few of the weights, the dense layers the reverse. Each rank runs the
convolutions on its slice of the batch. Of that paper's three schemes for the dense layers this is scheme (a): the last
convolutional activations are all-gathered, and every rank computes its own neurons of each dense layer for the whole
batch. An all-to-all returns to each rank the logits of its images.
"""

from functools import partial

import torch.distributed as dist
from torch import Tensor

from ..common.errors import UsageError
from ..model.alexnet import AlexNet, Dense, concatenate
from .collectives import gather, replicate, scale_gradient, transpose
from .data import averaged
from .part import Parallel, Share
from .shards import Shard, SplitDense, split_rows


def hybrid(model: AlexNet, group: dist.ProcessGroup, compression: str) -> Parallel:
    """``model`` with only this rank's neurons of the dense layers.

    In evaluation every rank computes every image, so that batches need not divide evenly.

    Raises:
        UsageError: a dense layer reads one tower only.
    """
    config = model.config
    ranks = group.size()
    names = [*(dense.name for dense in config.hidden), config.output_name]
    for dense in config.hidden:
        if config.reads(dense, False) != "all":
            raise UsageError(
                f"--parallel hybrid splits dense layers that read all towers; {dense.name} of {config.variant} reads "
                "only its own (exchange=false): use --parallel data or tower"
            )

    def features(towers: list[Tensor], count: int) -> Tensor:
        (own,) = towers
        return gather(own, 1, group)[:, :count]

    def assemble(towers: list[Tensor]) -> Tensor:
        features = concatenate(towers)
        # The gather's backward sums the gradients of a rank's images over all ranks; DDP then divides by their number.
        return gather(scale_gradient(features, ranks), 0, group) if model.training else features

    def logits(own: Tensor) -> Tensor:
        if not model.training:
            return replicate(own, 1, group)[:, : config.classes]
        # The loss is the mean over the ranks of the means over their images.
        return transpose(scale_gradient(own, 1 / ranks), group)[:, : config.classes]

    shards: dict[str, Shard] = {}
    for number, name in enumerate(names):
        module = model.get_submodule(name)
        assert isinstance(module, Dense)
        collect = partial(features, count=module.layer.input_shape[0]) if number else assemble
        split = SplitDense(module, collect, logits if name == config.output_name else None)
        model.set_submodule(name, split)
        shard = split_rows(split, group)
        shards |= {f"{name}.weight": shard, f"{name}.bias": shard}
    forward = averaged(model, group, compression, tuple(shards))
    return Parallel(model, forward, Share(group.rank(), ranks, group), Share(0, 1, None), 1 / ranks, shards)
