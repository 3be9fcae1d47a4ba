"""Figure 1: epochs until the 4-layer network reaches 25 % training error, with ReLU and with tanh."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from ..readers.metrics import read_curves
from ..training.config import RecipeConfig
from ..training.recipe import PaperSGD, parameter_groups

Activation = Literal["relu", "tanh"]

#: Training error in percent at which the paper compares them.
TARGET = 25.0
#: Points of the curve per epoch.
POINTS = 4


@dataclass(frozen=True)
class Curve:
    """Running training error over epochs.

    ``errors[i]``, in percent, is the mean over a window of updates that ends at ``epochs[i]``; ``reached`` is the epoch
    at which the curve, linearly interpolated, crosses the target, None if it does not.
    """

    activation: Activation
    rate: float
    seed: int
    epochs: NDArray[np.float64]
    errors: NDArray[np.float64]
    reached: float | None

    def summary(self) -> str:
        """The outcome, for a log."""
        if self.reached is not None:
            return f"{TARGET:g} % after {self.reached:.2f} epochs"
        if not len(self.errors):
            return "stopped"
        return f"{self.errors[-1]:.1f} % after {self.epochs[-1]:.2f} epochs, stopped"


def crossing(epochs: Sequence[float], errors: Sequence[float]) -> float | None:
    """Where the linearly interpolated curve first reaches ``TARGET``; None if it does not."""
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
        data: provides the training images.
        activation: of the network.
        rate: constant learning rate.
        max_epochs: epochs after which training stops.
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
    return Curve(activation, rate, seed, np.array(epochs), np.array(errors), crossing(epochs, errors))


class Results:
    """The finished curves of a data set and batch size, in a JSON Lines file that any number of data sets share.

    Args:
        path: the file; created with the first curve.
        data: provides the training images.
        batch_size: of the trainings.
    """

    def __init__(self, path: Path, data: ImageData, batch_size: int) -> None:
        self.path = path
        self._settings = {"data": data.name, "train_images": len(data.train), "batch_size": batch_size}
        self._rows = read_curves(path)

    def find(self, activation: Activation, rate: float, seed: int, max_epochs: float) -> Curve | None:
        """The newest such curve that reached the target or was given at least ``max_epochs``; None if there is none."""
        for row in reversed(self._rows):
            if (row["activation"], row["rate"], row["seed"]) != (activation, rate, seed):
                continue
            if any(row.get(name) != value for name, value in self._settings.items()):
                continue
            reached = crossing(row["epochs"], row["errors"])
            if reached is not None or row["max_epochs"] >= max_epochs:
                return Curve(activation, rate, seed, np.array(row["epochs"]), np.array(row["errors"]), reached)
        return None

    def add(self, curve: Curve, max_epochs: float) -> None:
        """Append a curve of a training of at most ``max_epochs``."""
        row: dict[str, Any] = {
            **self._settings,
            "activation": curve.activation,
            "rate": curve.rate,
            "seed": curve.seed,
            "max_epochs": max_epochs,
            "epochs_to_target": curve.reached,
            "epochs": curve.epochs.round(4).tolist(),
            "errors": curve.errors.round(3).tolist(),
            "torch": torch.__version__,
        }
        self._rows.append(row)
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    # An interrupted write left a part of a line.
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")


def outcome(relu: Sequence[Curve], tanh: Sequence[Curve], max_epochs: float) -> str:
    """The paper's comparison in one line. The curves are of the same seeds, in the same order."""
    times = [curve.reached for curve in relu]
    if None in times:
        return f"ReLU did not reach {TARGET:g} % in {max_epochs:g} epochs: no ratio"
    faster = [time for time in times if time is not None]
    slower = [max_epochs if curve.reached is None else curve.reached for curve in tanh]
    ratios = [f"{tanh_time / relu_time:.1f}" for tanh_time, relu_time in zip(slower, faster, strict=True)]
    low, high = min(ratios, key=float), max(ratios, key=float)
    if any(curve.reached is None for curve in tanh):
        ratio = f"more than {low}"
    else:
        ratio = low if low == high else f"{low} to {high}"
    slow = ", ".join(f"more than {max_epochs:g}" if curve.reached is None else f"{curve.reached:.2f}" for curve in tanh)
    fast = ", ".join(f"{time:.2f}" for time in faster)
    return f"to {TARGET:g} %: ReLU {fast} epochs; tanh {slow}; ratio {ratio} (paper: 6)"


def fastest(
    data: ImageData,
    activation: Activation,
    rates: Sequence[float],
    *,
    max_epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    results: Results,
    progress: Callable[[], None] = lambda: None,
) -> Curve:
    """Call :func:`train` at each rate; returns the curve that reached 25 % first, or came closest to it.

    Runs are stopped once they take longer than the best one so far. Those in ``results`` are not repeated, and new ones
    are added to it.
    """
    best: Curve | None = None
    for rate in rates:
        limit = float(max_epochs) if best is None or best.reached is None else float(best.epochs[-1])
        curve = results.find(activation, rate, seed, limit)
        source = f" (from {results.path})" if curve is not None else ""
        if curve is None:
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
            results.add(curve, limit)
        print(f"{activation} at learning rate {rate:g}, seed {seed}: {curve.summary()}{source}", flush=True)
        if best is None or _order(curve) < _order(best):
            best = curve
    assert best is not None
    return best


def _order(curve: Curve) -> tuple[float, float]:
    """Sort key: the fastest first."""
    reached = np.inf if curve.reached is None else curve.reached
    return reached, float(curve.errors.min()) if len(curve.errors) else np.inf
