"""One rank's training step by itself: each strategy's compute per device, measured on a single device.

The other ranks do not exist. Messages do nothing, and received tensors are uninitialized, so times are right but values
are not. The cost model estimates the time of the messages.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kernels import private
from net.model.config import VARIANTS
from net.parallel.strategies import STRATEGIES, parallelize

from ..measure.records import time_columns
from ..measure.timing import wall_seconds
from .network import build, images_and_labels, update_step

ALONE_CASE = "update of one rank, its messages left out"


@contextlib.contextmanager
def _pretended(ranks: int) -> Iterator[dist.ProcessGroup | None]:
    """A process group of ``ranks`` in which only this process, rank 0, exists."""
    if ranks == 1:
        yield None
        return
    # Collectives that do nothing; PyTorch's own tests measure and trace with them.
    store = private.found("torch.testing._internal.distributed.fake_pg:FakeStore")()
    dist.init_process_group("fake", store=store, rank=0, world_size=ranks)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _own_gradients(state, bucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[no-untyped-def]
    """DDP's communication hook: the bucket itself, as if the other ranks' gradients were zero."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def usable(variant: str, ranks: int) -> list[str]:
    """``none``, and the strategies that can spread a network over ``ranks``."""
    towers = ranks % 2 == 0 and VARIANTS[variant].towers == 2
    return ["none", *(strategy for strategy in STRATEGIES if strategy != "tower" or towers)]


def alone(
    strategy: str, variant: str, batch: int, ranks: int, dtype: str, how: str, device: torch.device, samples: int
) -> dict[str, Any]:
    """A row of the record: the compute of rank 0's step in a run of ``ranks``.

    Args:
        strategy: ``none``, which has one rank, or another of :func:`usable`.
        variant: the network.
        batch: global batch size.
        ranks: world size of the strategy.
        dtype: ``float32``, or ``bfloat16`` under autocast.
        how: ``eager``, or a mode of ``torch.compile``.
        device: where it runs.
        samples: number of timed steps.
    """
    if strategy == "none":
        ranks = 1
    with _pretended(ranks) as group:
        part = parallelize(build(variant, device), strategy, group)
        if isinstance(part.forward, DistributedDataParallel):
            part.forward.register_comm_hook(None, _own_gradients)
        images, labels = images_and_labels(variant, batch // part.training.replicas, device)
        forward = part.forward if how == "eager" else torch.compile(part.forward, mode=how, dynamic=False)
        update = update_step(part.model, forward, images, labels, dtype)
        columns = time_columns(wall_seconds(update, samples))
    size = VARIANTS[variant].image_size
    return {
        "suite": "parallel",
        "case": ALONE_CASE,
        "implementation": strategy,
        "mode": "train_step",
        "shape": f"{batch}x3x{size}x{size}",
        "dtype": dtype,
        "memory_format": "channels_last",
        "network": variant,
        "ranks": ranks,
        "compiled": how,
        **columns,
    }
