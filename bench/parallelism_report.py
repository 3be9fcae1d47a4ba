"""Tables of the strategies, measured first, modelled last, from records: ``reports/parallelism.md``."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from net.common.files import atomic_write
from net.model.config import network

from .cost_model import (
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
from .messages import expected
from .one_rank import ALONE_CASE
from .parallel_losses import LOSSES_CASE, REORDERED
from .parallelism import ALL_CORES, CASE, LINK_CASE
from .parallelism_figures import Picture, pictures
from .records import Row, moment
from .tables import Cell, escaped, number, without_html

BEGIN, END = "<!-- parallelism: begin -->", "<!-- parallelism: end -->"
#: Devices of the modelled table.
DEVICES = (1, 2, 4, 8, 64, 1024)
ORDER = ("none", ALL_CORES, REORDERED, *STRATEGIES)
MODELLED = "Modelled, not measured"
#: The links of today for which the messages of a rank that was measured by itself are modelled.
ALONE_LINKS = LINKS[1:3]
ABOUT = (
    "The strategies of `net.parallel` at equal global batch and seed. Tables say on which machine they were measured; "
    "what is modelled comes last and says so in its title. Speed-up is over one process that has all the cores. "
    "Compute, exposed and overlapped communication are from the trace of one further update, which is slower than an "
    "untraced one: communication is exposed while its rank computes nothing."
)
COUNTED = (
    "Messages and MiB that a rank sends in one update, counted, and in parentheses by formula; memory of rank 0. "
    "Activations are what autograd saves; process peak includes Python and PyTorch."
)
LOSSES = (
    "The same short training under every strategy, without dropout. `{reordered}` is one process with the images of "
    "each batch in reverse: the same sums in another order. Difference is the largest from the losses of `none` in the "
    "first epoch. In float64 all agree up to rounding. In float32 rounding grows until the losses part, as it does "
    "between the two orders in one process, and the trainings end alike."
)
VALIDATION = (
    "The cost model held against the updates above: the compute of a rank measured by itself, or the share of the "
    "plain run where none was, and the messages over the link that was measured on this machine: {gb_per_s:.2f} GB/s, "
    "{microseconds:,.0f} us. A rank by itself has the machine's memory bandwidth alone; two processes share it."
)
ALONE = (
    "Rank 0 computes and its messages are left out, so one device is enough; `none` is one device with the whole "
    "batch. The messages of an update are modelled, none of them overlapped. Do not add the two."
)
PUBLISHED = (
    "Speed-ups of 2014 with 128 images a GPU: those of 2 and 4 are quoted from memory, the 6.25 of 8 and the 98.05 "
    "hours on one GPU as others quote them. The model gives every pair of devices a link of its own; eight GPUs in one "
    "machine share some."
)
DEVICES_NOTE = (
    "Images/s of the paper's network, {images} images on each device. Measured is only the compute of one device: "
    "{devices}; that of a GTX 580 follows from the paper's 5 to 6 days. An update takes compute / devices + exposed "
    "messages; a message takes latency x rounds + bytes / bandwidth. Averaged gradients overlap the backward pass, two "
    "thirds of the compute; exchanged activations overlap nothing. That compute divides evenly is the weakest part: "
    "with data parallelism each device updates all parameters. Links are assumptions, and whether a device can have "
    "one is not checked: {links}."
)


class Table(NamedTuple):
    """A title, columns, rows of cells, and a line for each record that figures come from."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]
    sources: list[str]

    def markdown(self) -> str:
        align = [
            "right" if any(cell.value is not None for cell in column) else "left"
            for column in zip(*self.rows, strict=True)
        ]
        cells = [[escaped(cell.text) for cell in row] for row in self.rows]
        body = tabulate(cells, self.columns, "github", disable_numparse=True, colalign=align)
        lines = ["- " + without_html(line).replace("; ", ";\n  ") for line in self.sources]
        return "\n".join([body, *([""] if lines else []), *lines]) + "\n"


class Part(NamedTuple):
    """A table of the report, the paragraph that explains it, and the machine it was measured on."""

    table: Table
    note: str
    machine: str
    modelled: bool = False


def _text(value: object) -> Cell:
    return Cell("-" if value is None else str(value))


def _value(value: float | None, how: str = "{:,.1f}") -> Cell:
    return Cell("-") if value is None else Cell(how.format(value), value)


def _ms(row: Row, key: str) -> Cell:
    """Milliseconds of a column in microseconds, or why there are none."""
    if key in row:
        return Cell(number(row[key] / 1e3), row[key] / 1e3)
    return Cell(row.get("status", "-") if key == "median_us" else "-")


def _sources(rows: Iterable[Row]) -> list[str]:
    lines = [
        f"`reports/data/{row['record']}`: {row['date']}, commit {row.get('commit', 'unknown')}"
        f"{' with changes' if row.get('dirty') else ''}; {row['machine']}, torch {row.get('torch')}"
        for row in rows
    ]
    return list(dict.fromkeys(lines))


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


def _speed_up(row: Row, run: Sequence[Row]) -> Cell:
    whole = next((other for other in run if other["implementation"] == ALL_CORES), None)
    if whole is None or "median_us" not in row:
        return Cell("-")
    return _value(whole["median_us"] / row["median_us"], "{:.2f}")


def _times(run: Sequence[Row]) -> Table:
    columns = ("strategy", "world size", "cores per process", "images/s", "speed-up", "update ms", "compute ms")
    cells = [
        [
            _text(
                row["implementation"].partition(",")[0] if row["implementation"] == ALL_CORES else row["implementation"]
            ),
            _value(row.get("ranks"), "{:d}"),
            # The first records do not say.
            _value(row.get("cores_per_process"), "{:d}"),
            _value(row.get("images_per_s")),
            _speed_up(row, run),
            *(_ms(row, key) for key in ("median_us", "compute_us", "exposed_us", "hidden_us")),
        ]
        for row in run
    ]
    return Table(f"Update of {_named(run)}", (*columns, "exposed ms", "overlapped ms"), cells, _sources(run))


def _counted(run: Sequence[Row]) -> Table:
    memory = ("parameters", "gradients", "optimizer", "activations", "process peak")
    cells = []
    for row in run:
        alone = row.get("ranks") == 1
        messages, sent = row.get("messages"), row.get("sent_mib")
        cells.append(
            [
                _text(row["implementation"]),
                _text(None) if alone else Cell(f"{messages} ({row.get('formula_messages')})", messages),
                _text(None) if alone else Cell(f"{sent:,.3f} ({row.get('formula_sent_mib', 0):,.3f})", sent),
                *(_value(row.get(f"{name.replace(' ', '_')}_mib")) for name in memory),
            ]
        )
    columns = ("strategy", "messages", "MiB sent", *(f"{name} MiB" for name in memory))
    return Table(f"Messages and memory, {_named(run)}", columns, cells, _sources(run))


def _losses(run: Sequence[Row]) -> Table:
    plain = run[0]
    cells = []
    for row in run:
        wrong = round(row["top1_error_percent"] * row["validation_images"] / 100)
        first = -(-row["updates"] // row["epochs"])
        pairs = zip(row["losses"][:first], plain["losses"][:first], strict=True)
        cells.append(
            [
                _text(row["implementation"]),
                _value(row["ranks"], "{:d}"),
                _value(row.get("cores_per_process"), "{:d}"),
                _value(row["updates"], "{:d}"),
                _value(max(abs(a - b) for a, b in pairs), "{:.1e}"),
                _value(sum(row["losses"][-first:]) / first, "{:.4f}"),
                _value(row["validation_loss"], "{:.4f}"),
                Cell(f"{row['top1_error_percent']:.2f} ({wrong} of {row['validation_images']})", wrong),
            ]
        )
    said = ("strategy", "world size", "cores per process", "updates", "difference")
    columns = (*said, "loss of the last epoch", "validation loss", "top-1 error %")
    return Table(f"Losses, {run[0]['dtype']}, {_named(run)}", columns, cells, _sources(run))


def _validation(measured: Sequence[Sequence[Row]], rows: Sequence[Row], link: Link) -> Table:
    """Predicted from a rank's own time, or its share of the plain run's, and the link, against measured."""
    task = ("machine", "network", "shape", "dtype")
    cells, used = [], []
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
            config = network(row["network"], dropout=0.0)
            source = own[-1] if own else plain
            assert source is not None
            shares = row["ranks"] if own else 1
            seconds_per_image = source["median_us"] * 1e-6 * shares / batch
            seconds = predict(config, row["implementation"], row["ranks"], batch, seconds_per_image, link).seconds
            found = row["median_us"] * 1e-6
            used += [row, source]
            cells.append(
                [
                    _text(row["network"]),
                    _text(row["implementation"]),
                    _value(seconds * 1e3),
                    _value(found * 1e3),
                    _value(100 * (seconds / found - 1), "{:+.0f}"),
                ]
            )
    columns = ("network", "strategy", "modelled ms", "measured ms", "error %")
    return Table("The cost model against these measurements", columns, cells, _sources(used))


def _alone(run: Sequence[Row]) -> Table:
    shape, dtype = run[0].get("shape", ""), run[0].get("dtype")
    cells = []
    for row in run:
        line = [_text(row["implementation"]), _value(row.get("ranks"), "{:d}")]
        line += [_value(row.get("cores_per_process"), "{:d}"), _ms(row, "median_us")]
        for link in ALONE_LINKS:
            seconds = 0.0
            if row.get("ranks", 1) > 1:
                batch, width = int(shape.partition("x")[0]), 2 if dtype == "bfloat16" else 4
                messages = expected(network(row["network"]), row["implementation"], row["ranks"], batch, width)
                seconds = sum(message_seconds(message, link) for message in messages)
            line.append(_value(seconds * 1e3 if seconds else None, "{:,.2f}"))
        cells.append(line)
    links = [f"messages over {link.name}, modelled ms" for link in ALONE_LINKS]
    title = f"One rank by itself, {run[0]['network']}, {shape}, {dtype}, {run[0].get('compiled')}"
    return Table(title, ("strategy", "world size", "cores per process", "one rank ms", *links), cells, _sources(run))


def computes(rows: Iterable[Row]) -> list[Row]:
    """What predictions take their compute from: of each GPU our fastest update of the paper's network, 128 images."""
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


def _modelled(gpus: Sequence[Row]) -> Table:
    gtx_580 = network("paper").multiply_adds * gtx_580_seconds_per_multiply_add()
    devices = [("GTX 580", gtx_580, 4, [PCIE_2012])]
    for row in gpus:
        width = 2 if row.get("dtype") == "bfloat16" else 4
        devices.append((row["machine"], row["median_us"] * 1e-6 / IMAGES, width, list(LINKS[1:])))
    cells = []
    for name, seconds_per_image, width, links in devices:
        for link in links:
            for strategy in STRATEGIES:
                line = [_text(name), _text(link.name), _text(strategy)]
                for ranks in DEVICES:
                    # Two towers take two devices.
                    if strategy == "tower" and ranks == 1:
                        line.append(_text(None))
                    else:
                        seconds = scaled_seconds(strategy, ranks, seconds_per_image, link, width)
                        line.append(_value(IMAGES * ranks / seconds, "{:,.0f}"))
                cells.append(line)
    title = f"{MODELLED}: images/s of the paper's network on 1 to {max(DEVICES)} devices"
    return Table(title, ("device", "link", "strategy", *map(str, DEVICES)), cells, _sources(gpus))


def _published() -> Table:
    cells = [
        [
            _text(row["check"]),
            _text(row["published"]),
            _text(row["model"]),
            _text(row.get("error_percent")),
        ]
        for row in published()
    ]
    title = f"{MODELLED}: the cost model against published figures"
    return Table(title, ("check", "published", "model", "error %"), cells, [])


def parts(rows: Sequence[Row]) -> list[Part]:
    """Every table with its note: what was measured, by machine, the newest first; then what is modelled.

    Args:
        rows: as :func:`bench.records.read` returns them, oldest first.
    """
    measured: dict[str, list[Part]] = {}
    found = runs(rows)
    last = {row["machine"]: moment(row) for row in rows}
    for run in found:
        machine = run[0]["machine"]
        measured.setdefault(machine, [])
        measured[machine] += [Part(_times(run), "", machine), Part(_counted(run), COUNTED, machine)]
    for run in losses(rows):
        machine = run[0]["machine"]
        note = LOSSES.format(reordered=REORDERED)
        measured.setdefault(machine, []).append(Part(_losses(run), note, machine))
    for run in _groups(rows, ALONE_CASE, ("machine", "network", "shape", "dtype", "compiled")):
        machine = run[0]["machine"]
        measured.setdefault(machine, []).append(Part(_alone(run), ALONE, machine))
    for machine in list(measured):
        link = measured_link(rows, machine)
        its = [run for run in found if run[0]["machine"] == machine]
        if link is not None and its:
            note = VALIDATION.format(gb_per_s=link.bytes_per_s / 1e9, microseconds=link.latency_s * 1e6)
            measured[machine].append(Part(_validation(its, rows, link), note, machine))
    names = sorted(measured, key=lambda name: last[name], reverse=True)
    result = [part for name in names for part in measured[name] if part.table.rows]
    gpus = computes(rows)
    if gpus:
        devices = "; ".join(
            f"{row['machine']}, {number(row['median_us'] / 1e3)} ms in {row.get('dtype')} (`{row['record']}`)"
            for row in gpus
        )
        links = "; ".join(
            f"{link.name} {link.bytes_per_s / 1e9:g} GB/s ({link.source}) and {link.latency_s * 1e6:g} us"
            for link in LINKS
        )
        note = DEVICES_NOTE.format(images=IMAGES, devices=devices, links=links)
        result.append(Part(_modelled(gpus), note, "", modelled=True))
    result.append(Part(_published(), PUBLISHED, "", modelled=True))
    return result


def figures(rows: Sequence[Row]) -> list[Picture]:
    """The figures whose rows are there."""
    return pictures(losses(rows), computes(rows))


def _fill(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def text(rows: Sequence[Row]) -> str:
    """The whole report."""
    drawn = figures(rows)
    lines = [
        "# Parallelism\n",
        "Made from the records by `python -m bench.report`; `python -m bench.parallelism` measures.\n",
        _fill(ABOUT),
        *(f"![{picture.alt}]({picture.file})\n" for picture in drawn if not picture.modelled),
    ]
    machine = None
    for part in parts(rows):
        if part.machine != machine:
            machine = part.machine
            lines.append(f"## {machine or MODELLED}\n")
            lines += [f"![{each.alt}]({each.file})\n" for each in drawn if each.modelled and not machine]
        lines += [f"### {part.table.title}\n", *([_fill(part.note)] if part.note else []), part.table.markdown()]
    return "\n".join(lines)


def headline(rows: Sequence[Row]) -> str:
    """README's table: the paper's network under every strategy, on the machine that was measured last."""
    its = [run for run in runs(rows) if run[0]["network"] == "paper"]
    if not its:
        return "Not measured.\n"
    table = _times(max(its, key=lambda run: max(map(moment, run))))
    return f"{table.title}, measured:\n\n{table.markdown()}"


def write(reports: Path, readme: Path, rows: Sequence[Row]) -> list[Path]:
    """Write the report, its figures and the table between README's marks; returns the files."""
    files = {reports / "parallelism.md": text(rows).encode()}
    files |= {reports / picture.file: picture.png() for picture in figures(rows)}
    before, _, rest = (readme.read_text() if readme.is_file() else "").partition(BEGIN)
    _, found, after = rest.partition(END)
    if found:
        files[readme] = f"{before}{BEGIN}\n{headline(rows)}{END}{after}".encode()
    for path, content in files.items():
        with atomic_write(path) as file:
            file.write(content)
    return list(files)
