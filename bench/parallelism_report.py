"""Tables and a plot of the strategies, measured and modelled, from records: ``reports/parallelism.md``."""

from pathlib import Path

import pandas as pd
from tabulate import tabulate

from net.config import network

from .cost_model import (
    LINKS,
    PCIE_2012,
    Link,
    gtx_580_seconds_per_multiply_add,
    message_seconds,
    predict,
    published,
)
from .messages import expected
from .one_rank import ALONE_CASE
from .parallelism import CASE, LINK_CASE

BEGIN, END = "<!-- parallelism: begin -->", "<!-- parallelism: end -->"
#: What the records hold for it.
CASES = (CASE, LINK_CASE, ALONE_CASE)
#: Devices of the predictions.
DEVICES = (1, 2, 4, 8, 64, 1024)
#: Images on each device in the predictions: the paper's batch, as in 2014.
IMAGES = 128
#: The record's row whose compute the predictions take.
MODELLED = {"case": "update of paper", "implementation": "triton, reduce-overhead", "shape": "128x3x224x224"}
STRATEGIES = ("data", "tower", "hybrid")


def _table(rows: list[dict[str, object]]) -> str:
    if not rows:
        return "Not measured.\n"
    text = tabulate([list(row.values()) for row in rows], list(rows[0]), "github", disable_numparse=True)
    return f"{text}\n"


def _runs(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The newest comparison of each network and machine: a row for each strategy."""
    if rows.empty or "network" not in rows:
        return []
    measured = rows[rows["case"] == CASE].drop_duplicates(
        ["machine", "network", "shape", "implementation"], keep="last"
    )
    return [group for _, group in measured.groupby(["machine", "network", "shape"], sort=False)]


def _measured(run: pd.DataFrame) -> list[dict[str, object]]:
    result = []
    for _, row in run.iterrows():
        memory = {name: f"{name}_mib" for name in ("parameters", "gradients", "optimizer", "activations")}
        alone = row["ranks"] == 1
        result.append(
            {
                "strategy": row["implementation"],
                "processes": str(int(row["ranks"])),
                "images/s": f"{row['images_per_s']:,.1f}",
                "ms": f"{row['median_us'] / 1e3:,.1f}",
                "compute": f"{row['compute_us'] / 1e3:,.1f}",
                "exposed": f"{row['exposed_us'] / 1e3:,.1f}",
                "hidden": f"{row['hidden_us'] / 1e3:,.1f}",
                "messages": "" if alone else f"{int(row['messages'])} ({int(row['formula_messages'])})",
                "MiB sent": "" if alone else f"{row['sent_mib']:,.3f} ({row['formula_sent_mib']:,.3f})",
                **{f"{name} MiB": f"{row[column]:,.1f}" for name, column in memory.items()},
                "process MiB": f"{row['process_peak_mib']:,.0f}",
            }
        )
    return result


def measured_link(rows: pd.DataFrame) -> Link | None:
    """Latency and bandwidth between two processes, from the newest all-reduces of one number and of 64 MiB."""
    if rows.empty:
        return None
    newest = rows[rows["case"] == LINK_CASE].drop_duplicates("shape", keep="last").set_index("shape")
    if not {"1", str(2**24)} <= set(newest.index):
        return None
    small, large = newest.loc["1"], newest.loc[str(2**24)]
    return Link(
        "gloo", large["sent_mib"] * 2**20 / (large["median_us"] * 1e-6), small["median_us"] * 1e-6 / 2, large["record"]
    )


def _validation(run: pd.DataFrame, rows: pd.DataFrame, link: Link) -> list[dict[str, object]]:
    """Predicted from a rank's own time, or its share of the plain run's, and the link, against measured."""
    task = ["machine", "network", "shape", "dtype"]
    alone = rows[(rows["case"] == ALONE_CASE) & (rows[task] == run.iloc[0][task]).all(axis=1)]
    if not alone.empty:
        alone = alone[alone["compiled"] == "eager"]
    plain = run[run["implementation"] == "none"]
    result = []
    for _, row in run.iterrows():
        own = alone[alone["implementation"] == row["implementation"]]
        if row["ranks"] > 1 and (len(own) or len(plain)):
            batch = int(row["shape"].partition("x")[0])
            config = network(row["network"], dropout=0.0)
            if len(own):
                seconds_per_image = own.iloc[-1]["median_us"] * 1e-6 * row["ranks"] / batch
            else:
                seconds_per_image = plain.iloc[0]["median_us"] * 1e-6 / batch
            found = predict(config, row["implementation"], int(row["ranks"]), batch, seconds_per_image, link).seconds
            measured = row["median_us"] * 1e-6
            result.append(
                {
                    "network": row["network"],
                    "strategy": row["implementation"],
                    "predicted ms": f"{found * 1e3:,.1f}",
                    "measured ms": f"{measured * 1e3:,.1f}",
                    "error %": f"{100 * (found / measured - 1):+.0f}",
                }
            )
    return result


def _alone(rows: pd.DataFrame) -> list[str]:
    """A section for each network and machine on which ranks were measured by themselves."""
    if rows.empty or ALONE_CASE not in set(rows["case"]):
        return []
    keys = ["machine", "network", "shape", "dtype", "compiled"]
    newest = rows[rows["case"] == ALONE_CASE].drop_duplicates([*keys, "implementation"], keep="last")
    sections = []
    for (_, variant, shape, dtype, how), run in newest.groupby(keys, sort=False):
        cells = []
        for _, row in run.iterrows():
            line = {
                "strategy": row["implementation"],
                "ranks": str(int(row["ranks"])),
                "one rank's ms": f"{row['median_us'] / 1e3:,.2f}",
            }
            for link in ALONE_LINKS:
                seconds = 0.0
                if row["ranks"] > 1:
                    batch, width = int(shape.partition("x")[0]), 2 if dtype == "bfloat16" else 4
                    messages = expected(network(variant), row["implementation"], int(row["ranks"]), batch, width)
                    seconds = sum(message_seconds(message, link) for message in messages)
                line[f"messages over {link.name}, modelled ms"] = f"{seconds * 1e3:,.2f}" if seconds else ""
            cells.append(line)
        sections.append(
            ALONE.format(network=variant, shape=shape, dtype=dtype, how=how, table=_table(cells), sources=_sources(run))
        )
    return sections


def _compute(rows: pd.DataFrame) -> pd.Series | None:
    """The record's row that predictions take their compute from."""
    for column, value in MODELLED.items():
        if rows.empty or column not in rows:
            return None
        rows = rows[rows[column] == value]
    return None if rows.empty else rows.iloc[-1]


def _seconds(strategy: str, ranks: int, seconds_per_image: float, link: Link, width: int) -> float:
    """An update of the paper's network, with activations of ``width`` bytes."""
    return predict(network("paper"), strategy, ranks, IMAGES * ranks, seconds_per_image, link, width=width).seconds


def _modelled(row: pd.Series) -> list[dict[str, object]]:
    h200 = row["median_us"] * 1e-6 / IMAGES
    gtx_580 = network("paper").multiply_adds * gtx_580_seconds_per_multiply_add()
    result: list[dict[str, object]] = []
    for link in LINKS:
        device, seconds_per_image, width = ("GTX 580", gtx_580, 4) if link is PCIE_2012 else ("H200", h200, 2)
        for strategy in STRATEGIES:
            cells: dict[str, object] = {"link": link.name, "device": device, "strategy": strategy}
            for ranks in DEVICES:
                # Two towers take two devices.
                possible = strategy != "tower" or ranks > 1
                seconds = _seconds(strategy, ranks, seconds_per_image, link, width) if possible else 0
                cells[str(ranks)] = f"{IMAGES * ranks / seconds:,.0f}" if possible else ""
            result.append(cells)
    return result


def _sources(run: pd.DataFrame) -> str:
    lines = {
        f"{row['machine']}, torch {row['torch']}, commit {row['commit']}{' with changes' if row['dirty'] else ''}, "
        f"{row['date']}:\n`reports/data/{row['record']}`"
        for _, row in run.iterrows()
    }
    return "\n".join(sorted(lines)) + "\n"


TIMES = ("strategy", "processes", "images/s", "ms", "compute", "exposed", "hidden", "messages", "MiB sent")
MEMORY = ("strategy", "parameters MiB", "gradients MiB", "optimizer MiB", "activations MiB", "process MiB")
INTRODUCTION = """# Parallelism

Made from the records by `python -m bench.report`; `python -m bench.parallelism` measures.

![losses and predicted speed-ups](parallelism.png)
"""
MEASURED = """## Measured: {network}, {shape}, equal global batch and seed

{table}
One thread for each process on a CPU. Milliseconds of an update; compute, exposed and hidden are from the trace of one
more, which is slower. Messages and bytes that a rank sends were counted; the formula's are in parentheses.

{memory}
{sources}"""
#: The links of today for which the messages of a rank that was measured by itself are modelled.
ALONE_LINKS = LINKS[1:3]
ALONE = """## Measured: one rank by itself, {network}, {shape}, {dtype}, {how}

{table}
The first rank's update as long as it computes: its messages are left out, so one device is enough; `none` is one device
with the whole batch. What an update's messages take is modelled, none of them hidden; the two are not added up.

{sources}"""
MODEL = """## The cost model

Seconds of an update = compute / devices + messages that nothing hides; a message takes latency x rounds + bytes /
bandwidth. Averaged gradients hide behind the backward pass, two thirds of the compute; exchanges hide behind nothing.
That compute divides evenly is the model's weakest part: with data parallelism each device updates all parameters, which
counts where the batch of a device is small.
"""
VALIDATION = """Against the runs above, with the compute of a rank by itself, or the plain run's share where none was
measured, and the link that was measured beside them ({gb_per_s:.2f} GB/s, {microseconds:,.0f} us). A rank by itself has
the memory's whole bandwidth; two processes on one machine share it, and most so where each updates all parameters:

{table}"""
PUBLISHED = """Against published figures. Of the 2014 speed-ups, with 128 images a GPU, those of 2 and 4 are quoted from
memory; the 6.25 of 8 and the 98.05 hours on one were found quoted elsewhere:

{table}
The model gives every pair of devices a link of its own; a machine with eight shares some.
"""
MODELLED_TEXT = """## Modelled: images/s of the paper's network on 1 to 1024 devices

{table}
**Nothing in this table is measured** but the compute of one H200, {milliseconds:.2f} ms for {images} images
(`reports/data/{record}`); that of a GTX 580 follows from the paper's 5 to 6 days. Each device has {images} images.
Activations travel in bfloat16 between H200s and in float32 between GTX 580s, gradients in float32. Links:

{links}
"""


def text(rows: pd.DataFrame) -> str:
    """The whole report."""
    parts = [INTRODUCTION]
    link = measured_link(rows)
    validation = []
    for run in _runs(rows):
        first = run.iloc[0]
        found = _measured(run)
        table = _table([{name: row[name] for name in TIMES} for row in found])
        memory = _table([{name: row[name] for name in MEMORY} for row in found])
        parts.append(
            MEASURED.format(
                network=first["network"], shape=first["shape"], table=table, memory=memory, sources=_sources(run)
            )
        )
        if link is not None:
            validation += _validation(run, rows, link)
    parts += _alone(rows)
    parts.append(MODEL)
    if link is not None:
        speed, microseconds = link.bytes_per_s / 1e9, link.latency_s * 1e6
        parts.append(VALIDATION.format(gb_per_s=speed, microseconds=microseconds, table=_table(validation)))
    checks = [{"error_percent": "", **row} for row in published()]
    columns = {"check": "check", "published": "published", "model": "model", "error_percent": "error %"}
    parts.append(
        PUBLISHED.format(table=_table([{title: row[key] for key, title in columns.items()} for row in checks]))
    )
    row = _compute(rows)
    if row is not None:
        links = [
            f"- {each.name}: {each.bytes_per_s / 1e9:g} GB/s ({each.source}), {each.latency_s * 1e6:g} us assumed"
            for each in LINKS
        ]
        parts.append(
            MODELLED_TEXT.format(
                table=_table(_modelled(row)),
                milliseconds=row["median_us"] / 1e3,
                images=IMAGES,
                record=row["record"],
                links="\n".join(links),
            )
        )
    return "\n".join(parts)


def headline(rows: pd.DataFrame) -> str:
    """The comparison on README's page."""
    parts = []
    names = ("strategy", "processes", "images/s", "exposed", "hidden", "messages", "MiB sent")
    for run in _runs(rows):
        cells = [{name: each[name] for name in names} for each in _measured(run)]
        parts.append(f"Measured, {run.iloc[0]['network']}, {run.iloc[0]['shape']}:\n\n{_table(cells)}\n{_sources(run)}")
    row = _compute(rows)
    if row is not None:
        chosen = [
            {key: each[key] for key in ("link", "device", "strategy", "1", "2", "8")}
            for each in _modelled(row)
            if each["link"] in (PCIE_2012.name, "NVLink 4")
        ]
        title = "Modelled, not measured: images/s of the paper's network on 1, 2 and 8 GPUs, 128 images each:"
        parts.append(f"{title}\n\n{_table(chosen)}")
    return "\n".join(parts)


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Losses of the strategies, and predicted speed-ups."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for run in sorted(_runs(rows), key=lambda run: len(run.iloc[0]["losses"]))[-1:]:
        widths = iter((6, 4, 2.5, 1))
        for _, row in run.iterrows():
            left.plot(row["losses"], label=row["implementation"], linewidth=next(widths, 1))
        left.set(title=f"measured: {run.iloc[0]['network']}, {run.iloc[0]['shape']}", xlabel="update", ylabel="loss")
        left.legend()
    compute = _compute(rows)
    if compute is not None:
        seconds_per_image = compute["median_us"] * 1e-6 / IMAGES
        for link, style in zip((LINKS[1], LINKS[2]), ("--", "-"), strict=True):
            for number, strategy in enumerate(STRATEGIES):
                devices = [ranks for ranks in DEVICES if ranks > 1]
                speed_ups = [
                    IMAGES * ranks * seconds_per_image / _seconds(strategy, ranks, seconds_per_image, link, 2)
                    for ranks in devices
                ]
                right.plot(devices, speed_ups, style, color=f"C{number + 1}", label=f"{strategy}, {link.name}")
        right.set(title="modelled: speed-up over one H200", xlabel="devices", xscale="log", yscale="log")
        right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write(reports: Path, readme: Path, rows: pd.DataFrame) -> list[Path]:
    """Write the report, its plot and the tables between README's marks."""
    (reports / "parallelism.md").write_text(text(rows))
    draw(rows, reports / "parallelism.png")
    before, _, rest = readme.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if found:
        readme.write_text(f"{before}{BEGIN}\n{headline(rows)}{END}{after}")
    return [reports / "parallelism.md", reports / "parallelism.png"]
