"""Plot of a run: loss and error over the updates."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from ..common.files import atomic_write
from .config import TrainConfig
from .runs import read_metrics


class _Decimal(LogFormatter):
    """Labels the same ticks as LogFormatter, but as 0.7 instead of 7e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


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
    result = Figure(figsize=(9, 3.8))
    result.suptitle(title)
    # Fixed margins that fit every label: a constrained layout doubles the time that drawing takes.
    margins = {"left": 0.095, "right": 0.985, "bottom": 0.13, "top": 0.9, "wspace": 0.2}
    loss, error = result.subplots(1, 2, gridspec_kw=margins)
    loss.plot([row["step"] for row in train], [row["loss"] for row in train], label="training")
    loss.plot([row["step"] for row in evaluated], [row["loss"] for row in evaluated], label=judged_by)
    loss.set(xlabel="update", ylabel="loss", yscale="log")
    loss.yaxis.set_major_formatter(_Decimal())
    loss.yaxis.set_minor_formatter(_Decimal())
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
