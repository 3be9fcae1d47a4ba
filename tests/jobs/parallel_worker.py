"""Worker of the multi-process tests, which share one launch: ``torchrun parallel_worker.py FOLDER FLAGS``.

Rank 0 writes the results to ``FOLDER/found.json``, which the tests check.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from bench.predict.messages import Count, expected
from net import train
from net.common.errors import DataError
from net.model.alexnet import alexnet
from net.parallel.launch import Launch
from net.parallel.process_group import Processes
from net.parallel.strategies import parallelize
from net.training.config import RecipeConfig, TrainConfig
from net.training.recipe import PaperSGD, parameter_groups

BATCH = 12
STEPS = 4
#: Seeds of the images.
SEEDS = (1, 2)
#: Orders of a batch's images.
ORDERS = BATCH
#: Nine classes, which do not divide evenly among the ranks.
NETWORK = {"image_size": 20, "dropout": 0.0, "classes": 9}
Result = dict[str, Any]


def learn(
    strategy: str,
    dtype: torch.dtype,
    group: dist.ProcessGroup | None,
    *,
    seed: int = SEEDS[0],
    shift: int = 0,
) -> Result:
    """Losses of the global batches, gradients of the first update, and weights and logits after the last.

    ``shift`` rotates the images of each batch, which only changes the order of sums.
    """
    torch.manual_seed(0)
    model = alexnet("digits", **NETWORK).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    part = parallelize(model, strategy, group)
    recipe = RecipeConfig()
    optimizer = PaperSGD(parameter_groups(part.model, recipe), recipe.lr, recipe.momentum, recipe.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    share = BATCH // part.training.replicas
    mine = slice(part.training.rank * share, (part.training.rank + 1) * share)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    counted = Count(2)
    for step in range(STEPS):
        images = 60 * torch.randn(BATCH, 3, 20, 20, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(0, 9, (BATCH,), generator=generator)
        images, labels = images.roll(shift, 0), labels.roll(shift, 0)
        # The second update: DistributedDataParallel rebuilds its buckets after the first.
        with counted if step == 1 else torch.enable_grad():
            logits = part.forward(images[mine].contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels[mine])
            loss.backward()
        if step == 0:
            named = part.model.named_parameters()
            gradients = {name: part.whole(name, each.grad).clone() for name, each in named if each.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().double() * part.weight
        if group is not None:
            dist.all_reduce(total)
        losses.append(float(total))
    part.model.eval()
    with torch.no_grad():
        logits = part.model(60 * torch.randn(5, 3, 20, 20, generator=generator, dtype=torch.float64).to(dtype))
    weights = {name: part.whole(name, tensor.detach()) for name, tensor in part.model.named_parameters()}
    return {
        "losses": losses,
        "gradients": gradients,
        "weights": weights,
        "logits": logits,
        "messages": sorted((message.kind, message.size) for message in counted.messages),
        "held": sum(parameter.numel() for parameter in part.model.parameters()),
    }


def distance(ours: Result, theirs: Result) -> dict[str, float]:
    """The largest differences between two runs; for gradients and weights relative to the parameter's largest value."""
    result = {"loss": max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))}
    result["first_loss"] = abs(ours["losses"][0] - theirs["losses"][0])
    for kind in ("gradients", "weights"):
        result[kind] = max(
            float((ours[kind][name] - exact).abs().max() / exact.abs().max()) for name, exact in theirs[kind].items()
        )
    result["logits"] = float((ours["logits"] - theirs["logits"]).abs().max())
    return result


def unequal(ranks: Processes) -> dict[str, str]:
    """The errors when ranks see different images, or one cannot open them."""

    def fails() -> int:
        if ranks.rank == 1:
            raise DataError("no such folder")
        return 0

    said = {}
    for name, open, identity in (
        ("count", lambda: 7 + ranks.rank, lambda count: {"training images": count}),
        ("missing", fails, lambda count: {}),
    ):
        try:
            ranks.opened(open, identity)
        except DataError as error:
            said[name] = str(error)
    return said


def largest_loss_error(ours: Result, exact: Result) -> float:
    return max(abs(a - b) for a, b in zip(ours["losses"], exact["losses"], strict=True))


def equality(group: dist.ProcessGroup) -> Result:
    """Compare every strategy with one process.

    ``drift`` is the largest error of float32 losses relative to float64, over the seeds: in one process with a batch's
    images in several orders, and with each strategy.
    """
    config = alexnet("digits", **NETWORK).config
    drift: dict[str, float] = dict.fromkeys(("none", "data", "tower", "hybrid"), 0.0)
    found: Result = {"drift": drift}

    def drifted(strategy: str, *runs: Result) -> None:
        errors = torch.tensor([largest_loss_error(run, exact) for run in runs], dtype=torch.float64).max()
        dist.all_reduce(errors, dist.ReduceOp.MAX, group)
        drift[strategy] = max(drift[strategy], float(errors))

    for seed in SEEDS:
        exact = learn("none", torch.float64, None, seed=seed)
        orders = range(dist.get_rank(group), ORDERS, 2)
        drifted("none", *(learn("none", torch.float32, None, seed=seed, shift=shift) for shift in orders))
        for strategy in ("data", "tower", "hybrid"):
            single = learn(strategy, torch.float32, group, seed=seed)
            drifted(strategy, single)
            if seed != SEEDS[0]:
                continue
            double, again = (learn(strategy, dtype, group) for dtype in (torch.float64, torch.float32))
            found[strategy] = {
                "float64": distance(double, exact),
                "first": distance(single, exact),
                "repeats": single["losses"] == again["losses"]
                and all(torch.equal(single["weights"][name], again["weights"][name]) for name in single["weights"]),
                "messages": single["messages"],
                "expected": sorted((each.kind, each.size) for each in expected(config, strategy, 2, BATCH)),
                "held": single["held"],
                "parameters": config.parameters,
            }
    return found


def masks(folder: Path) -> None:
    """Record every dropout's mask of the first update."""
    forward = nn.Dropout.forward

    def noted(self: nn.Dropout, x: Tensor) -> Tensor:
        y = forward(self, x)
        if self.training and len(seen) < 2:
            seen.append((y == 0)[x != 0].int().tolist())
            (folder / f"masks_{os.environ['RANK']}.json").write_text(json.dumps(seen))
        return y

    seen: list[list[int]] = []
    nn.Dropout.forward = noted  # type: ignore[method-assign]


def main() -> None:
    folder = Path(sys.argv[1])
    rank, ranks = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    # A prefix of its own: the training below uses the same store.
    store, _, _ = next(rendezvous("env://"))
    dist.init_process_group("gloo", store=dist.PrefixStore("worker", store), rank=rank, world_size=ranks)
    assert dist.group.WORLD is not None
    found = equality(dist.group.WORLD)
    dist.destroy_process_group()
    group = Processes(Launch(rank, ranks, rank, ranks), "gloo", TrainConfig())
    found["unequal"] = unequal(group)
    group.close()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    masks(folder)
    assert train.main(sys.argv[2:]) == 0


if __name__ == "__main__":
    main()
