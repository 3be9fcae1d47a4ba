"""Figures of the strategies: measured losses, and modelled scaling in a file of its own."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..measure.records import Row, moment
from ..predict.cost_model import IMAGES, LINKS, STRATEGIES, scaled_seconds
from ..subjects.parallel_losses import REORDERED
from .tables import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

#: Okabe and Ito's colours, which colour-blind readers tell apart; one process is black and gray.
COLOURS = {"none": "#000000", REORDERED: "#999999", "data": "#0072B2", "tower": "#D55E00", "hybrid": "#009E73"}
#: Differences of losses up to this are rounding, by dtype: 2**-52 and 2**-23 times a few thousand additions.
ROUNDING = {"float64": 1e-12, "float32": 1e-6}
#: Where equal losses are drawn on a logarithmic axis.
EQUAL = 1e-17
#: Fewer points than this are marked each.
MARKED = 100
#: Updates averaged to one point of the loss curve.
AVERAGED = 15
#: Devices of the modelled scaling.
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def losses(groups: Sequence[Sequence[Row]]) -> list[Figure]:
    """Measured losses of the newest machine that has them in both dtypes.

    Args:
        groups: rows of the case ``LOSSES_CASE``, a group for each machine and dtype, ``none`` first.
    """
    if not groups:
        return []
    newest = max(groups, key=lambda group: max(map(moment, group)))[0]["machine"]
    by_dtype = {group[0]["dtype"]: group for group in groups if group[0]["machine"] == newest}
    if not by_dtype.keys() >= ROUNDING.keys():
        return []
    return [Figure("parallelism.png", _losses_alt(by_dtype), functools.partial(_losses, by_dtype))]


def scaling(gpus: Sequence[Row]) -> list[Figure]:
    """Modelled scaling of the newest of ``gpus``, whose compute it takes."""
    if not gpus:
        return []
    return [Figure("parallelism-modelled.png", _scaling_alt(gpus[0]), functools.partial(_scaling, gpus[0]))]


def differences(group: Sequence[Row]) -> dict[str, list[float]]:
    """The distance of every update's loss from that of one process, by strategy."""
    plain, *others = group
    return {
        row["implementation"]: [abs(ours - theirs) for ours, theirs in zip(row["losses"], plain["losses"], strict=True)]
        for row in others
    }


def _ends(group: Sequence[Row]) -> dict[str, str]:
    """Every strategy's validation error in words."""
    return {row["implementation"]: f"{row['top1_error_percent']:.1f} %" for row in group}


def _losses_alt(by_dtype: dict[str, Sequence[Row]]) -> str:
    double, single = (differences(by_dtype[dtype]) for dtype in ("float64", "float32"))
    largest = max(max(each) for each in double.values())
    where = "inside" if largest <= ROUNDING["float64"] else "above"
    first, worst = max(each[0] for each in single.values()), max(max(each) for each in single.values())
    ends = ", ".join(f"{name} {error}" for name, error in _ends(by_dtype["float32"]).items())
    return (
        f"Three panels. Float64: over {by_dtype['float64'][0]['updates']} updates every strategy's loss differs from "
        f"one process's by at most {largest:.1g}, {where} the band of rounding below {ROUNDING['float64']:g}. "
        f"Float32: the difference grows from {first:.1g} to at most {worst:.1g}, both for the strategies and for one "
        f"process with the images of each batch reversed. Below, the float32 losses over "
        f"{by_dtype['float32'][0]['updates']} updates, which end at similar values; validation errors after the last "
        f"one: {ends}."
    )


def _losses(by_dtype: dict[str, Sequence[Row]]) -> "Canvas":
    from matplotlib.figure import Figure as Canvas

    first = by_dtype["float32"][0]
    figure = Canvas(figsize=(9, 7.5), layout="constrained")
    figure.suptitle(
        f"Measured: the same training run under every strategy\n{first['network']}, batch and size {first['shape']}, "
        f"{first['data']}; {first['machine']}",
        fontsize=11,
    )
    panels = figure.subplot_mosaic([["float64", "float32"], ["losses", "losses"]])
    for dtype in ROUNDING:
        _difference_panel(panels[dtype], dtype, by_dtype[dtype])
    panels["float32"].sharey(panels["float64"])
    panels["float64"].set_ylim(EQUAL, 30)
    axes = panels["losses"]
    ends = _ends(by_dtype["float32"])
    for row in by_dtype["float32"]:
        name, losses = row["implementation"], row["losses"]
        chunks = [losses[begin : begin + AVERAGED] for begin in range(0, len(losses), AVERAGED)]
        middles = [AVERAGED * number + (len(chunk) + 1) / 2 for number, chunk in enumerate(chunks)]
        means = [sum(chunk) / len(chunk) for chunk in chunks]
        label = f"{name}: {ends[name]} validation error at the end"
        axes.plot(middles, means, color=COLOURS.get(name), linewidth=3.5 if name == "none" else 1.6, label=label)
    axes.set_ylim(0)
    axes.set_xlim(0, first["updates"])
    axes.set_title(f"float32: the losses, mean of {AVERAGED} updates, diverge but end at similar values")
    axes.set_xlabel("update")
    axes.set_ylabel("training loss")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _difference_panel(axes: "Axes", dtype: str, group: Sequence[Row]) -> None:
    for name, values in differences(group).items():
        updates = range(1, len(values) + 1)
        heights = [max(value, EQUAL) for value in values]
        mark = "." if len(values) < MARKED else ""
        axes.plot(updates, heights, color=COLOURS.get(name), linewidth=1.2, marker=mark, markersize=3, label=name)
    axes.axhspan(EQUAL, ROUNDING[dtype], color="#56B4E9", alpha=0.2, linewidth=0)
    axes.text(0.98, ROUNDING[dtype], "rounding ", transform=axes.get_yaxis_transform(), ha="right", va="top")
    axes.set_yscale("log")
    axes.set_yticks(
        [EQUAL, 1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 1], ["equal", "1e-15", "1e-12", "1e-9", "1e-6", "1e-3", "1"]
    )
    axes.minorticks_off()
    axes.set_xlim(0, group[0]["updates"] + 1)
    axes.set_title(f"{dtype}: loss difference from one process")
    axes.set_xlabel("update")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left" if dtype == "float64" else "lower right", fontsize=8)


def _efficiencies(row: Row) -> dict[str, dict[str, list[float]]]:
    """Percent of linear speedup by link and strategy, at :data:`DEVICES`."""
    alone = row["median_us"] * 1e-6
    width = 2 if row.get("dtype") == "bfloat16" else 4
    return {
        link.name: {
            strategy: [
                100 * alone / scaled_seconds(strategy, devices, alone / IMAGES, link, width)
                for devices in DEVICES
                # Two towers take two devices.
                if devices > 1 or strategy != "tower"
            ]
            for strategy in STRATEGIES
        }
        for link in LINKS[1:]
    }


def _scaling_alt(row: Row) -> str:
    found = _efficiencies(row)
    ends = "; ".join(
        f"{link}: " + ", ".join(f"{strategy} {values[-1]:.0f} %" for strategy, values in lines.items())
        for link, lines in found.items()
    )
    return (
        f"Modelled, not measured: percent of linear speedup of the paper's network on 1 to {DEVICES[-1]} devices like "
        f"one {row['machine']}, {IMAGES} images each, one panel per link. At {DEVICES[-1]} devices over {ends}."
    )


def _scaling(row: Row) -> "Canvas":
    from matplotlib.figure import Figure as Canvas

    found = _efficiencies(row)
    figure = Canvas(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(
        f"Modelled, not measured: the paper's network on devices like one {row['machine']}, {IMAGES} images each",
        fontsize=11,
    )
    for number, (axes, (link, lines)) in enumerate(
        zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True)
    ):
        for strategy, values in lines.items():
            axes.plot(DEVICES[-len(values) :], values, marker=".", color=COLOURS[strategy], label=strategy)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 8, 64, 1024], ["1", "8", "64", "1024"])
        axes.minorticks_off()
        axes.set_ylim(0, 105)
        axes.set_title(f"link: {link}")
        axes.set_xlabel("devices")
        axes.grid(alpha=0.3)
        if number == 0:
            axes.set_ylabel("% of linear speedup")
            axes.legend(loc="lower left")
    return figure
