"""Table and picture of ``python -m net.ablations``, made from its results and nothing else."""

import functools
import io
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

matplotlib.use("Agg")
from matplotlib.figure import Figure

from .ablation_cases import ABLATIONS, BASELINE, Ablation
from .errors import DataError
from .files import atomic_write

#: Share of repetitions whose interval holds the true difference.
CONFIDENCE = 0.95
#: Points of change that the picture draws to scale; what is larger is drawn by its logarithm.
LINEAR = 10
HEADER = ("", "seeds", "top-1 error %", "change, points", "95 % interval", "", "paper", "program of 2012")


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings and the rows of a results file; a last line that was cut short is left out.

    Raises:
        DataError: it is none.
    """
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    objects = all(isinstance(line, dict) for line in lines)
    if not lines or not objects or "settings" not in lines[0] or not all("ablation" in row for row in lines[1:]):
        raise DataError(f"{path} holds no results of net.ablations")
    return lines[0]["settings"], lines[1:]


@functools.cache
def student_t(degrees: int) -> float:
    """What Student's t with so many degrees of freedom stays below in absolute value with probability CONFIDENCE.

    With ``t = sqrt(degrees) * tan(angle)`` the density of the angle is proportional to ``cos(angle)**(degrees - 1)``.
    """
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angles) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(float(np.interp(CONFIDENCE, below / below[-1], angles)))


@dataclass(frozen=True)
class Change:
    """Change of an error over the seeds that both networks have, in points, and its paired-t interval."""

    seeds: int
    mean: float
    half_width: float

    @property
    def verdict(self) -> str:
        """Whether the interval holds zero."""
        if abs(self.mean) <= self.half_width:
            return "inside the interval"
        return "worse" if self.mean > 0 else "better"


def paired(errors: Sequence[float], baseline: Sequence[float]) -> Change | None:
    """The change from ``baseline`` to ``errors``, seed by seed; None of fewer than two seeds."""
    differences = np.asarray(errors) - np.asarray(baseline)
    count = len(differences)
    if count < 2:
        return None
    width = student_t(count - 1) * float(differences.std(ddof=1)) / math.sqrt(count)
    return Change(count, float(differences.mean()), width)


def epochs(settings: dict[str, Any]) -> str:
    count = settings["epochs"]
    return f"{count} epoch{'s' if count > 1 else ''}"


def _errors(rows: list[dict[str, Any]], name: str) -> dict[int, float]:
    """Error of each seed that was trained to the end."""
    return {
        row["seed"]: row["top1_error_percent"]
        for row in rows
        if row["ablation"] == name and "top1_error_percent" in row
    }


def change_of(rows: list[dict[str, Any]], name: str) -> Change | None:
    """What the ablation ``name`` changes, over the seeds that it and the whole network have; None of fewer than two."""
    errors, whole = _errors(rows, name), _errors(rows, BASELINE)
    seeds = sorted(errors.keys() & whole.keys())
    return paired([errors[seed] for seed in seeds], [whole[seed] for seed in seeds])


def _line(rows: list[dict[str, Any]], ablation: Ablation) -> list[str] | None:
    """An ablation's line of the table; None where nothing was asked of it."""
    mine = [row for row in rows if row["ablation"] == ablation.name]
    if not mine:
        return None
    published = [ablation.paper, ablation.program]
    if "not_shown" in mine[-1]:
        return [ablation.title, "", "", "", "", mine[-1]["not_shown"], *published]
    errors, change = _errors(rows, ablation.name), change_of(rows, ablation.name)
    diverged = sum("diverged" in row for row in mine)
    remark = f"{diverged} diverged" if diverged else ""
    mean = f"{np.mean(list(errors.values())):.2f}" if errors else ""
    if change is None:
        return [ablation.title, str(len(errors)), mean, "", "", remark or "fewer than two seeds", *published]
    interval = f"{change.mean - change.half_width:+.2f} to {change.mean + change.half_width:+.2f}"
    remark = "; ".join(filter(None, (change.verdict, remark)))
    return [ablation.title, str(change.seeds), mean, f"{change.mean:+.2f}", interval, remark, *published]


def table(path: Path) -> str:
    """The results as Markdown, and what they were measured with."""
    settings, rows = read(path)
    whole = _errors(rows, BASELINE)
    mean = f"{np.mean(list(whole.values())):.2f}" if whole else ""
    lines = [["the whole network", str(len(whole)), mean, *[""] * 5]]
    lines += [line for ablation in ABLATIONS if (line := _line(rows, ablation)) is not None]
    architecture = "".join(f" {key}={value}" for key, value in settings.get("architecture", {}).items())
    size = f", images of {settings['image_size']}x{settings['image_size']}" if "image_size" in settings else ""
    trained = [row for row in rows if "device" in row]
    machines = sorted({(row["device"], row["torch"], row["commit"], row["date"]) for row in trained})
    notes = [
        f"Network {settings['network']}{architecture}{size}, recipe {settings['recipe']}, {epochs(settings)} "
        f"in batches of {settings['batch_size']}, on {settings['data']}: {settings['train_images']:,} training and "
        f"{settings['val_images']:,} validation images. Errors are those of the central crop after the last update.",
        "A change compares trainings of the same seed (weights, order, crops) and is averaged over the seeds. Its "
        "interval is Student's t of these paired differences: it covers the seeds, not the choice of validation "
        "images, and one interval in twenty misses the truth. A change inside the interval is none that this data "
        "shows.",
        "The paper's and its 2012 program's columns are changes of top-1 / top-5 error on ILSVRC.",
        *(
            f"{device}, torch {torch}, commit {commit or 'unknown'}, {date}: `{path.name}`"
            for device, torch, commit, date in machines
        ),
    ]
    text = "\n\n".join(textwrap.fill(note, 140, break_long_words=False, break_on_hyphens=False) for note in notes)
    return f"{tabulate(lines, HEADER, 'github', disable_numparse=True)}\n\n{text}\n"


def picture(path: Path) -> bytes:
    """The changes with their intervals, as a PNG."""
    settings, rows = read(path)
    changes = [(item.title, change) for item in ABLATIONS if (change := change_of(rows, item.name)) is not None]
    figure = Figure(figsize=(8, 0.8 + 0.32 * max(1, len(changes))), layout="constrained")
    axes = figure.subplots()
    places: NDArray[np.int64] = np.arange(len(changes))[::-1]
    axes.axvline(0, color="black", linewidth=0.8)
    axes.errorbar(
        [change.mean for _, change in changes],
        places,
        xerr=[change.half_width for _, change in changes],
        fmt="o",
        capsize=3,
    )
    axes.set_yticks(places, [title for title, _ in changes])
    axes.set_xlabel(
        f"change of top-1 validation error in points, 95 % interval\n({settings['data']}; logarithmic beyond {LINEAR})"
    )
    # A network that has not begun to learn is not to hide the others.
    axes.set_xscale("symlog", linthresh=LINEAR)
    axes.xaxis.set_major_formatter("{x:+g}")
    axes.grid(axis="x", alpha=0.3)
    content = io.BytesIO()
    # No date and no version: the same results make the same file.
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    return content.getvalue()


def write(records: Sequence[Path], folder: Path) -> list[Path]:
    """Write ``accuracy.md`` and a picture beside it for each results file; returns the files."""
    text = "# Accuracy without each part\n\nMade from the results of `python -m net.ablations`.\n"
    written = []
    for record in records:
        name = "accuracy.png" if len(records) == 1 else f"accuracy-{record.stem}.png"
        settings, _ = read(record)
        text += f"\n## {settings['data']}, {epochs(settings)} ({record.stem})\n\n{table(record)}\n"
        text += f"![changes]({name})\n"
        with atomic_write(folder / name) as file:
            file.write(picture(record))
        written.append(folder / name)
    if not records:
        text += "\nNot measured.\n"
    with atomic_write(folder / "accuracy.md") as file:
        file.write(text.encode())
    return [folder / "accuracy.md", *written]
