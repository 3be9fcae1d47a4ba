"""Data parallelism: the whole network on every rank, a slice of the batch each, gradients averaged."""

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from kernels import private

from ..common.errors import UsageError
from ..model.alexnet import AlexNet
from .part import Parallel, Share


def averaged(
    model: AlexNet, group: dist.ProcessGroup, compression: str, split: tuple[str, ...] = ()
) -> DistributedDataParallel:
    """``model`` with its gradients averaged over ``group``, overlapped with the backward pass.

    Args:
        model: the network.
        group: the ranks.
        compression: ``"bf16"`` reduces gradients in bfloat16.
        split: names of parameters that are not averaged, because each rank holds different rows of them.

    Raises:
        UsageError: bf16 without NCCL, which PyTorch does not support.
    """
    if compression == "bf16" and dist.get_backend(group) != "nccl":
        raise UsageError("--gradient-compression bf16 needs NCCL and thus one GPU per rank; here it must be none")
    private.leave_to_ranks(model, split)
    wrapped = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    if compression == "bf16":
        wrapped.register_comm_hook(group, bf16_compress_hook)
    return wrapped


def data(model: AlexNet, group: dist.ProcessGroup, compression: str) -> Parallel:
    """Every rank computes its slice of the batch; DistributedDataParallel averages the gradients, bucket by bucket."""
    share = Share(group.rank(), group.size(), group)
    return Parallel(model, averaged(model, group, compression), share, share, 1 / group.size(), {})
