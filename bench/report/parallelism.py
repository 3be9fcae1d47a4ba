"""The page of parallel strategies: measurements by machine, then modelled values."""

from collections.abc import Iterable, Sequence

from net.model.config import network

from ..measure.records import Row, moment
from ..parallelism import ALL_CORES, CASE, LINK_CASE
from ..predict.cost_model import (
    IMAGES,
    LINKS,
    PCIE_2012,
    STRATEGIES,
    Link,
    gtx_580_seconds_per_multiply_add,
    message_seconds,
    predict,
    published,
    scaled_seconds,
)
from ..predict.messages import expected
from ..subjects.one_rank import ALONE_CASE
from ..subjects.parallel_losses import LOSSES_CASE, REORDERED
from . import parallelism_figures
from .tables import Cell, Column, Page, Section, Table, detail, number, sources

#: Devices of the modelled table.
DEVICES = (1, 2, 4, 8, 64, 1024)
ORDER = ("none", ALL_CORES, REORDERED, *STRATEGIES)
MODELLED = "Modelled, not measured"
#: Links for which the messages of a rank measured by itself are modelled.
ALONE_LINKS = LINKS[1:3]
ABOUT = (
    "The strategies of `net.parallel` at equal global batch and seed. Measurements are grouped by machine; modelled "
    "tables come last and say so in the title. Speedup is over one process with all the cores. Compute, exposed and "
    "overlapped communication come from a trace of one additional step, which is slower than an untraced one. "
    "Communication is exposed when its rank computes nothing meanwhile."
)
COUNTED = (
    "Messages and MiB that one rank sends per step: counted, with the formula's value in parentheses; memory of rank "
    "0. Activations are the tensors that autograd saves; process peak includes Python and PyTorch."
)
LOSSES = (
    "The same short training run under every strategy, without dropout. `{reordered}` is one process with the images "
    "of each batch in reverse: the same sums in another order. Difference is the largest deviation from the losses of "
    "`none` in the first epoch. In float64 all agree up to rounding. In float32, rounding errors grow until the losses "
    "diverge, as they do between the two orders in one process; the final losses are similar."
)
VALIDATION = (
    "The cost model compared with the steps above. It adds the compute of a rank measured by itself (or else its share "
    "of the single-process run) and the messages over the link measured on this machine: {gb_per_s:.2f} GB/s, "
    "{microseconds:,.0f} us. A rank by itself has the machine's full memory bandwidth; two processes share it."
)
ALONE = (
    "Rank 0 computes without sending its messages, so one device is enough; `none` is one device with the whole batch. "
    "The messages of a step are modelled without overlap, so do not add the two times."
)
PUBLISHED = (
    "Speedups of 2014 with 128 images per GPU. Those for 2 and 4 GPUs are quoted from memory; the 6.25 for 8 and the "
    "98.05 hours on one GPU are quoted from secondary sources. The model gives every pair of devices its own link; "
    "eight GPUs in one machine share some."
)
DEVICES_NOTE = (
    "Images/s of the paper's network, {images} images on each device. Only the compute of one device is measured: "
    "{devices}; that of a GTX 580 follows from the paper's 5 to 6 days. A step takes compute / devices + exposed "
    "messages; a message takes latency x rounds + bytes / bandwidth. Gradient averaging overlaps the backward pass, "
    "two thirds of the compute; activation exchange overlaps nothing. The weakest assumption is that compute divides "
    "evenly: with data parallelism, each device updates all parameters. Links are assumptions, and whether a device "
    "can have one is not checked: {links}."
)
NOT_RECORDED = "not recorded"
WHO = (
    Column("strategy", "implementation"),
    Column("world size", "ranks", "{:.0f}", NOT_RECORDED),
    Column("cores per process", "cores_per_process", "{:.0f}", NOT_RECORDED),
)
TIMES = (
    *WHO,
    Column("images/s", "images_per_s", "{:,.1f}"),
    Column("speedup", "speed_up", "{:.2f}", "one process with all cores was not measured"),
    *(
        Column(f"{title} ms", f"{key}_us", "ms")
        for title, key in (
            ("update", "median"),
            ("compute", "compute"),
            ("exposed", "exposed"),
            ("overlapped", "hidden"),
        )
    ),
)
ALONE_SENDS = "one process sends nothing"
MESSAGES = (
    Column("strategy", "implementation"),
    Column("messages", "counted_messages", "number", ALONE_SENDS),
    Column("MiB sent", "counted_mib", "number", ALONE_SENDS),
    *(
        Column(f"{name} MiB", f"{name.replace(' ', '_')}_mib", "{:,.1f}", NOT_RECORDED)
        for name in ("parameters", "gradients", "optimizer", "activations", "process peak")
    ),
)
TRAINED = (
    *WHO,
    Column("updates", "updates", "{:.0f}"),
    Column("difference", "difference", "{:.1e}"),
    Column("loss in the last epoch", "last_loss", "{:.4f}"),
    Column("validation loss", "validation_loss", "{:.4f}"),
    Column("top-1 error %", "error", "number"),
)
HELD = (
    Column("network", "network"),
    Column("strategy", "implementation"),
    Column("modelled ms", "modelled_us", "ms"),
    Column("measured ms", "median_us", "ms"),
    Column("error %", "error_percent", "{:+.0f}"),
)
CHECKED = (
    Column("check", "check"),
    Column("published", "published"),
    Column("model", "model", "{}"),
    Column("error %", "error_percent", "{}", "the paper gives no value"),
)


def _groups(rows: Iterable[Row], case: str, keys: Sequence[str]) -> list[list[Row]]:
    """The newest row of each implementation, by ``keys``, in the order of :data:`ORDER`; ``rows`` are oldest first."""
    newest = {(*(row.get(key) for key in keys), row["implementation"]): row for row in rows if row["case"] == case}
    groups: dict[tuple[object, ...], list[Row]] = {}
    for (*group, _), row in newest.items():
        groups.setdefault(tuple(group), []).append(row)
    known = {name: place for place, name in enumerate(ORDER)}
    return [sorted(group, key=lambda row: known.get(row["implementation"], len(known))) for group in groups.values()]


def runs(rows: Iterable[Row]) -> list[list[Row]]:
    """The newest comparison of each network and machine, the paper's network first: a row for each strategy."""
    return sorted(_groups(rows, CASE, ("machine", "network", "shape")), key=lambda run: run[0]["network"] != "paper")


def losses(rows: Iterable[Row]) -> list[list[Row]]:
    """The newest training of each machine and dtype under every strategy; only losses of one record are compared."""
    newest: dict[tuple[object, ...], list[Row]] = {}
    for group in _groups(rows, LOSSES_CASE, ("machine", "network", "shape", "dtype", "record")):
        if len(group) > 1 and group[0]["implementation"] == "none":
            newest[tuple(group[0][key] for key in ("machine", "network", "shape", "dtype"))] = group
    # The exact ones first.
    return sorted(newest.values(), key=lambda group: group[0]["dtype"], reverse=True)


def measured_link(rows: Iterable[Row], machine: str) -> Link | None:
    """Latency and bandwidth between two processes of a machine: the newest all-reduces of one number and of 64 MiB."""
    newest = {row["shape"]: row for row in rows if row["case"] == LINK_CASE and row["machine"] == machine}
    if not {"1", str(2**24)} <= newest.keys():
        return None
    small, large = newest["1"], newest[str(2**24)]
    return Link(
        "gloo", large["sent_mib"] * 2**20 / (large["median_us"] * 1e-6), small["median_us"] * 1e-6 / 2, large["record"]
    )


def _named(run: Sequence[Row]) -> str:
    return f"{run[0]['network']}, {run[0]['shape']}"


def _table(title: str, rows: Sequence[Row], columns: Sequence[Column], about: str = "") -> list[Table]:
    """A table of rows; threads differ from row to row and are not named with the records."""
    return detail(title, [{name: row[name] for name in row if name != "threads"} for row in rows], columns, about=about)


def _times(run: Sequence[Row]) -> list[Table]:
    whole = next((row["median_us"] for row in run if row["implementation"] == ALL_CORES), None)
    rows = []
    for row in run:
        row = {**row, "implementation": row["implementation"].removesuffix(ALL_CORES.removeprefix("none"))}
        if whole is not None and "median_us" in row:
            row["speed_up"] = whole / row["median_us"]
        rows.append(row)
    return _table(f"Update of {_named(run)}", rows, TIMES)


def _messages(run: Sequence[Row]) -> list[Table]:
    rows = []
    for row in run:
        if row.get("ranks") != 1 and "messages" in row:
            messages, sent = row["messages"], row["sent_mib"]
            formula = f"{messages} ({row.get('formula_messages')})"
            sent_formula = f"{sent:,.3f} ({row.get('formula_sent_mib', 0):,.3f})"
            row = {**row, "counted_messages": Cell(formula, messages), "counted_mib": Cell(sent_formula, sent)}
        rows.append(row)
    return _table(f"Messages and memory, {_named(run)}", rows, MESSAGES, COUNTED)


def _losses(run: Sequence[Row]) -> list[Table]:
    rows = []
    for row in run:
        wrong = round(row["top1_error_percent"] * row["validation_images"] / 100)
        epoch = -(-row["updates"] // row["epochs"])
        pairs = zip(row["losses"][:epoch], run[0]["losses"][:epoch], strict=True)
        rows.append(
            {
                **row,
                "difference": max(abs(a - b) for a, b in pairs),
                "last_loss": sum(row["losses"][-epoch:]) / epoch,
                "error": Cell(f"{row['top1_error_percent']:.2f} ({wrong} of {row['validation_images']})", wrong),
            }
        )
    title = f"Losses, {run[0]['dtype']}, {_named(run)}"
    return _table(title, rows, TRAINED, LOSSES.format(reordered=REORDERED))


def _validation(measured: Sequence[Sequence[Row]], rows: Sequence[Row], link: Link) -> list[Table]:
    """Measured times compared with predictions from the link and a rank's own time, or its share of the plain run's."""
    task = ("machine", "network", "shape", "dtype")
    found, used = [], []
    for run in measured:
        plain = next((row for row in run if row["implementation"] == "none" and "median_us" in row), None)
        for row in run:
            own = [
                other
                for other in rows
                if other["case"] == ALONE_CASE
                and all(other.get(key) == row.get(key) for key in (*task, "implementation"))
                and other.get("compiled") == "eager"
                and "median_us" in other
            ]
            if row["ranks"] == 1 or "median_us" not in row or not (own or plain):
                continue
            batch = int(row["shape"].partition("x")[0])
            source = own[-1] if own else plain
            assert source is not None
            seconds_per_image = source["median_us"] * 1e-6 * (row["ranks"] if own else 1) / batch
            config = network(row["network"], dropout=0.0)
            seconds = predict(config, row["implementation"], row["ranks"], batch, seconds_per_image, link).seconds
            error = 100 * (seconds * 1e6 / row["median_us"] - 1)
            found.append({**row, "modelled_us": seconds * 1e6, "error_percent": error})
            used += [row, source]
    about = VALIDATION.format(gb_per_s=link.bytes_per_s / 1e9, microseconds=link.latency_s * 1e6)
    used = [{name: row[name] for name in row if name != "threads"} for row in used]
    tables = _table("The cost model against these measurements", found, HELD, about)
    return [table._replace(sources=sources(used)) for table in tables]


def _alone(run: Sequence[Row]) -> list[Table]:
    shape, dtype = run[0].get("shape", ""), run[0].get("dtype")
    links = [
        Column(f"messages over {link.name}, modelled ms", link.name, "{:,.2f}", ALONE_SENDS) for link in ALONE_LINKS
    ]
    rows = []
    for row in run:
        row = {**row}
        if row.get("ranks", 1) > 1:
            batch, width = int(shape.partition("x")[0]), 2 if dtype == "bfloat16" else 4
            messages = expected(network(row["network"]), row["implementation"], row["ranks"], batch, width)
            for link in ALONE_LINKS:
                row[link.name] = 1e3 * sum(message_seconds(message, link) for message in messages)
        rows.append(row)
    title = f"One rank by itself, {run[0]['network']}, {shape}, {dtype}, {run[0].get('compiled')}"
    return _table(title, rows, [*WHO, Column("one rank ms", "median_us", "ms"), *links], ALONE)


def computes(rows: Iterable[Row]) -> list[Row]:
    """The compute that predictions use: each GPU's fastest step of our paper network with 128 images."""
    fastest: dict[str, Row] = {}
    for row in rows:
        ours = str(row.get("implementation")).startswith("triton")
        shape = str(row.get("shape")).partition("x")[0]
        if row["case"] != "update of paper" or not ours or shape != str(IMAGES) or "median_us" not in row:
            continue
        best = fastest.get(row["machine"])
        # Of the newest record.
        if best is None or best["record"] != row["record"] or row["median_us"] < best["median_us"]:
            fastest[row["machine"]] = row
    return sorted(
        (row for name, row in fastest.items() if not name.startswith("CPU")),
        key=lambda row: (moment(row), row["machine"]),
        reverse=True,
    )


def _modelled(gpus: Sequence[Row]) -> list[Table]:
    gtx_580 = network("paper").multiply_adds * gtx_580_seconds_per_multiply_add()
    devices = [("GTX 580", gtx_580, 4, [PCIE_2012])]
    for row in gpus:
        width = 2 if row.get("dtype") == "bfloat16" else 4
        devices.append((row["machine"], row["median_us"] * 1e-6 / IMAGES, width, list(LINKS[1:])))
    rows: list[Row] = []
    for name, seconds_per_image, width, links in devices:
        for link in links:
            for strategy in STRATEGIES:
                line: Row = {"device": name, "link": link.name, "strategy": strategy}
                for ranks in DEVICES:
                    # Two towers take two devices.
                    if strategy != "tower" or ranks > 1:
                        seconds = scaled_seconds(strategy, ranks, seconds_per_image, link, width)
                        line[str(ranks)] = IMAGES * ranks / seconds
                rows.append(line)
    columns = [Column(name, name) for name in ("device", "link", "strategy")]
    columns += [Column(str(ranks), str(ranks), "{:,.0f}", "two towers take two devices") for ranks in DEVICES]
    named = "; ".join(
        f"{row['machine']}, {number(row['median_us'] / 1e3)} ms in {row.get('dtype')} (`{row['record']}`)"
        for row in gpus
    )
    described = "; ".join(
        f"{link.name} {link.bytes_per_s / 1e9:g} GB/s ({link.source}) and {link.latency_s * 1e6:g} us" for link in LINKS
    )
    title = f"{MODELLED}: images/s of the paper's network on 1 to {max(DEVICES)} devices"
    about = DEVICES_NOTE.format(images=IMAGES, devices=named, links=described)
    (table,) = detail(title, [{**row, **gpus[0], **row} for row in rows], columns, about=about)
    return [table._replace(sources=sources(gpus))]


def _published() -> list[Table]:
    rows = [{**row, "machine": "", "record": "", "date": ""} for row in published()]
    tables = detail(f"{MODELLED}: the cost model against published figures", rows, CHECKED, about=PUBLISHED)
    return [table._replace(sources=()) for table in tables]


def page(rows: Sequence[Row]) -> Page:
    """Measurements by machine, the newest first; then modelled values.

    Args:
        rows: as :func:`bench.measure.records.read` returns them, oldest first.
    """
    tables: dict[str, list[Table]] = {}
    found, trained = runs(rows), losses(rows)
    for run in found:
        tables.setdefault(run[0]["machine"], []).extend([*_times(run), *_messages(run)])
    for run in trained:
        tables.setdefault(run[0]["machine"], []).extend(_losses(run))
    for run in _groups(rows, ALONE_CASE, ("machine", "network", "shape", "dtype", "compiled")):
        tables.setdefault(run[0]["machine"], []).extend(_alone(run))
    for machine, its in tables.items():
        link = measured_link(rows, machine)
        measured = [run for run in found if run[0]["machine"] == machine]
        if link is not None and measured:
            its += _validation(measured, rows, link)
    last = {row["machine"]: moment(row) for row in rows}
    machines = sorted(tables, key=lambda name: last[name], reverse=True)
    sections = [
        Section(name, (), tables[name], "CPU" if name.startswith("CPU") else "GPU") for name in machines if tables[name]
    ]
    gpus = computes(rows)
    scaling = parallelism_figures.scaling(gpus)
    sections.append(Section(MODELLED, scaling, [*(_modelled(gpus) if gpus else []), *_published()]))
    line = "two processes compared with one, and a cost model for many devices"
    return Page("parallelism", "Parallelism", line, ABOUT, sections, parallelism_figures.losses(trained))
