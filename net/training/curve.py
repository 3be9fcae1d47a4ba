"""Plot of a run: loss and error over the updates."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from ..common.files import atomic_write
from .config import TrainConfig
from .runs import read_metrics


def figure(rows: Sequence[dict[str, Any]], title: str, judged_by: str) -> Figure:
    """Loss, left, and top-1 error, right, over the updates; a dotted line where the learning rate drops.

    Args:
        rows: of ``metrics.jsonl``, of kind ``train`` and ``eval``.
        title: of both plots.
        judged_by: the images that the rows of kind ``eval`` refer to.
    """
    train = [row for row in rows if row["kind"] == "train"]
    evaluated = [row for row in rows if row["kind"] == "eval"]
    falls = [row["step"] for before, row in itertools.pairwise(train) if row["lr"] < before["lr"]]
    result = Figure(figsize=(9, 3.8), layout="constrained")
    result.suptitle(title)
    loss, error = result.subplots(1, 2)
    loss.plot([row["step"] for row in train], [row["loss"] for row in train], label="training")
    loss.plot([row["step"] for row in evaluated], [row["loss"] for row in evaluated], label=judged_by)
    loss.set(xlabel="update", ylabel="loss", yscale="log")
    error.plot(
        [row["step"] for row in train], [row["top1_error_percent"] for row in train], label="training, while learning"
    )
    error.plot([row["step"] for row in evaluated], [row["top1_error_percent"] for row in evaluated], label=judged_by)
    error.set(xlabel="update", ylabel="top-1 error (%)")
    error.set_ylim(bottom=0)
    for axes in (loss, error):
        for number, step in enumerate(falls):
            axes.axvline(step, color="gray", linestyle=":", label="" if number else "learning rate drops")
        axes.grid(alpha=0.3)
        axes.legend()
    return result


def draw(folder: Path, config: TrainConfig, data: str) -> Path:
    """Draw ``curve.png`` from the metrics of the run in ``folder``.

    Args:
        folder: the run folder.
        config: the run's flags.
        data: the name of its data set.
    """
    title = f"{config.network} on {data}"
    judged_by = "held-out images" if config.hold_out else "validation"
    picture = io.BytesIO()
    figure(read_metrics(folder), title, judged_by).savefig(picture, format="png", dpi=130)
    with atomic_write(folder / "curve.png") as file:
        file.write(picture.getvalue())
    return folder / "curve.png"
