"""Figures from records: PNG files for the Markdown pages, and the same as SVG in the page's own colours.

A figure is drawn once, by matplotlib, narrow enough for a phone. Without rows there is no figure.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from ..measure.records import Row
from . import findings
from .rows import (
    IMPLEMENTATIONS,
    MODES,
    PARAMETER_BYTES,
    fastest,
    layer_memory,
    layers_of,
    most,
    ordered,
    rank,
    values,
)
from .tables import Figure, number, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

INK, PAPER, LIMIT, OURS, OTHER, PLAIN = "#000000", "#ffffff", "#b00020", "#009e73", "#8c8c8c", "#bdbdbd"
#: Colour of each implementation in every figure; other libraries are gray or orange. This is Okabe and Ito's palette,
#: which colour-blind readers can distinguish.
COLOURS = {
    "aten": OTHER,
    "compiled": PLAIN,
    "xla": "#d55e00",
    "onnxruntime": "#d55e00",
    "openvino": "#e69f00",
    "reference": "#56b4e9",
    "inductor": "#0072b2",
    "compiled reference": "#cc79a7",
    "traced": "#cc79a7",
    "triton": OURS,
    "auto": OURS,
}
#: CSS variables for the colours of a file; ``page.css`` has a light and a dark set.
VARIABLES = {
    INK: "var(--ink)",
    PAPER: "var(--paper)",
    LIMIT: "var(--limit)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(dict.fromkeys(COLOURS.values()))},
}
MARKS = tuple(zip("osD^v<", ("#0072b2", "#d55e00", OURS, "#cc79a7", "#e69f00", "#56b4e9"), strict=True))
#: Figures wider than this many pixels scroll on a phone instead of shrinking.
WIDE = 800
#: Points, inches, and dots to the inch.
SIZE, WIDTH, DOTS = 8, 4.6, 140
#: More bars or layers than this cannot be read.
MOST_BARS = 24


class Drawing(NamedTuple):
    """What a figure shows, in words, and what draws it."""

    about: str
    draw: Callable[[], "Canvas"]


class Bar(NamedTuple):
    name: str
    length: float
    text: str
    colour: str


class Panel(NamedTuple):
    """Bars from top to bottom, and their limit."""

    title: str
    bars: list[Bar]
    limit: float | None = None


def _saved(figure: Figure, **options: Any) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("font", size=SIZE)
        matplotlib.rc("axes", titlesize=SIZE, titleweight="bold", titlelocation="left")
        matplotlib.rc("axes.spines", top=False, right=False)
        # Deterministic ids; text stays text, in the reader's font.
        matplotlib.rc("svg", hashsalt=figure.file, fonttype="none")
        canvas = figure.draw()
        output = BytesIO()
        canvas.savefig(output, **options)
        pyplot.close(canvas)
    return output.getvalue()


def png(figure: Figure) -> bytes:
    """The figure as PNG; the same rows give the same bytes."""
    from PIL import Image

    output = BytesIO()
    with Image.open(BytesIO(_saved(figure, format="png", dpi=DOTS))) as image:
        # A third of the bytes, and no program or date in the metadata.
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(output, format="png", optimize=True)
    return output.getvalue()


def svg(figure: Figure) -> str:
    """The figure as an SVG element in the page's colours and font."""
    text = _saved(figure, format="svg", metadata={"Date": None, "Creator": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<g id=\"[^\"]*\">\s*</g>", "", text, flags=re.S
    )
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(
        r"font-family: [^;\"]*;? ?|font: ([\d.]+px) [^;\"]*",
        lambda found: f"font-size: {found[1]}" if found[1] else "",
        text,
    )
    text = re.sub("#[0-9a-f]{6}", lambda found: VARIABLES.get(found[0], found[0]), text)
    text = re.sub(r'<svg [^>]*?width="([\d.]+)pt"[^>]*?viewBox="([^"]*)"[^>]*>', _opening(figure.about), text, count=1)
    return re.sub(r"\s*\n\s*", " ", text).strip()


def _opening(about: str) -> Callable[[re.Match[str]], str]:
    """The first tag: twelve pixels a line of text where there is room; a wide figure scrolls on a phone."""

    def opening(found: re.Match[str]) -> str:
        width = 1.5 * float(found[1])
        least = "; min-width: 34rem" if width > WIDE else ""
        label = f'role="img" aria-label="{escape(about)}"'
        return f'<svg {label} viewBox="{found[2]}" style="width: {width:.0f}px{least}">'

    return opening


def _bars(panels: Sequence[Panel], title: str, unit: str, shared: bool = False) -> "Canvas":
    """Panels of bars, each bar with its text after it; on one scale if ``shared``."""
    from matplotlib import pyplot

    heights = [len(panel.bars) for panel in panels]
    canvas, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(WIDTH, 0.5 + sum(0.42 + 0.17 * height for height in heights)),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
    )
    canvas.suptitle(title, fontsize=SIZE, x=0.01, ha="left")
    longest = max(bar.length for panel in panels for bar in panel.bars)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        lengths = [bar.length for bar in panel.bars]
        drawn = axis.barh(range(len(lengths)), lengths, color=[bar.colour for bar in panel.bars], height=0.72)
        axis.bar_label(drawn, [bar.text for bar in panel.bars], padding=3, fontsize=SIZE)
        axis.set_yticks(range(len(lengths)), [bar.name for bar in panel.bars])
        axis.set_ylim(len(lengths) - 0.5, -0.5)
        axis.set_xlim(0, 1.3 * (longest if shared else max(lengths)) or 1)
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.set_title(panel.title)
        if panel.limit is not None:
            axis.axvline(panel.limit, color=LIMIT, linestyle="--", linewidth=1)
            axis.set_xlabel(f"limit (dashed) {number(panel.limit)} {unit}", color=LIMIT, loc="left")
    return canvas


def _colour(name: str) -> str:
    return COLOURS.get(name.partition(", ")[0], OURS)


def found(rows: Sequence[Row]) -> list[Figure]:
    """The chart of the main findings; none if nothing is compared."""
    groups = findings.groups(rows)
    if not groups:
        return []
    colours = dict(zip(findings.NAMES, (OURS, PLAIN, OTHER), strict=True))
    panels = [
        Panel(
            group.title,
            [
                Bar(bar.name, bar.ratio, f"{bar.ratio:.2f} x, {number(bar.median_us / 1e3)} ms", colours[bar.name])
                for bar in group.bars
            ],
        )
        for group in groups
    ]
    about = "Bars of the speedup over eager PyTorch. " + " ".join(
        f"{group.title}: {', '.join(f'{bar.name} {bar.ratio:.2f}' for bar in group.bars)}." for group in groups
    )
    title = "Speedup over PyTorch's own operators, called eagerly"
    return [Figure("figures/found.png", about, lambda: _bars(panels, title, "", True))]


def kernels(rows: list[Row]) -> Drawing | None:
    """The kernels in the dtype and mode with the most measurements; training first."""
    timed = [row for row in rows if row["suite"] == "kernels" and "median_us" in row]
    both = [row for row in timed if row.get("mode") == "forward_backward"]
    chosen = most(both or timed, lambda row: values(row, ("dtype", "mode")))
    if not chosen:
        return None
    unit, scale = unit_of(chosen)
    panels = []
    for case, shape in dict.fromkeys(values(row, ("case", "shape")) for row in chosen):
        group = [row for row in chosen if values(row, ("case", "shape")) == (case, shape)]
        names = sorted({str(row.get("implementation")) for row in group}, key=lambda name: rank(IMPLEMENTATIONS, name))
        bars = []
        for name in names:
            row = fastest(row for row in group if str(row.get("implementation")) == name)
            assert row is not None
            length = row["median_us"] / scale
            bars.append(Bar(name, length, f"{number(length)} {unit}", _colour(name)))
        limits = [row["limit_us"] / scale for row in group if "limit_us" in row]
        panels.append(Panel(f"{case}, {shape}", bars, limits[0] if limits else None))
    first = chosen[0]
    mode = str(first.get("mode")).replace("_", " and ")
    title = f"Median times, {mode}, {first.get('dtype')}, each in its fastest memory format"
    limits_too = "; a dashed line is the limit" if any(panel.limit is not None for panel in panels) else ""
    cases = ", ".join(dict.fromkeys(row["case"] for row in chosen))
    return Drawing(
        f"Bars of median times, {mode}, {first.get('dtype')}, of {cases}{limits_too}",
        lambda: _bars(panels, title, unit),
    )


def steps(rows: list[Row]) -> Drawing | None:
    timed = ordered([row for row in rows if row["suite"] == "steps" and "images_per_s" in row])
    panels = []
    keys = ("case", "shape", "dtype")
    for key in dict.fromkeys(values(row, keys) for row in timed):
        group = sorted((row for row in timed if values(row, keys) == key), key=lambda row: -row["images_per_s"])
        bars = [
            Bar(
                name := str(row.get("implementation")),
                row["images_per_s"],
                f"{row['images_per_s']:,.0f}",
                _colour(name),
            )
            for row in group[:MOST_BARS]
        ]
        if len(bars) > 1:
            panels.append(Panel(", ".join(map(str, key)), bars))
    if not panels:
        return None
    about = f"Bars of images per second: {'; '.join(panel.title for panel in panels)}"
    return Drawing(about, lambda: _bars(panels, "Images per second", ""))


def roofline(rows: list[Row]) -> Drawing | None:
    """The roofline: layers under the machine's ceilings; None unless there are both."""
    layers = [row for row in layers_of(rows) if row.get("gflop") and row.get("fewest_mb")]
    copies = [row for row in rows if row["suite"] == "ceilings" and row["case"] == "copy" and "gb_per_s" in row]
    roofs = [
        row
        for row in rows
        if row["suite"] == "ceilings" and "gflop_per_s" in row and layers and row.get("dtype") == layers[0].get("dtype")
    ]
    if not layers or not copies or not roofs:
        return None
    copy = max(copies, key=lambda row: row["gb_per_s"])
    dtype = layers[0].get("dtype")
    about = f"Each layer's GFLOP/s against its FLOP per byte, {dtype}, under the roofs of a copy and a matrix product"
    return Drawing(about, lambda: _draw_roofline(layers, copy, roofs, f"Roofline of the layers, {dtype}"))


def _draw_roofline(layers: list[Row], copy: Row, roofs: list[Row], title: str) -> "Canvas":
    from matplotlib import pyplot

    canvas, axis = pyplot.subplots(figsize=(1.4 * WIDTH, 1.15 * WIDTH), layout="constrained")
    canvas.suptitle(title, fontsize=SIZE, x=0.01, ha="left")
    points = [
        (1e3 * row["gflop"] / row["fewest_mb"], 1e6 * row["gflop"] / row["median_us"], row["case"], row.get("mode"))
        for row in layers
    ]
    top, slope = max(row["gflop_per_s"] for row in roofs), copy["gb_per_s"]
    left = min(point[0] for point in points) / 2
    right = max(*(point[0] for point in points), top / slope) * 3
    for row, style in zip(sorted(roofs, key=lambda row: -row["gflop_per_s"]), ("-", "--", ":", "-."), strict=False):
        text = f"{row['case']}, {row.get('shape', '')}: {row['gflop_per_s']:,.0f} GFLOP/s"
        across = [row["gflop_per_s"] / slope, right]
        axis.plot(across, [row["gflop_per_s"]] * 2, linestyle=style, label=text, color=INK, linewidth=1.2)
    text = f"copy, {copy.get('shape', '')}: {slope:,.0f} GB/s"
    axis.plot([left, top / slope], [left * slope, top], label=text, color=LIMIT, linewidth=1.2)
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte of minimum memory traffic", ylabel="GFLOP/s")
    modes = sorted({point[3] for point in points}, key=lambda mode: rank(MODES, mode))
    for mode, (mark, colour) in zip(modes, itertools.cycle(MARKS), strict=False):
        chosen = [point for point in points if point[3] == mode]
        across, up = [point[0] for point in chosen], [point[1] for point in chosen]
        axis.scatter(across, up, s=20, c=colour, marker=mark, label=str(mode).replace("_", " "), zorder=3)
    axis.set_xlim(left, right)
    axis.set_ylim(min(point[1] for point in points) / 2, top * 2.2)
    axis.grid(color=PLAIN, alpha=0.4, linewidth=0.6)
    axis.legend(loc="lower right", fontsize=SIZE, frameon=False)
    _label(axis, points)
    return canvas


def _label(axis: "Axes", points: Sequence[tuple[float, float, str, str | None]]) -> None:
    """Write names next to points, without covering other names or points."""
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
            bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": OTHER, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
        )


def memory(rows: list[Row]) -> Drawing | None:
    layers = layer_memory(rows)[:MOST_BARS]
    if not layers:
        return None
    about = (
        "Bars of the memory of training, stacked by layer: weights, gradients and momentum (computed), saved "
        "activations (measured)"
    )
    return Drawing(about, lambda: _draw_memory(layers))


def _draw_memory(rows: list[Row]) -> "Canvas":
    from matplotlib import colormaps, pyplot
    from matplotlib.colors import to_hex

    canvas, axis = pyplot.subplots(figsize=(1.1 * WIDTH, 3.6), layout="constrained")
    canvas.suptitle(f"Memory of training, by layer, {rows[0].get('dtype')}", fontsize=SIZE, x=0.01, ha="left")
    bars = ["weights", "gradients", "momentum", "saved for\nbackward"]
    base = [0.0] * len(bars)
    for index, row in enumerate(rows):
        computed = row.get("parameters", 0) * PARAMETER_BYTES / 2**20
        heights = [computed, computed, computed, row.get("saved_mib", 0.0)]
        colour = to_hex(colormaps["tab20"](index % 20))
        axis.bar(range(len(bars)), heights, 0.65, bottom=base, color=colour, label=row["case"])
        base = [below + height for below, height in zip(base, heights, strict=True)]
    for index, total in enumerate(base):
        axis.annotate(f"{total:,.1f}", (index, total), (0, 3), textcoords="offset points", ha="center", fontsize=SIZE)
    axis.set_xticks(range(len(bars)), bars)
    axis.set_ylabel("MiB")
    handles, names = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5), fontsize=SIZE, frameon=False)
    return canvas
