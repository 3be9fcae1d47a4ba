"""One of two processes that train a fused network under FSDP2 and under DDP; see :mod:`tests.jobs.test_sharded`."""

import copy
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kernels

BATCH = 6


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(5, 0.5, k=2.0), nn.MaxPool2d(3, 2)),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return layers.double()


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model[0], model[1], model):  # type: ignore[index]
        fully_shard(module, mesh=mesh)
    return model


def train(model: nn.Module, parameters: nn.Module, images: Tensor) -> list[Tensor]:
    """The whole parameters after three updates."""
    optimizer = torch.optim.SGD(parameters.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in parameters.parameters()]


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images = torch.randn(BATCH, 3, 13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alone = network()
    expected = train(alone, alone, images)
    own = images.chunk(ranks)[rank]
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {"FSDP2": sharded, "DDP": DistributedDataParallel}
    for name, way in ways.items():
        fused = kernels.fuse(network())
        model = way(copy.deepcopy(fused))
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        for ours, theirs in zip(train(model, inner, own), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        if rank == 0:
            print(f"{name}: equal to one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
