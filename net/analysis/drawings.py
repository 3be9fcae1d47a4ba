"""Plots of the paper's figures: for print, on white, with text of at least 8 points."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from ..common.files import atomic_write
from ..common.printing import printable

# Class names such as a$b^$ are shown literally.
matplotlib.rcParams["text.parse_math"] = False

SMALL, TITLE = 8, 9
RIGHT, OTHER = "#e8686a", "#a9c8e8"
#: Characters that fit on a line under an image.
_LETTERS = 14


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    with matplotlib.rc_context({"font.size": SMALL}):
        figure.savefig(picture, format="png", dpi=120)
    with Image.open(picture) as drawn, atomic_write(path) as file:
        # 256 colours are enough, and take a third of the bytes.
        drawn.convert("RGB").quantize(256).save(file, "PNG", optimize=True)


def _words(name: str) -> str:
    """A class name on one line, with non-printable characters escaped."""
    return printable(name).replace("_", " ")


def _wrapped(name: str) -> str:
    """A class name wrapped to fit under an image."""
    lines = textwrap.wrap(_words(name), _LETTERS) or [name]
    return "\n".join([*lines[:2], *([textwrap.shorten(" ".join(lines[2:]), _LETTERS)] if lines[2:] else [])])


def _picture(axes: Axes, image: NDArray[Any]) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def filters(
    path: Path, title: str, towers: Sequence[NDArray[np.float32]], captions: Sequence[str], across: int = 1
) -> None:
    """Figure 3: first-layer kernels, a block for each tower, each kernel scaled by its largest weight.

    Args:
        path: the PNG file.
        title: above the figure.
        towers: kernels of each tower, float32 ``[kernels, 3, rows, columns]``.
        captions: above each tower's block.
        across: blocks side by side.
    """
    columns = 16 if len(towers[0]) >= 32 else 8
    size = towers[0].shape[2] + 1
    rows = -(-len(towers[0]) // columns)
    down = len(towers) // across
    height = down * (6.6 * rows / columns + 0.35) + 0.4
    figure = _figure(6.6 * across, height)
    figure.suptitle(title, fontsize=TITLE)
    blocks = figure.subplots(down, across, squeeze=False).flat
    for axes, kernels, caption in zip(blocks, towers, captions, strict=True):
        sheet = np.ones((rows * size - 1, columns * size - 1, 3), np.float32)
        for number, kernel in enumerate(kernels.transpose(0, 2, 3, 1)):
            top, left = size * (number // columns), size * (number % columns)
            scaled = 0.5 + kernel / max(2 * float(np.abs(kernel).max()), 1e-12)
            sheet[top : top + size - 1, left : left + size - 1] = scaled
        axes.imshow(sheet, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(caption, fontsize=SMALL)
    _save(figure, path)


def predictions(
    path: Path,
    title: str,
    images: NDArray[np.uint8],
    truth: Sequence[str],
    likely: Sequence[Sequence[tuple[str, float]]],
) -> None:
    """Figure 4, left: images, their labels, and bars for the most probable labels, the true one in red.

    Args:
        path: the PNG file.
        title: above the figure.
        images: uint8 ``[N, rows, columns, 3]``.
        truth: the name of each image's class.
        likely: for each image, (class, probability) pairs, most probable first.
    """
    columns = 4
    rows = -(-len(images) // columns)
    figure = _figure(7.0, 2.9 * rows + 0.4)
    figure.suptitle(title, fontsize=TITLE)
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[1.3, 1] * rows)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (image, name, bars) in enumerate(zip(images, truth, likely, strict=True)):
        row, column = divmod(number, columns)
        above, below = grid[2 * row, column], grid[2 * row + 1, column]
        above.set_axis_on()
        _picture(above, image)
        above.set_title(_words(name)[:26], fontsize=SMALL, fontweight="bold")
        below.set_axis_on()
        places = range(len(bars))
        colours = [RIGHT if label == name else OTHER for label, _ in bars]
        below.barh(places, [value for _, value in bars], color=colours, height=0.85)
        for place, (label, _) in zip(places, bars, strict=True):
            below.text(0.02, place, _words(label)[:26], fontsize=SMALL, va="center")
        below.set(xlim=(0, 1), ylim=(len(bars) - 0.5, -0.5), xticks=[], yticks=[])
    _save(figure, path)


def neighbours(
    path: Path,
    title: str,
    queries: NDArray[np.uint8],
    truth: Sequence[str],
    found: NDArray[np.uint8],
    names: Sequence[Sequence[str]],
) -> None:
    """Figure 4, right: each row a test image and the training images nearest to it; other classes' names in red.

    Args:
        path: the PNG file.
        title: above the figure.
        queries: uint8 ``[N, rows, columns, 3]``.
        truth: the name of each query's class.
        found: uint8 ``[N, neighbours, rows, columns, 3]``.
        names: the names of their classes.
    """
    count = found.shape[1]
    figure = _figure(7.0, 1.42 * len(queries) + 0.5)
    figure.suptitle(title, fontsize=TITLE)
    # An empty column separates the test images.
    grid = figure.subplots(len(queries), count + 2, squeeze=False, width_ratios=[1, 0.15, *[1] * count])
    for row, query, name, images, others in zip(grid, queries, truth, found, names, strict=True):
        row[1].set_axis_off()
        for axes, image, label in zip((row[0], *row[2:]), (query, *images), (name, *others), strict=True):
            _picture(axes, image)
            axes.set_xlabel(_wrapped(label), fontsize=SMALL, color="black" if label == name else "#c00000")
    _save(figure, path)


def activations(
    path: Path,
    title: str,
    curves: Sequence[tuple[str, Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]]],
    target: float,
) -> None:
    """Figure 1: training error over epochs.

    Args:
        path: the PNG file.
        title: above the figure.
        curves: of each network its label and, for each seed, (epochs, training error in percent). The first network is
            drawn solid, the second dashed.
        target: the training error in percent to reach.
    """
    figure = _figure(5.2, 3.6)
    axes = figure.subplots()
    for (label, seeds), style in zip(curves, ("-", "--"), strict=True):
        for number, (epochs, errors) in enumerate(seeds):
            # One legend entry for all seeds.
            axes.plot(epochs, errors, style, color="black", label=label if number == 0 else None)
    axes.axhline(target, color="gray", linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("epochs", fontsize=SMALL)
    axes.set_ylabel("training error (%)", fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)
    axes.legend(fontsize=SMALL)
    axes.set_title(title, fontsize=TITLE)
    _save(figure, path)
