"""Loss and error between two lines of progress."""

from typing import Any

import torch
from torch import Tensor

from ..parallel.process_group import World


class Interval:
    """What the updates since the last line of progress gave; sums stay on the device.

    Args:
        device: of the losses.
        weight: of this rank's losses in the mean over the global batch; 0 where another rank sees the same images.
    """

    def __init__(self, device: torch.device, weight: float) -> None:
        self.weight = weight
        self.losses: list[Tensor] = []
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0
        self.seconds = 0.0

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """Take in an update: its loss, and how many of its images were classified correctly."""
        self.losses.append(loss if self.weight == 1 else loss * self.weight)
        if not self.weight:
            return
        self.correct += correct
        self.images += images

    def join(self, world: World) -> Tensor:
        """The losses of the global batches; the first rank then holds what all of them had, the others nothing."""
        if not self.losses:
            return torch.zeros(1)
        losses = world.sum(torch.stack(self.losses))
        if world.size > 1:
            counts = world.sum(torch.stack([self.correct, self.correct.new_tensor(self.images)]))
            self.losses = list(losses if world.first else torch.zeros_like(losses))
            self.correct.copy_(counts[0] if world.first else torch.zeros_like(counts[0]))
            self.images = int(counts[1]) if world.first else 0
        return losses

    def clear(self) -> None:
        self.losses.clear()
        self.correct.zero_()
        self.images = 0
        self.seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "correct": self.correct,
            "images": self.images,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any], first: bool) -> None:
        """Take in what :meth:`join` left with the first rank."""
        self.losses = [loss.to(self.correct.device) for loss in state["losses"]]
        self.correct.copy_(state["correct"])
        self.images, self.seconds = state["images"], state["seconds"]
        if not first:
            self.losses = [torch.zeros_like(loss) for loss in self.losses]
            self.correct.zero_()
            self.images = 0
