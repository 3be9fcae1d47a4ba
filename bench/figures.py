"""Figures from records, a PNG for each machine and kind; what has no rows has no figure."""

import math
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from .records import Row
from .tables import (
    IMPLEMENTATIONS,
    MODES,
    PARAMETER_BYTES,
    Machine,
    fastest,
    layer_memory,
    layers_of,
    machines_of,
    most,
    number,
    rank,
    unit_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

#: What each implementation has in every figure: PyTorch's own are gray. Okabe and Ito's colours, which colour-blind
#: readers tell apart too.
COLOURS = {
    "aten": "#8C8C8C",
    "compiled": "#BDBDBD",
    "reference": "#E69F00",
    "compiled reference": "#CC79A7",
    "inductor": "#56B4E9",
    "traced": "#0072B2",
    "triton": "#009E73",
}
OTHER = "#D55E00"
LIMIT = "#B00020"
#: Points, and dots to the inch.
SIZE = 8
DOTS = 100
#: Bars or layers of a figure that can still be read.
MOST_BARS = 24


class Figure(NamedTuple):
    """A file below ``reports/``, the page and machine it belongs to, what it shows in words, and what draws it."""

    file: str
    page: str
    machine: Machine
    about: str
    draw: Callable[[], "Canvas"]


def figures(rows: Sequence[Row]) -> list[Figure]:
    """What can be drawn of the rows of :func:`bench.tables.measured`."""
    found = []
    for machine in machines_of(rows):
        its = [row for row in rows if row["on"] == machine]
        for kind, page, about, select, draw in KINDS:
            chosen = select(its)
            if chosen:
                slug = re.sub(r"[^a-z0-9.]+", "-", str(machine).lower()).strip("-")
                file = f"figures/{kind}-{slug}.png"
                found.append(Figure(file, page, machine, about, lambda d=draw, c=chosen, m=machine: d(c, m)))  # type: ignore[misc]
    return found


def png(figure: Figure) -> bytes:
    """The figure as a file's bytes, the same ones every time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("font", size=SIZE)
        matplotlib.rc("axes", titlesize=SIZE + 1)
        matplotlib.rc("axes.spines", top=False, right=False)
        canvas = figure.draw()
        drawing = BytesIO()
        canvas.savefig(drawing, format="png", dpi=DOTS)
        pyplot.close(canvas)
    output = BytesIO()
    with Image.open(drawing) as image:
        # A third of the bytes, and none that name a program or a date.
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(output, format="png", optimize=True)
    return output.getvalue()


def _canvas(rows: int, columns: int, width: float, height: float, title: str) -> tuple["Canvas", list[list["Axes"]]]:
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    canvas.suptitle(title, fontsize=SIZE + 2)
    return canvas, axes.tolist()


def _bars(
    axis: "Axes", names: Sequence[str], lengths: Sequence[float], colours: Sequence[str], texts: list[str]
) -> None:
    """Horizontal bars from the top down, each with its value behind it."""
    bars = axis.barh(range(len(names)), lengths, color=colours, height=0.7)
    axis.bar_label(bars, texts, padding=3, fontsize=SIZE)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(0, 1.25 * max(lengths) or 1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def _kernel_rows(rows: list[Row]) -> list[Row]:
    """The kernels in the dtype of which the most was measured."""
    timed = [row for row in rows if row["suite"] == "kernels" and "median_us" in row]
    return most(timed, lambda row: row.get("dtype"))


def _kernels(rows: list[Row], machine: Machine) -> "Canvas":
    cases = list(dict.fromkeys((row["case"], row.get("shape")) for row in rows))
    modes = sorted({row.get("mode") for row in rows}, key=lambda mode: rank(MODES, mode))
    names = sorted({str(row.get("implementation")) for row in rows}, key=lambda name: rank(IMPLEMENTATIONS, name))
    unit, scale = unit_of(rows)
    height = 0.7 + len(cases) * (0.75 + 0.2 * len(names))
    title = f"Kernels, {rows[0].get('dtype')}, each in its fastest memory format: median {unit}\n{machine}"
    canvas, axes = _canvas(len(cases), len(modes), max(5.5, 1.2 + 2.6 * len(modes)), height, title)
    for line, (case, shape) in zip(axes, cases, strict=True):
        for axis, mode in zip(line, modes, strict=True):
            group = [row for row in rows if (row["case"], row.get("shape"), row.get("mode")) == (case, shape, mode)]
            best = [fastest(row for row in group if str(row.get("implementation")) == name) for name in names]
            lengths = [row["median_us"] / scale if row else 0.0 for row in best]
            texts = [number(length) if length else "not measured" for length in lengths]
            _bars(axis, names, lengths, [COLOURS.get(name, OTHER) for name in names], texts)
            axis.set_xticks([])
            axis.set_title(f"{case.partition(', ')[0]}, {mode}\n{shape}")
            if axis is not line[0]:
                axis.set_yticklabels([])
            limits = [row["limit_us"] / scale for row in group if "limit_us" in row]
            if limits:
                axis.axvline(limits[0], color=LIMIT, linestyle="--", linewidth=1.2)
                axis.set_xlabel(f"limit (dashed) {number(limits[0])} {unit}", color=LIMIT)
            else:
                axis.set_xlabel(f"{unit}, no limit recorded" if group else "")
    return canvas


def _step_rows(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["suite"] == "steps" and "images_per_s" in row]


def _steps(rows: list[Row], machine: Machine) -> "Canvas":
    cases = list(dict.fromkeys((row["case"], row.get("shape"), row.get("dtype")) for row in rows))
    groups = [[row for row in rows if (row["case"], row.get("shape"), row.get("dtype")) == case] for case in cases]
    groups = [sorted(group, key=lambda row: -row["images_per_s"])[:MOST_BARS] for group in groups]
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(
        len(groups),
        1,
        figsize=(7, 0.6 + sum(0.5 + 0.24 * len(group) for group in groups)),
        squeeze=False,
        layout="constrained",
        height_ratios=[len(group) for group in groups],
        sharex=True,
    )
    canvas.suptitle(f"Images a second\n{machine}", fontsize=SIZE + 2)
    for axis, (case, shape, dtype), group in zip(axes[:, 0], cases, groups, strict=True):
        names = [str(row.get("implementation")) for row in group]
        colours = [COLOURS.get(name.partition(", ")[0], OTHER) for name in names]
        rates = [row["images_per_s"] for row in group]
        _bars(axis, names, rates, colours, [f"{rate:,.0f}" for rate in rates])
        axis.set_title(f"{case}, {shape}, {dtype}", loc="left")
    axes[0, 0].set_xlim(0, 1.15 * max(row["images_per_s"] for row in rows))
    return canvas


def _roofline_rows(rows: list[Row]) -> list[Row]:
    """Layers whose work is known, and the copies; none unless there are both."""
    layers = [row for row in layers_of(rows) if row.get("gflop") and row.get("fewest_mb")]
    ceilings = [row for row in rows if row["suite"] == "ceilings"]
    copies = [row for row in ceilings if row["case"] == "copy" and "gb_per_s" in row]
    products = (
        [row for row in ceilings if "gflop_per_s" in row and row.get("dtype") == layers[0].get("dtype")]
        if layers
        else []
    )
    return [*layers, *copies, *products] if layers and copies and products else []


def _roofline(rows: list[Row], machine: Machine) -> "Canvas":
    layers = [row for row in rows if row["suite"] == "layers"]
    copy = max((row for row in rows if row["case"] == "copy"), key=lambda row: row["gb_per_s"])
    roofs = [row for row in rows if row["suite"] == "ceilings" and row["case"] != "copy"]
    canvas, ((axis,),) = _canvas(1, 1, 7.5, 5.5, f"Roofline of the layers, {layers[0].get('dtype')}\n{machine}")
    points = [
        (1e3 * row["gflop"] / row["fewest_mb"], 1e6 * row["gflop"] / row["median_us"], row["case"], row.get("mode"))
        for row in layers
    ]
    top = max(row["gflop_per_s"] for row in roofs)
    left = min(point[0] for point in points) / 2
    right = max(*(point[0] for point in points), top / copy["gb_per_s"]) * 3
    line: dict[str, Any] = {"color": "black", "linewidth": 1.2}
    for row, style in zip(sorted(roofs, key=lambda row: -row["gflop_per_s"]), ("-", "--", ":", "-."), strict=False):
        ridge = row["gflop_per_s"] / copy["gb_per_s"]
        text = f"{row['case']}, {row.get('shape', '')}: {row['gflop_per_s']:,.0f} GFLOP/s"
        axis.plot([ridge, right], [row["gflop_per_s"]] * 2, linestyle=style, label=text, **line)
    text = f"copy, {copy.get('shape', '')}: {copy['gb_per_s']:,.0f} GB/s"
    axis.plot([left, top / copy["gb_per_s"]], [left * copy["gb_per_s"], top], label=text, **{**line, "color": LIMIT})
    axis.set_xscale("log")
    axis.set_yscale("log")
    modes = sorted({point[3] for point in points}, key=str)
    for mode, marker, colour in zip(
        modes, "osD^v<", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), strict=False
    ):
        chosen = [point for point in points if point[3] == mode]
        across, up = [point[0] for point in chosen], [point[1] for point in chosen]
        axis.scatter(across, up, s=22, c=colour, marker=marker, label=mode, zorder=3)
    axis.set_xlim(left, right)
    axis.set_ylim(min(point[1] for point in points) / 2, top * 2.2)
    axis.set_xlabel("FLOP for each byte that must move")
    axis.set_ylabel("GFLOP/s")
    axis.grid(alpha=0.25, which="major")
    axis.legend(loc="lower right", fontsize=SIZE)
    _label(axis, points)
    return canvas


def _label(axis: "Axes", points: Sequence[tuple[float, float, str, str | None]]) -> None:
    """Names beside points, where no other name or point is."""
    axis.figure.canvas.draw()
    pixels = [tuple(axis.transData.transform(point[:2])) for point in points]
    scale = axis.figure.dpi / 72
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in pixels]
    for (x, y), point in sorted(zip(pixels, points, strict=True)):
        width, height = 4.8 * scale * len(point[2]), SIZE * 1.15 * scale
        best: tuple[float, float, float] | None = None
        for distance in (6, 14, 24, 36, 50):
            for angle in range(0, 360, 30):
                dx, dy = (distance * scale * f(math.radians(angle)) for f in (math.cos, math.sin))
                low = x + dx - (width if dx < -1 else 0 if dx > 1 else width / 2)
                box = (low, y + dy - height / 2, low + width, y + dy + height / 2)
                overlap = sum(
                    max(0, min(box[2], other[2]) - max(box[0], other[0]))
                    * max(0, min(box[3], other[3]) - max(box[1], other[1]))
                    for other in taken
                )
                if best is None or overlap + distance < best[0]:
                    best = (overlap + distance, low, y + dy - height / 2)
        assert best is not None
        taken.append((best[1], best[2], best[1] + width, best[2] + height))
        place = axis.transData.inverted().transform((best[1], best[2]))
        axis.annotate(
            point[2],
            point[:2],
            tuple(place),
            fontsize=SIZE,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
        )


def _memory_rows(rows: list[Row]) -> list[Row]:
    return layer_memory(rows)[:MOST_BARS]


def _memory(rows: list[Row], machine: Machine) -> "Canvas":
    from matplotlib import colormaps

    canvas, ((axis,),) = _canvas(1, 1, 7.5, 5, f"What training keeps, by layer, {rows[0].get('dtype')}\n{machine}")
    bars = ["parameters\n(computed)", "gradients\n(computed)", "momentum\n(computed)", "saved activations\n(measured)"]
    colours = [colormaps["tab20"](index % 20) for index in range(len(rows))]
    base = [0.0] * len(bars)
    for row, colour in zip(rows, colours, strict=True):
        computed = row.get("parameters", 0) * PARAMETER_BYTES / 2**20
        heights = [computed, computed, computed, row.get("saved_mib", 0.0)]
        axis.bar(range(len(bars)), heights, 0.65, bottom=base, color=colour, label=row["case"])
        base = [below + height for below, height in zip(base, heights, strict=True)]
    for index, total in enumerate(base):
        axis.annotate(f"{total:,.1f}", (index, total), (0, 3), textcoords="offset points", ha="center", fontsize=SIZE)
    axis.set_xticks(range(len(bars)), bars)
    axis.set_ylabel("MiB")
    handles, names = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5), fontsize=SIZE, frameon=False)
    return canvas


#: Name, page, what it shows, its rows among a machine's, and what draws them.
KINDS: tuple[tuple[str, str, str, Callable[[list[Row]], list[Row]], Callable[[list[Row], Machine], "Canvas"]], ...] = (
    (
        "kernels",
        "kernels.md",
        "Bars of the kernels' median times, with the limit as a dashed line",
        _kernel_rows,
        _kernels,
    ),
    (
        "roofline",
        "layers.md",
        "Every layer's FLOP/s over FLOP for each byte, under the machine's roofs",
        _roofline_rows,
        _roofline,
    ),
    ("memory", "memory.md", "Bars of what training keeps, stacked by layer", _memory_rows, _memory),
    ("steps", "steps.md", "Bars of images a second", _step_rows, _steps),
)
