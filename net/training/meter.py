"""Loss and error between two log lines."""

from typing import Any

import torch
from torch import Tensor

from ..common.device import sum_dtype
from ..parallel.process_group import World


class Interval:
    """Losses and correct predictions since the last log line; they stay on the device.

    Args:
        device: of the losses.
        weight: of this rank's losses in the mean over the global batch; 0 if another rank counts the same images.
    """

    def __init__(self, device: torch.device, weight: float) -> None:
        self.weight = weight
        self.losses: list[Tensor] = []
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0
        self.seconds = 0.0

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """Add an update: its loss, the number of correctly classified images, and of all images."""
        self.losses.append(loss if self.weight == 1 else loss * self.weight)
        if not self.weight:
            return
        self.correct += correct
        self.images += images

    def read(self, world: World, failed: Tensor) -> tuple[list[float], int, bool]:
        """Reduce over the ranks and copy to the host, which waits for the device once.

        Afterwards rank 0 holds the totals and the others zeros.

        Args:
            world: the ranks.
            failed: whether a check failed on this rank; a boolean scalar on the device.

        Returns:
            On every rank: the losses of the global batches, the number of correctly classified images, and whether a
            check failed on any rank.
        """
        dtype = sum_dtype(self.correct.device)
        counts = torch.stack([self.correct, torch.full_like(self.correct, self.images), failed.long()]).to(dtype)
        losses = torch.stack(self.losses).to(dtype) if self.losses else counts[:0]
        total = world.sum(torch.cat([losses, counts]))
        # Rounded, so that reading twice does not change the result.
        losses = total[:-3].float()
        total[:-3] = losses
        *values, correct, images, failures = total.tolist()
        if world.size > 1:
            self.losses = list(losses if world.first else torch.zeros_like(losses))
            self.correct.fill_(int(correct) if world.first else 0)
            self.images = int(images) if world.first else 0
        return values, int(correct), failures > 0

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
        """Restore rank 0's state on rank 0, and zeros on the others, as after :meth:`read`."""
        self.losses = [loss.to(self.correct.device) for loss in state["losses"]]
        self.correct.copy_(state["correct"])
        self.images, self.seconds = state["images"], state["seconds"]
        if not first:
            self.losses = [torch.zeros_like(loss) for loss in self.losses]
            self.correct.zero_()
            self.images = 0
