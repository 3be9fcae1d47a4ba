"""The strategies compared at equal global batch and seed: ``python -m bench.parallelism``.

Every measurement runs in its own processes: one for ``none``, ``--ranks`` for a strategy. On a CPU each process gets an
equal share of the cores, and ``none, all cores`` is one process with all of them. A step is timed, then traced, and its
messages are counted. Values are those of rank 0.
"""

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, start_processes
from torch.profiler import ProfilerActivity, profile

from kernels import private
from net.common import cli
from net.common.allocator import keep_freed_memory
from net.common.cli import Parser, spin_briefly
from net.common.device import peak_memory_mib, set_precision
from net.common.fields import at_least, flag_name
from net.common.progress import duration
from net.data.processes import available_cores
from net.model.alexnet import AlexNet
from net.model.config import VARIANTS, network
from net.parallel.strategies import parallelize
from net.training.config import TrainConfig
from net.training.recipe import PaperSGD, parameter_groups

from .measure.records import DATA, time_columns, write
from .predict.messages import SENT, Count, expected
from .subjects.one_rank import alone, usable
from .subjects.parallel_losses import BATCH, EPOCHS, REORDERED, VARIANT, learn

DESCRIPTION = (
    "Compare the strategies of net.parallel at equal global batch size and seed. Every measurement runs in its own "
    "processes, which share the cores of a CPU equally; figures are those of rank 0."
)
CASE = "update of a network in parallel"
LINK_CASE = "all-reduce of two processes"
#: One process with all of a CPU's cores, which a strategy's ranks share.
ALL_CORES = "none, all cores"
#: Allowed values of ``--only``.
ALL = ("none", "all-cores", "data", "tower", "hybrid", "alone", "link", *(f"losses-{dtype}" for dtype in EPOCHS))
#: The files in which rank 0 leaves a job's rows, and all ranks what they print.
ROWS, LOG = "rows.json", "log"
Intervals = list[tuple[float, float]]


def union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """The union of intervals: sorted, without overlaps."""
    merged: Intervals = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def length(intervals: Intervals) -> float:
    """Total length of a union of intervals."""
    return sum(end - start for start, end in intervals)


def common(a: Intervals, b: Intervals) -> Intervals:
    """The intersection of two unions."""
    return [
        (max(start, other), min(end, other_end))
        for start, end in a
        for other, other_end in b
        if max(start, other) < min(end, other_end)
    ]


def split(trace: profile) -> dict[str, float]:
    """Microseconds of a traced step: compute, exposed communication, and communication overlapped by compute.

    On a GPU kernels count as compute; on a CPU PyTorch's own operators, which never wait for a message.
    """
    events = trace.events()
    assert events is not None
    gpu = [event for event in events if event.device_type != private.found("torch._C._autograd.DeviceType").CPU]
    computing, messages = [], []
    for event in gpu or events:
        interval = (event.time_range.start, event.time_range.end)
        if event.name.startswith(("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")):
            messages.append(interval)
        elif gpu or event.name.startswith("aten::"):
            computing.append(interval)
    computed, sent = union(computing), union(messages)
    hidden = length(common(computed, sent))
    return {"compute_us": length(computed), "exposed_us": length(sent) - hidden, "hidden_us": hidden}


def _mib(tensors: Iterable[Tensor]) -> float:
    """MiB of the tensors' memory, each counted once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return round(sum(storages.values()) / 2**20, 2)


def join(strategy: str) -> torch.device:
    """This rank's device, and a process group for a strategy that runs in several processes."""
    if strategy in ("none", ALL_CORES, REORDERED):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def measure(strategy: str, variant: str, batch: int, updates: int, device: torch.device) -> dict[str, Any]:
    """One strategy in this process and the other ranks; times ``updates`` steps."""
    group = dist.group.WORLD if dist.is_initialized() else None
    ranks = dist.get_world_size() if group is not None else 1
    keep_freed_memory()
    set_precision("fp32", device)
    torch.manual_seed(0)
    config = network(variant, dropout=0.0)
    model = AlexNet(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    part = parallelize(model, strategy if group is not None else "none", group)
    recipe = TrainConfig()
    optimizer = PaperSGD(parameter_groups(part.model, recipe), recipe.lr, recipe.momentum, recipe.weight_decay)
    generator = torch.Generator().manual_seed(1)
    share = batch // part.training.replicas
    mine = slice(part.training.rank * share, (part.training.rank + 1) * share)
    whole = 60 * torch.randn(batch, 3, config.image_size, config.image_size, generator=generator)
    images = whole[mine].to(device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, config.classes, (batch,), generator=generator)[mine].to(device)

    def forward_backward() -> Tensor:
        loss = F.cross_entropy(part.forward(images), labels)
        loss.backward()
        return loss

    def update() -> None:
        loss = forward_backward().detach() * part.weight
        optimizer.step()
        if ranks > 1:
            dist.all_reduce(loss)
        # Training reads the loss too; on a GPU this waits for the step.
        float(loss)
        optimizer.zero_grad()

    seconds = []
    for number in range(updates + 2):
        begin = time.perf_counter()
        update()
        if number >= 2:
            seconds.append(time.perf_counter() - begin)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as trace:
        forward_backward()
        optimizer.step()
    gradients = [each.grad for each in part.model.parameters() if each.grad is not None]
    row: dict[str, Any] = {
        "suite": "parallel",
        "case": CASE,
        "implementation": strategy,
        "mode": "train_step",
        "shape": f"{batch}x3x{config.image_size}x{config.image_size}",
        "dtype": "float32",
        "memory_format": "channels_last",
        "network": variant,
        "ranks": ranks,
        **time_columns(seconds),
        **{name: round(value, 1) for name, value in split(trace).items()},
        "parameters_mib": _mib(part.model.parameters()),
        "gradients_mib": _mib(gradients),
        "optimizer_mib": _mib(
            value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ),
    }
    optimizer.zero_grad()
    saved: list[Tensor] = []
    held = {each.untyped_storage().data_ptr() for each in part.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(part.forward(images), labels)
    row["activations_mib"] = _mib(saved)
    saved.clear()
    loss.backward()
    optimizer.zero_grad()
    with Count(ranks) as count:
        forward_backward()
    row |= {
        "images_per_s": round(batch / (row["median_us"] * 1e-6), 2),
        "process_peak_mib": round(peak_memory_mib(device)),
        "messages": len(count.messages),
        "sent_mib": round(sum(message.sent for message in count.messages) / 2**20, 4),
    }
    if ranks > 1:
        formula = expected(config, strategy, ranks, batch)
        row["formula_messages"] = len(formula)
        row["formula_sent_mib"] = round(sum(message.sent for message in formula) / 2**20, 4)
        row["backend"] = dist.get_backend()
    return row


def link() -> list[dict[str, Any]]:
    """All-reduces among the ranks: a number, whose time is latency, and 64 MiB, whose time is bandwidth."""
    dist.init_process_group("gloo")
    rows = []
    for count, repeats in ((1, 50), (2**24, 5)):
        tensor = torch.ones(count)
        seconds = []
        for _ in range(repeats + 2):
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            seconds.append(time.perf_counter() - begin)
            tensor.fill_(1)
        rows.append(
            {
                "suite": "parallel",
                "case": LINK_CASE,
                "implementation": dist.get_backend(),
                "shape": str(count),
                "dtype": "float32",
                **time_columns(seconds[2:]),
                "sent_mib": tensor.nbytes * SENT["all_reduce"](dist.get_world_size()) / 2**20,
            }
        )
    return rows


def started(job: str, ranks: int, arguments: Sequence[object]) -> Any:
    """Run ``job`` in its own processes and return its rows."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    # Imported once for all jobs: torchrun takes longer to start than most jobs take.
    multiprocessing.set_forkserver_preload([_rank.__module__])
    with socket.create_server(("127.0.0.1", 0)) as server:
        # Free again, for the ranks' store.
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / LOG
        log.touch()
        given = ranks, port, Path(folder), job, list(map(str, arguments))
        try:
            start_processes(_rank, given, ranks, daemon=True, start_method=method)
        except ProcessException as error:
            raise SystemExit(f"error: {job} in {ranks} processes failed:\n{error}\n{log.read_text()}") from None
        return json.loads((Path(folder) / ROWS).read_text())


def _rank(rank: int, ranks: int, port: int, folder: Path, job: str, arguments: Sequence[str]) -> None:
    """A process of :func:`started`, with the environment that torchrun would give it."""
    with open(folder / LOG, "ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    found = run_job(job, parser().parse_args(arguments))
    if rank == 0:
        (folder / ROWS).write_text(json.dumps(found))


def too_few_gpus(ranks: int) -> bool:
    """Whether there are fewer GPUs than ranks (but some): ranks that share one would wait for each other's kernels."""
    return 0 < torch.cuda.device_count() < ranks


def cores_per_process(job: str, ranks: int) -> int | None:
    """Cores per process of ``job``, given strategies of ``ranks``; None on a GPU, where each process has a device."""
    if torch.cuda.is_available():
        return None
    return available_cores() if job == ALL_CORES else max(1, available_cores() // ranks)


class Job(NamedTuple):
    """A measurement: its name for ``--only``, the job of its processes, their number, and their flags."""

    name: str
    job: str
    processes: int
    arguments: tuple[object, ...]


def batch_size(variant: str, given: int | None) -> int:
    """The global batch size: as given, else small enough that a step takes seconds at most."""
    return given or (32 if VARIANTS[variant].image_size >= 224 else 64)


def plan(variants: Sequence[str], batch: int | None, updates: int, ranks: int, only: Sequence[str] = ALL) -> list[Job]:
    """The measurements: each network under every strategy that supports this world size, the link, and the losses.

    Args:
        variants: the networks; the losses are those of the digits network and are measured with it.
        batch: global batch size, as for :func:`batch_size`.
        updates: number of timed steps.
        ranks: world size of the strategies.
        only: the measurements wanted, of :data:`ALL`.
    """
    few = too_few_gpus(ranks)
    jobs = []
    for variant in variants:
        given = (
            "--network",
            variant,
            "--batch-size",
            batch_size(variant, batch),
            "--updates",
            updates,
            "--ranks",
            ranks,
        )
        jobs.append(Job("none", "none", 1, given))
        if cores_per_process(ALL_CORES, ranks) != cores_per_process("none", ranks):
            jobs.append(Job("all-cores", ALL_CORES, 1, given))
        if not few:
            jobs += [Job(strategy, strategy, ranks, given) for strategy in usable(variant, ranks)[1:]]
        jobs.append(Job("alone", "alone", 1, given))
    jobs.append(Job("link", "link", ranks, ("--ranks", ranks)))
    if VARIANT in variants and not few and BATCH % ranks == 0:
        for dtype in EPOCHS:
            for strategy in ("none", REORDERED, *usable(VARIANT, ranks)[1:]):
                processes = 1 if strategy in ("none", REORDERED) else ranks
                jobs.append(Job(f"losses-{dtype}", f"losses {dtype}: {strategy}", processes, ("--ranks", ranks)))
    return [job for job in jobs if job.name in only]


def compare(jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """The rows of the record, as they are measured."""
    begin = time.monotonic()
    for number, job in enumerate(jobs, 1):
        network = f"{job.arguments[1]}, " if job.arguments[0] == "--network" else ""
        print(f"[{number}/{len(jobs)}] after {duration(time.monotonic() - begin)}: {network}{job.job}", flush=True)
        found = started(job.job, job.processes, job.arguments)
        for row in found if isinstance(found, list) else [found]:
            if "losses" in row:
                print(f"    {row['updates']} updates, loss {row['losses'][-1]:.4f}", flush=True)
            else:
                rate = f", {row['images_per_s']:.1f} images/s" if "images_per_s" in row else ""
                print(f"    {row['implementation']}: {row['median_us'] / 1e3:,.1f} ms{rate}", flush=True)
            yield row


def run_job(job: str, options: argparse.Namespace) -> Any:
    """The measurement in a process of :func:`started`: one or several rows, each with its cores."""
    cores = cores_per_process(job, options.ranks)
    if cores is not None:
        torch.set_num_threads(cores)
    kind, _, strategy = job.partition(": ")
    found: Any
    if job == "link":
        found = link()
    elif kind == "alone":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        variant, ranks = options.network[0], options.ranks
        given = (variant, options.batch_size, ranks, "float32", "eager", device, options.updates)
        found = [alone(each, *given) for each in usable(variant, ranks)]
    elif strategy:
        found = learn(strategy, kind.removeprefix("losses "), join(strategy))
    else:
        found = measure(job, options.network[0], options.batch_size, options.updates, join(job))
    # The record's other columns are those of the process that started this one.
    its = {} if cores is None else {"cores_per_process": cores, "threads": torch.get_num_threads()}
    return [{**row, **its} for row in found] if isinstance(found, list) else {**found, **its}


def parser() -> argparse.ArgumentParser:
    """The command line; :func:`started` passes its flags on."""
    result = Parser(prog="python -m bench.parallelism", description=DESCRIPTION)
    result.add_argument(
        "--network",
        nargs="+",
        choices=VARIANTS,
        default=["paper", VARIANT],
        metavar="NAME",
        help=f"networks to measure (paper, digits), of {', '.join(VARIANTS)}",
    )
    result.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="global batch size; by default 32, or 64 for images smaller than 224x224",
    )
    result.add_argument("--updates", type=int, default=10, metavar="N", help="updates to time (%(default)s)")
    result.add_argument(
        "--ranks", type=int, default=2, metavar="N", help="processes of a strategy, its world size (%(default)s)"
    )
    result.add_argument(
        "--only",
        nargs="+",
        choices=ALL,
        default=ALL,
        metavar="NAME",
        help=f"measurements to make; all by default: {', '.join(ALL)}",
    )
    result.add_argument(
        "--output", type=Path, default=DATA, metavar="DIR", help="folder of the record; reports/data by default"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parser().parse_args(arguments)
    at_least(options, 2, "ranks", called=flag_name)
    at_least(options, 1, "updates", "batch_size", called=flag_name)
    for variant in options.network:
        images = batch_size(variant, options.batch_size)
        if images % options.ranks:
            parser().error(f"--batch-size {images} cannot be shared equally by {options.ranks} processes")
    spin_briefly()
    if too_few_gpus(options.ranks):
        print(f"fewer GPUs than {options.ranks}: of the strategies only what one rank computes is measured")
    jobs = plan(options.network, options.batch_size, options.updates, options.ranks, options.only)
    count = 0
    for row in compare(jobs):
        # Write at once, because a later job may fail.
        path = write([row], options.output)
        count += 1
        print(f"    recorded in {path}", flush=True)
    print(f"recorded {count} rows")
    return 0


if __name__ == "__main__":
    cli.run(main)
