"""Figure 1: how many epochs the 4-layer network needs to 25 % training error, with ReLU and with tanh."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..common import seeds
from ..data.augmentation import centre_crop
from ..data.images import ImageData
from ..data.loader import Loader
from ..model.alexnet import AlexNet
from ..model.config import network
from ..training.config import RecipeConfig
from ..training.recipe import PaperSGD, parameter_groups

Activation = Literal["relu", "tanh"]

#: Training error in percent at which the paper compares.
TARGET = 25.0
#: Points of the curve in an epoch.
POINTS = 4


@dataclass(frozen=True)
class Curve:
    """Training error, while learning, over the training.

    ``epochs[i]`` is where the updates end over which ``errors[i]``, in percent, was counted; ``reached`` is where the
    line between two points crosses the target, None if it was not reached.
    """

    activation: Activation
    rate: float
    epochs: NDArray[np.float64]
    errors: NDArray[np.float64]
    reached: float | None

    def summary(self) -> str:
        """How it went, in words."""
        if self.reached is not None:
            return f"{TARGET:g} % after {self.reached:.2f} epochs"
        if not len(self.errors):
            return "given up"
        return f"{self.errors[-1]:.1f} % after {self.epochs[-1]:.2f} epochs, given up"


def crossing(epochs: Sequence[float], errors: Sequence[float]) -> float | None:
    """Where the line through the points first falls to ``TARGET``; None if it does not."""
    for number, error in enumerate(errors):
        if error <= TARGET:
            if number == 0:
                return epochs[0]
            before, start = errors[number - 1], epochs[number - 1]
            return start + (before - TARGET) / (before - error) * (epochs[number] - start)
    return None


def train(
    data: ImageData,
    activation: Activation,
    rate: float,
    *,
    max_epochs: float,
    batch_size: int,
    seed: int,
    device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> Curve:
    """Train the 4-layer network until its training error is 25 %, without regularization of any kind.

    Args:
        data: its training images are used.
        activation: of the network.
        rate: learning rate, constant.
        max_epochs: where a training is given up.
        batch_size, seed, device: of the training.
        progress: called after each update.
    """
    seeds.weights(seed)
    plan = network("cifar10", activation=activation, classes=len(data.classes))
    model = AlexNet(plan).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = PaperSGD(parameter_groups(model, RecipeConfig(weight_decay=0.0)), rate, 0.9, 0.0)
    loader = Loader(data.train, batch_size, device, shuffle=True, seed=seed)
    mean = torch.from_numpy(data.mean).to(device)
    window = max(1, loader.batches // POINTS)
    epochs: list[float] = []
    errors: list[float] = []
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    batches = iter(loader)
    try:
        for step in range(1, int(max_epochs * loader.batches) + 1):
            batch = next(batches)
            images = centre_crop(batch.images, mean, plan.image_size)[:, 0]
            logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, batch.labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            wrong += (logits.argmax(1) != batch.labels).sum()
            progress()
            if step % window == 0:
                if not torch.isfinite(loss):
                    break
                epochs.append(step / loader.batches)
                errors.append(100 * int(wrong) / (window * batch_size))
                wrong.zero_()
                if errors[-1] <= TARGET:
                    break
    finally:
        batches.close()
    return Curve(activation, rate, np.array(epochs), np.array(errors), crossing(epochs, errors))


def fastest(
    data: ImageData,
    activation: Activation,
    rates: Sequence[float],
    *,
    max_epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> Curve:
    """:func:`train` at each rate; the training that came to 25 % first, or came nearest to it.

    A training that takes longer than the best one so far is not finished.
    """
    best: Curve | None = None
    for rate in rates:
        limit = float(max_epochs) if best is None or best.reached is None else float(best.epochs[-1])
        curve = train(
            data,
            activation,
            rate,
            max_epochs=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            progress=progress,
        )
        print(f"{activation} at rate {rate:g}: {curve.summary()}", flush=True)
        if best is None or _order(curve) < _order(best):
            best = curve
    assert best is not None
    return best


def _order(curve: Curve) -> tuple[float, float]:
    """Smaller is faster."""
    reached = np.inf if curve.reached is None else curve.reached
    return reached, float(curve.errors.min()) if len(curve.errors) else np.inf
