"""The main findings in a few sentences and one chart; missing measurements are left out."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..measure.implementations import ours
from ..measure.records import Row, moment
from ..suite.trace import UNKNOWN, named
from .rows import Machine, best, fastest, machines_of

UPDATE, INFERENCE, TRAIN, STAGES = "update of paper", "inference of paper", "net.train of paper", "stages 1 + 2"
#: Number of busy processes in the condition that is quoted.
BUSY = 2
#: This project's operators, called without a compiler.
EAGER = "auto, eager"
#: What rows of one profile have in common.
PROFILED = ("commit", "implementation", "shape", "dtype")
NAMES = ("this project", "compiled PyTorch", "eager PyTorch")
#: Rivals in words.
RIVALS = {
    "aten, eager": "eager PyTorch",
    "aten, compiled": "compiled PyTorch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
#: Microseconds of ours, of compiled PyTorch and of eager PyTorch; None if not measured.
Times = tuple[float | None, float | None, float | None]


class Bar(NamedTuple):
    """Speedup over eager PyTorch, and the time in microseconds."""

    name: str
    ratio: float
    median_us: float


class Group(NamedTuple):
    """Bars of one task on one machine."""

    title: str
    bars: list[Bar]


def _of(rows: Iterable[Row], machine: Machine | None) -> list[Row]:
    return [row for row in rows if row["on"] == machine]


def _machine(rows: Sequence[Row], cpu: bool) -> Machine | None:
    """The GPU or CPU on which an update of the paper's network was timed last."""
    return next((one for one in machines_of(rows) if one.cpu == cpu and any(best(_of(rows, one), UPDATE))), None)


def _times(rows: Iterable[Row], case: str, mode: str | None = None) -> Times:
    own, compiled, eager = (row["median_us"] if row else None for row in best(rows, case, mode))
    return own, compiled, eager


def _contention(rows: Iterable[Row], busy: int) -> list[Row]:
    """Both stages, forward and backward, in a user's own program, with ``busy`` busy processes running.

    Without ``inductor``, which users get only by name.
    """
    its = [row for row in rows if row["suite"] == "contention" and row.get("busy_processes") == busy]
    return [row for row in its if row["implementation"] != "inductor"]


def _one(machine: Machine) -> str:
    """The processor with its article, by pronunciation: an NVIDIA."""
    return f"{'an' if machine.model[0] in 'AEIOUN' else 'a'} {machine.model}"


def _ms(microseconds: float) -> str:
    """Milliseconds in three digits."""
    value = microseconds / 1e3
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} ms"


def _as_fast(times: Times) -> str:
    """The speedup over PyTorch's own operators, in words."""
    own, compiled, eager = times
    ratios = []
    if own and compiled:
        ratios.append(f"{compiled / own:.2f} times as fast as compiled PyTorch")
    if own and eager:
        ratios.append(f"{eager / own:.2f} times as fast as eager PyTorch")
    return f": {' and '.join(ratios)}" if ratios else ""


def _batch(row: Row) -> int:
    return int(str(row["shape"]).partition("x")[0])


def _gpu_step(rows: Sequence[Row]) -> str | None:
    machine = _machine(rows, cpu=False)
    its = _of(rows, machine)
    own = best(its, UPDATE)[0]
    if machine is None or own is None:
        return None
    since = " The Triton kernels have been rewritten since." if "rewritten" in own.get("kernels_of", "") else ""
    return (
        f"[One training step of the paper's network](steps.md), {_batch(own)} images in {own['dtype']}, takes "
        f"{_ms(own['median_us'])} on {_one(machine)}, {own['images_per_s']:,.0f} images/s"
        f"{_as_fast(_times(its, UPDATE))}.{since}"
    )


def _gpu_time(rows: Sequence[Row]) -> str | None:
    """Where the step's time goes, and the fraction of its speed that ``net.train`` reaches."""
    machine = _machine(rows, cpu=False)
    its = _of(rows, machine)
    sentences = []
    steps = [row for row in its if row["suite"] == "profile" and row["case"] == UPDATE and ours(row)]
    layers: dict[str, float] = {}
    # Older records may profile a form of the step that is no longer in use.
    newest = max(steps, key=moment, default=None)
    for row in steps:
        same = newest is not None and all(row.get(key) == newest.get(key) for key in PROFILED)
        if same and row.get("kernel") != "sum" and "percent_of_step" in row:
            name = row.get("layer", UNKNOWN)
            if name == UNKNOWN:
                # The kernel's name may be known by now.
                name = named(row["kernel"]) or "kernels of no layer"
            layers[name] = layers.get(name, 0.0) + row["percent_of_step"]
    if layers and machine is not None:
        largest = sorted(layers, key=lambda name: -layers[name])[:3]
        names = ", ".join(f"{name} ({layers[name]:.0f} %)" for name in largest)
        unverified = " (unverified)" if newest is not None and newest.get("unverified") else ""
        sentences.append(
            f"[The largest parts of a training step](profile.md) on {_one(machine)}{unverified} are {names}."
        )
    train = fastest(row for row in its if row["suite"] == "train" and row["case"] == TRAIN and "percent_of_step" in row)
    if train is not None:
        sentences.append(
            f"[`net.train`](steps.md) from a packed store reaches {train['images_per_s']:,.0f} images/s, "
            f"{train['percent_of_step']:.0f} % of the step alone."
        )
    return " ".join(sentences) or None


def _cpu_stages(rows: Sequence[Row]) -> str | None:
    machine = _machine(rows, cpu=True)
    its = _of(rows, machine)
    alone = _contention(its, 0)
    times = _times(alone, STAGES)
    if machine is None or times[0] is None:
        return None
    threads = f" with {machine.threads} thread{'s' if machine.threads > 1 else ''}" if machine.threads else ""
    text = (
        f"[The two stages of normalization and pooling](contention.md), forward and backward, take {_ms(times[0])} on "
        f"{_one(machine)}{threads}{_as_fast(times)}."
    )
    uncompiled = fastest(row for row in alone if row["implementation"] == EAGER and "median_us" in row)
    if uncompiled is not None and times[2]:
        own = uncompiled["median_us"]
        text += f" Called eagerly, they take {_ms(own)}, {times[2] / own:.2f} times as fast as eager PyTorch."
    busy = _times(_contention(its, BUSY), STAGES)
    if busy[0]:
        text += f" With two busy processes running, they take {_ms(busy[0])}{_as_fast(busy)}."
    return text


def _cpu_network(rows: Sequence[Row]) -> str | None:
    its = _of(rows, _machine(rows, cpu=True))
    own = best(its, UPDATE)[0]
    if own is None:
        return None
    text = f"[The whole network](steps.md) trains on the same CPU at {own['images_per_s']:,.0f} images/s"
    text += f"{_as_fast(_times(its, UPDATE))}."
    inference = [
        row for row in its if row["case"] == INFERENCE and row.get("dtype") == "float32" and "median_us" in row
    ]
    pairs = []
    for batch in sorted({_batch(row) for row in inference}):
        same = [row for row in inference if _batch(row) == batch]
        mine, rival = fastest(filter(ours, same)), fastest(row for row in same if not ours(row))
        if mine is not None and rival is not None:
            pairs.append((batch, mine, rival, RIVALS.get(rival["implementation"], rival["implementation"])))
    if pairs and pairs[-1][0] > 1:
        batch, mine, rival, name = pairs[-1]
        text += (
            f" Inference in batches of {batch} runs at {mine['images_per_s']:,.0f} images/s; {name}, the fastest "
            f"rival measured, reaches {rival['images_per_s']:,.0f}."
        )
    if pairs and pairs[0][0] == 1:
        _, mine, rival, name = pairs[0]
        text += f" One image takes {_ms(mine['median_us'])}, and {_ms(rival['median_us'])} in {name}."
    return text


def sentences(rows: Sequence[Row]) -> list[str]:
    """The findings as Markdown; ``rows`` are those of :func:`bench.report.rows.measured`."""
    found = (_gpu_step(rows), _gpu_time(rows), _cpu_stages(rows), _cpu_network(rows))
    return [text for text in found if text is not None]


def groups(rows: Sequence[Row]) -> list[Group]:
    """The chart: speedups over eager PyTorch on the newest GPU and CPU."""
    tasks: list[tuple[str, Times]] = []
    for machine in (_machine(rows, cpu=False), _machine(rows, cpu=True)):
        if machine is not None:
            its = _of(rows, machine)
            tasks.append((f"Training step of the network, {machine.model}", _times(its, UPDATE)))
            if machine.cpu:
                alone, busy = (_times(_contention(its, count), STAGES) for count in (0, BUSY))
                tasks.append((f"Stages 1 and 2, forward and backward, {machine.model}", alone))
                tasks.append(("The same with two busy processes running", busy))
    found = []
    for title, times in tasks:
        own, _, eager = times
        if own and eager:
            bars = [Bar(name, eager / time, time) for name, time in zip(NAMES, times, strict=True) if time]
            found.append(Group(title, bars))
    return found
