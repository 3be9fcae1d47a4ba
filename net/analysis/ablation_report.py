"""Table and figure of ``python -m net.ablations``, generated only from its results.

The command writes them next to its results. ``python -m bench.report`` includes the same table and figure in
``reports/accuracy.md`` and in ``reports/index.html``.
"""

import functools
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from tabulate import tabulate

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..common.files import atomic_write
from ..readers.metrics import read_results
from .ablation_cases import ABLATIONS, BASELINE, Ablation

#: Confidence level of the intervals.
CONFIDENCE = 0.95
#: Fewest seeds for an interval: with two, Student's t is 12.7.
FEWEST = 3
#: Limit of the figure's axis in points of change; larger changes are written at its edge.
REACH = 12.0
HEADER = (
    *("part", "seeds", "top-1 error %", "95 % interval", "change, points", "95 % interval of the change"),
    *("verdict", "paper", "program of 2012"),
)
#: Columns without numbers.
WORDS = ("part", "verdict", "paper", "program of 2012")


class Report(NamedTuple):
    """A table of strings, with empty cells for missing values; ``source`` is the results file's name."""

    title: str
    headers: tuple[str, ...]
    rows: list[list[str]]
    notes: list[str]
    source: str


@functools.cache
def student_t(degrees: int) -> float:
    """The two-sided critical value of Student's t at the level CONFIDENCE.

    With ``t = sqrt(degrees) * tan(angle)`` the density of the angle is proportional to ``cos(angle)**(degrees - 1)``.
    """
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angles) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(float(np.interp(CONFIDENCE, below / below[-1], angles)))


@dataclass(frozen=True)
class Change:
    """Change of an error in percentage points, averaged over the seeds that both networks have.

    ``interval`` is the Student's t interval of the paired differences, clipped where the error would leave 0 to 100 %;
    None with fewer seeds than :data:`FEWEST`.
    """

    seeds: int
    mean: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """Whether the interval contains zero, in words."""
        if self.interval is None:
            return "fewer than three seeds"
        low, high = self.interval
        if low <= 0 <= high:
            return "no clear difference"
        return "worse" if low > 0 else "better"


def paired(errors: Sequence[float], baseline: Sequence[float]) -> Change | None:
    """The change from ``baseline`` to ``errors``, both in percent and by seed; None without any seed."""
    differences, whole = np.asarray(errors) - np.asarray(baseline), np.asarray(baseline)
    count = len(differences)
    if not count:
        return None
    mean, interval = float(differences.mean()), None
    if count >= FEWEST:
        width = student_t(count - 1) * float(differences.std(ddof=1)) / math.sqrt(count)
        interval = max(mean - width, -float(whole.mean())), min(mean + width, 100 - float(whole.mean()))
    return Change(count, mean, interval)


def error_interval(errors: Sequence[float], images: int) -> tuple[float, float] | None:
    """The interval of an error in percent over seeds: Student's t of its log odds, which stays within 0 to 100 %.

    Half an image is added to the wrong and to the right ones of ``images``, so that the log odds are finite. None with
    fewer seeds than :data:`FEWEST`.
    """
    if len(errors) < FEWEST:
        return None
    wrong = np.asarray(errors) / 100 * images
    odds = np.log((wrong + 0.5) / (images - wrong + 0.5))
    width = student_t(len(odds) - 1) * odds.std(ddof=1) / math.sqrt(len(odds))
    low, high = (100 / (1 + math.exp(-end)) for end in (odds.mean() - width, odds.mean() + width))
    return low, high


def epochs(settings: dict[str, Any]) -> str:
    count = settings["epochs"]
    return f"{count} epoch{'s' if count > 1 else ''}"


def subject(settings: dict[str, Any]) -> str:
    """What was trained: network, data and epochs."""
    return f"{settings['network']} on {settings['data']}, {epochs(settings)}"


def _errors(rows: list[dict[str, Any]], name: str) -> dict[int, float]:
    """The error of each seed that finished training."""
    return {
        row["seed"]: row["top1_error_percent"]
        for row in rows
        if row["ablation"] == name and "top1_error_percent" in row
    }


def change_of(rows: list[dict[str, Any]], name: str) -> Change | None:
    """The change by the ablation ``name``, over the seeds that it and the baseline have; None without any."""
    errors, whole = _errors(rows, name), _errors(rows, BASELINE)
    seeds = sorted(errors.keys() & whole.keys())
    return paired([errors[seed] for seed in seeds], [whole[seed] for seed in seeds])


def _between(interval: tuple[float, float] | None, how: str) -> str:
    return f"{interval[0]:{how}} to {interval[1]:{how}}" if interval is not None else ""


def _error(rows: list[dict[str, Any]], name: str, images: int) -> list[str]:
    """Seeds, mean error and its interval."""
    errors = list(_errors(rows, name).values())
    mean = f"{np.mean(errors):.2f}" if errors else ""
    return [str(len(errors)), mean, _between(error_interval(errors, images), ".2f")]


def _line(rows: list[dict[str, Any]], ablation: Ablation, images: int) -> list[str] | None:
    """An ablation's row of the table; None if it was not run."""
    mine = [row for row in rows if row["ablation"] == ablation.name]
    if not mine:
        return None
    published = [ablation.paper, ablation.program]
    if "not_shown" in mine[-1]:
        return [ablation.title, "", "", "", "", "", mine[-1]["not_shown"], *published]
    change = change_of(rows, ablation.name)
    diverged = sum("diverged" in row for row in mine)
    remarks = [change.verdict if change else "", f"{diverged} diverged" if diverged else ""]
    mean, interval = (f"{change.mean:+.2f}", _between(change.interval, "+.2f")) if change else ("", "")
    remark = "; ".join(filter(None, remarks))
    return [ablation.title, *_error(rows, ablation.name, images), mean, interval, remark, *published]


def _judged(settings: dict[str, Any]) -> int:
    """The number of images that errors refer to: the held-out set if there is one, else the validation images."""
    return int(settings.get("hold_out") or settings["val_images"])


def report(path: Path) -> Report:
    """The results as a table, with notes on how they were measured.

    Raises:
        DataError: ``path`` holds no results.
    """
    settings, rows = read_results(path)
    images, held_out = _judged(settings), settings.get("hold_out", 0)
    judged = f"{images:,} held-out images" if held_out else f"{images:,} validation images"
    lines = [["the whole network", *_error(rows, BASELINE, images), *[""] * 5]]
    lines += [line for ablation in ABLATIONS if (line := _line(rows, ablation, images)) is not None]
    architecture = "".join(f" {key}={value}" for key, value in settings.get("architecture", {}).items())
    size = f", images of {settings['image_size']}x{settings['image_size']}" if "image_size" in settings else ""
    trained = [row for row in rows if "device" in row]
    machines = sorted({(row["device"], row["torch"], row["commit"], row["date"]) for row in trained})
    notes = [
        f"Network {settings['network']}{architecture}{size}, recipe {settings['recipe']}, {epochs(settings)} "
        f"in batches of {settings['batch_size']}, on {settings['data']}: "
        f"{settings['train_images'] - held_out:,} training images and {judged}. "
        "Errors are for the central crop after the last step.",
        "The interval of an error is Student's t of its log odds over the seeds. A change compares runs with the same "
        "seed (weights, order, crops); its interval is Student's t of these paired differences, clipped where the "
        "error would leave 0 to 100 %. Both intervals cover the choice of seed but not the choice of validation "
        "images, and one interval in twenty misses the true value. With fewer than three seeds there is no interval. "
        "No clear difference: the interval contains zero.",
        "The columns of the paper and of its 2012 program are changes in top-1 / top-5 error on ILSVRC.",
        *(
            f"{device}, torch {torch}, commit {commit or 'unknown'}, {date}: `{path.name}`"
            for device, torch, commit, date in machines
        ),
    ]
    return Report(subject(settings), HEADER, lines, notes, path.name)


def table(path: Path) -> str:
    """The report's table and notes as Markdown."""
    found = report(path)
    notes = "\n\n".join(
        textwrap.fill(note, 140, break_long_words=False, break_on_hyphens=False) for note in found.notes
    )
    return f"{tabulate(found.rows, found.headers, 'github', disable_numparse=True)}\n\n{notes}\n"


def _shown(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Name and title of the networks in the figure: all that have an error."""
    named = [(BASELINE, "the whole network"), *((item.name, item.title) for item in ABLATIONS)]
    return [(name, title) for name, title in named if _errors(rows, name)]


def alt(path: Path) -> str:
    """The figure's alternative text."""
    settings, rows = read_results(path)
    whole = list(_errors(rows, BASELINE).values())
    verdicts: dict[str, list[str]] = {}
    for name, title in _shown(rows):
        change = change_of(rows, name)
        if name != BASELINE and change is not None:
            verdicts.setdefault(change.verdict, []).append(f"{title} {change.mean:+.1f}")
    mean = f"The whole network's is {np.mean(whole):.1f} %. " if whole else ""
    changes = ". ".join(f"{verdict.capitalize()}: {', '.join(titles)}" for verdict, titles in verdicts.items())
    return (
        f"Two panels with a line for each network, {subject(settings)}. Left: the top-1 error of "
        f"every seed, their mean and its interval, from 0 to 100 %. {mean}Right: the change from the whole network in "
        f"points, with its paired interval. {changes}."
    )


def draw(path: Path) -> Figure:
    """Errors and changes with their intervals."""
    settings, rows = read_results(path)
    shown = _shown(rows)
    figure = Figure(figsize=(10, 1.5 + 0.32 * max(1, len(shown))), layout="constrained")
    figure.suptitle(f"Top-1 validation error without each part: {subject(settings)}")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (name, _) in enumerate(shown):
        errors = list(_errors(rows, name).values())
        interval = error_interval(errors, _judged(settings))
        if interval is not None:
            left.plot(interval, [place, place], color="#0072B2", linewidth=2, solid_capstyle="butt")
        left.plot(errors, [place] * len(errors), "o", color="#56B4E9", markersize=4)
        left.plot(float(np.mean(errors)), place, "|", color="black", markersize=12, markeredgewidth=2)
        change = change_of(rows, name)
        if name != BASELINE and change is not None:
            _draw_change(right, change, place)
    left.set_yticks(range(len(shown)), [title for _, title in shown])
    left.set_ylim(max(1, len(shown)) - 0.5, -0.5)
    left.set_xlim(0, 100)
    left.set_title("error")
    left.set_xlabel("%; dots: seeds, mark: mean, line: 95 % interval")
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlim(-REACH, REACH)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    right.set_title("change from the whole network")
    right.set_xlabel("points; line: 95 % interval of the paired differences")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    return figure


def picture(path: Path) -> bytes:
    """The figure as a PNG."""
    content = io.BytesIO()
    # No date and no version, so that the file is reproducible.
    draw(path).savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()


def _draw_change(axes: Axes, change: Change, place: int) -> None:
    """Draw a change and its interval, or write them at the edge of the axis if the change lies beyond it."""
    if abs(change.mean) < REACH:
        if change.interval is not None:
            axes.plot(change.interval, [place, place], color="#0072B2", linewidth=2, solid_capstyle="butt")
        axes.plot(change.mean, place, "o", color="black", markersize=5)
        return
    right = change.mean > 0
    text = f"{change.mean:+.1f}" + (
        f" ({_between(change.interval, '+.1f')})" if change.interval is not None else " (no interval)"
    )
    edge = REACH if right else -REACH
    axes.annotate(
        text,
        (edge, place),
        (-16 if right else 16, 0),
        textcoords="offset points",
        ha="right" if right else "left",
        va="center",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        arrowprops={"arrowstyle": "->"},
    )


def write(path: Path, folder: Path) -> list[Path]:
    """Write ``accuracy.md`` and ``accuracy.png`` of a results file into ``folder``; returns the paths."""
    page, figure = folder / "accuracy.md", folder / "accuracy.png"
    text = f"# Accuracy without each part: {report(path).title}\n\n{table(path)}\n![{alt(path)}]({figure.name})\n"
    for target, content in ((page, text.encode()), (figure, picture(path))):
        with atomic_write(target) as file:
            file.write(content)
    return [page, figure]
