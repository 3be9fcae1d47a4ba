"""The strategies compared at equal global batch and seed: ``python -m bench.parallelism``.

Each strategy runs in processes of its own, ``none`` in one, the others in ``--ranks``; with one thread each on a CPU.
An update is timed, then traced and its messages counted; losses are kept for the curve. A row of the record for each
strategy; the first rank's figures, which are the others' too but for chance.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from net.alexnet import AlexNet
from net.config import VARIANTS, TrainConfig, network
from net.device import keep_freed_memory, peak_memory_mib
from net.parallel.strategies import parallelize
from net.progress import Progress
from net.recipe import PaperSGD, parameter_groups

from .environment import ROOT
from .messages import SENT, Count, expected
from .one_rank import alone, usable
from .records import DATA, time_columns, write

CASE = "update of a network in parallel"
LINK_CASE = "all-reduce of two processes"
Intervals = list[tuple[float, float]]


def union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """The same time without overlaps, in order."""
    merged: Intervals = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def length(intervals: Intervals) -> float:
    """The time in a union of intervals."""
    return sum(end - start for start, end in intervals)


def common(a: Intervals, b: Intervals) -> Intervals:
    """The time that is in both unions."""
    return [
        (max(start, other), min(end, other_end))
        for start, end in a
        for other, other_end in b
        if max(start, other) < min(end, other_end)
    ]


def split(trace: profile) -> dict[str, float]:
    """Microseconds of a traced update: computing; messages under way while nothing is computed, and while something is.

    On a GPU kernels count, on a CPU PyTorch's own operators, none of which waits for a message.
    """
    events = trace.events()
    assert events is not None
    gpu = [event for event in events if event.device_type != DeviceType.CPU]
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


def measure(strategy: str, variant: str, batch: int, updates: int) -> dict[str, Any]:
    """One strategy in this process and those that torchrun started with it."""
    ranks = 1
    if strategy != "none":
        device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        ranks = dist.get_world_size()
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    torch.manual_seed(0)
    config = network(variant, dropout=0.0)
    model = AlexNet(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    part = parallelize(model, strategy, dist.group.WORLD if ranks > 1 else None)
    recipe = TrainConfig()
    optimizer = PaperSGD(parameter_groups(part.model, recipe), recipe.lr, recipe.momentum, recipe.weight_decay)
    generator = torch.Generator().manual_seed(1)
    share = batch // part.training.ranks
    mine = slice(part.training.rank * share, (part.training.rank + 1) * share)
    # A batch that comes again, so that there is something to learn.
    whole = 60 * torch.randn(batch, 3, config.image_size, config.image_size, generator=generator)
    images = whole[mine].to(device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, config.classes, (batch,), generator=generator)[mine].to(device)
    losses: list[float] = []

    def forward_backward() -> Tensor:
        loss = F.cross_entropy(part.forward(images), labels)
        loss.backward()
        return loss

    def update() -> None:
        loss = forward_backward().detach() * part.weight
        optimizer.step()
        if ranks > 1:
            dist.all_reduce(loss)
        losses.append(float(loss))
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
        "losses": [round(loss, 6) for loss in losses],
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
    """What ``job`` finds in processes of its own."""
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command += ["bench.parallelism", "--job", job, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("{") or line.startswith("[")]
    if done.returncode or not found:
        raise SystemExit(f"error: {job} in {ranks} processes failed:\n{done.stderr}")
    return json.loads(found[-1])


def too_few_gpus(ranks: int) -> bool:
    """Whether there are GPUs, but not one for each rank: sharing one, ranks would wait for each other's kernels."""
    return 0 < torch.cuda.device_count() < ranks


def compare(variant: str, batch: int, updates: int, ranks: int) -> Iterator[dict[str, Any]]:
    """Every strategy that can use so many ranks and this network, the link between them, and a rank by itself."""
    strategies = usable(variant, ranks)
    if too_few_gpus(ranks):
        print(f"fewer GPUs than {ranks}: of the strategies only what a rank computes by itself is measured")
        strategies = ["none"]
    arguments = ("--network", variant, "--batch-size", batch, "--updates", updates, "--ranks", ranks)
    with Progress("measurements", len(strategies) + 2) as progress:
        for strategy in strategies:
            yield started(strategy, 1 if strategy == "none" else ranks, arguments)
            progress.update(1)
        yield from started("link", ranks, ())
        progress.update(1)
        yield from started("alone", 1, arguments)
        progress.update(1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.parallelism", description=__doc__)
    parser.add_argument("--network", choices=sorted(VARIANTS), default="paper", help="architecture (paper)")
    parser.add_argument("--batch-size", type=int, default=32, help="images of all ranks together (32)")
    parser.add_argument("--updates", type=int, default=10, help="updates that are timed (10)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (2)")
    parser.add_argument("--output", type=Path, default=DATA, help="folder of the record (reports/data)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.batch_size % options.ranks:
        parser.error(f"--batch-size {options.batch_size} cannot be shared by {options.ranks} processes")
    if options.job is not None:
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        found: Any
        if options.job == "link":
            found = link()
        elif options.job == "alone":
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            given = (options.network, options.batch_size, options.ranks, "float32", "eager", device, options.updates)
            found = [alone(strategy, *given) for strategy in usable(options.network, options.ranks)]
        else:
            found = measure(options.job, options.network, options.batch_size, options.updates)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(json.dumps(found), flush=True)
        return
    count = 0
    for row in compare(options.network, options.batch_size, options.updates, options.ranks):
        # At once: what comes later may fail.
        path = write([row], options.output)
        count += 1
    print(f"recorded {count} rows in {path}")


if __name__ == "__main__":
    main()
