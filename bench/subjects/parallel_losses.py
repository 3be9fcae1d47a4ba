"""Losses of the same short training run under every strategy, on the embedded digits.

A strategy computes the same as one process; only the order of additions differs. In float64, the losses are therefore
equal up to rounding. In float32, rounding errors grow until the losses visibly diverge, as they do between two orders
of the same images in one process; the final losses are similar. Dropout is off, because each rank has its own masks.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from net.common.allocator import keep_freed_memory
from net.common.device import set_precision
from net.data import digits
from net.data.images import ImageData, Split
from net.model.alexnet import AlexNet
from net.model.config import network
from net.parallel.strategies import parallelize
from net.training.config import RecipeConfig
from net.training.recipe import PaperSGD, Schedule, parameter_groups

LOSSES_CASE = "update of a network in parallel, losses"
VARIANT, BATCH = "digits", 32
#: One process again, with the images of each batch in reverse: the same sums in another order.
REORDERED = "none, images reversed"
#: Epochs by dtype. A CPU convolves in float64 several times slower than in float32.
EPOCHS = {"float64": 1, "float32": 8}
#: Half the paper's learning rate, divided by ten after these epochs. At the full rate, rounding alone decides whether
#: this network starts to learn in its first or its third epoch.
RATE, MILESTONES = 0.005, (5, 7)


def learn(strategy: str, dtype: str, device: torch.device, epochs: int | None = None) -> dict[str, Any]:
    """A row of the record: every update's loss, and the validation error after the last one.

    Args:
        strategy: ``none``, :data:`REORDERED` or a strategy, whose process group must exist.
        dtype: ``float64`` or ``float32``.
        device: of this rank.
        epochs: those of :data:`EPOCHS` unless given.
    """
    group = dist.group.WORLD if dist.is_initialized() else None
    ranks = dist.get_world_size() if group is not None else 1
    epochs = EPOCHS[dtype] if epochs is None else epochs
    keep_freed_memory()
    set_precision("fp32", device)
    torch.manual_seed(0)
    model = AlexNet(network(VARIANT, dropout=0.0)).to(device, getattr(torch, dtype))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    part = parallelize(model, strategy if group is not None else "none", group)
    recipe = RecipeConfig(lr=RATE, lr_scheduler="multistep", lr_milestones=MILESTONES)
    schedule = Schedule(recipe)
    optimizer = PaperSGD(parameter_groups(part.model, recipe), recipe.lr, recipe.momentum, recipe.weight_decay)
    data = digits.load()
    images, labels = _tensors(data.train, data, dtype, device)
    generator = np.random.default_rng(1)
    share = BATCH // part.training.replicas
    mine = slice(part.training.rank * share, (part.training.rank + 1) * share)
    losses: list[float] = []
    for epoch in range(epochs):
        schedule.observe(epoch, None)
        schedule.apply(optimizer)
        order = generator.permutation(len(labels))
        for begin in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[begin : begin + BATCH]
            own = (batch[::-1] if strategy == REORDERED else batch)[mine].copy()
            inputs = images[own].contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(part.forward(inputs), labels[own])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach().double() * part.weight
            if group is not None:
                dist.all_reduce(total)
            losses.append(float(total))
    part.model.eval()
    images, labels = _tensors(data.val, data, dtype, device)
    with torch.no_grad():
        logits = part.model(images)
    size = part.model.config.image_size
    return {
        "suite": "parallel",
        "case": LOSSES_CASE,
        "implementation": strategy,
        "mode": "train_step",
        "shape": f"{BATCH}x3x{size}x{size}",
        "dtype": dtype,
        "memory_format": "channels_last",
        "network": VARIANT,
        "data": data.name,
        "ranks": ranks,
        "epochs": epochs,
        "updates": len(losses),
        "losses": losses,
        "validation_images": len(labels),
        "validation_loss": float(F.cross_entropy(logits, labels)),
        "top1_error_percent": 100 * float((logits.argmax(1) != labels).double().mean()),
    }


def _tensors(split: Split, data: ImageData, dtype: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels minus the mean image, ``[count, 3, size, size]`` in channels_last, and labels."""
    pixels = torch.from_numpy(np.asarray(split.images) - data.mean).permute(0, 3, 1, 2)
    return pixels.to(device, getattr(torch, dtype)), torch.from_numpy(split.labels).to(device)
