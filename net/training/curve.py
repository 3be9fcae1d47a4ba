"""The picture of a run: loss and error over the updates."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from ..common.files import atomic_write
from .runs import read_metrics


def draw(folder: Path) -> Path:
    """Draw ``curve.png`` from the run's metrics."""
    rows = read_metrics(folder)
    train = [row for row in rows if row["kind"] == "train"]
    evaluated = [row for row in rows if row["kind"] == "eval"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, error = figure.subplots(1, 2)
    loss.plot([row["step"] for row in train], [row["loss"] for row in train], label="training")
    loss.plot([row["step"] for row in evaluated], [row["loss"] for row in evaluated], label="validation")
    loss.set(xlabel="update", ylabel="loss", yscale="log")
    error.plot(
        [row["step"] for row in train], [row["top1_error_percent"] for row in train], label="training, while learning"
    )
    error.plot([row["step"] for row in evaluated], [row["top1_error_percent"] for row in evaluated], label="validation")
    error.set(xlabel="update", ylabel="top-1 error (%)")
    error.set_ylim(bottom=0)
    for axes in (loss, error):
        axes.grid(alpha=0.3)
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    with atomic_write(folder / "curve.png") as file:
        file.write(picture.getvalue())
    return folder / "curve.png"
