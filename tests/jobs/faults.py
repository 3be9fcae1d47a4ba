"""Multi-process jobs with injected faults, all run at once: ``python -m tests.jobs.faults FOLDER [JOB...]``.

This process stands in for torchrun: it holds the store and starts the ranks, but terminates none, so that the tests see
what the ranks do by themselves. It forks them to avoid the imports. ``FOLDER/JOB.json`` records how each rank ended:
its exit status, None if it had to be killed; the seconds; and its stderr.
"""

import contextlib
import io
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from net.common import cli
from net.common.errors import DataError
from net.common.progress import Progress
from net.model.alexnet import Convolution, Exchange
from net.model.forms import Forms
from net.parallel.launch import Launch
from net.parallel.process_group import Processes
from net.training.config import TrainConfig
from net.training.trainer import Trainer

#: Seconds; spans ten heartbeats.
TIMEOUT = 5.0
#: Seconds after which a job is killed.
LIMIT = 60.0
#: Of a port's number.
DIGITS = 5
#: Seconds by which the late rank is late.
LATE = float(os.environ.get("LATE", 1.5 * TIMEOUT))


def no_object_travels(*_: Any) -> None:
    raise AssertionError("something is unpickled that came from another process")


class Job:
    """A job: the function each rank runs, the world size, who holds the store, and flags."""

    def __init__(self, run: Callable[[Processes], None], ranks: int = 2, agent: bool = True, **flags: float) -> None:
        self.run, self.ranks, self.agent = run, ranks, agent
        self.flags = {"timeout": TIMEOUT, "start_timeout": LIMIT, "progress_timeout": LIMIT, **flags}

    def rank(self, rank: int) -> None:
        """Run as one rank."""
        # As in identical containers: nothing may depend on unique host names.
        socket.gethostname = lambda: "container"
        os.getpid = lambda: 1  # type: ignore[assignment]
        dist.distributed_c10d._tensor_to_object = no_object_travels
        torch.set_num_threads(1)
        BEFORE.get(self.run, lambda rank: None)(rank)
        group = Processes(Launch(rank, self.ranks, rank, self.ranks), "gloo", TrainConfig(**self.flags))  # type: ignore[arg-type]
        with group.watched():
            self.run(group)
            group.close()


def trains(world: Processes, steps: int = 3) -> None:
    """Minimal training steps."""
    world.enforce_timeout([])
    for _ in range(steps):
        assert float(world.sum(torch.ones(1))) == world.size


def end(world: Processes, how: Callable[[], object], rank: int = 1) -> None:
    trains(world)
    if world.rank == rank:
        how()
    trains(world)


def is_killed(world: Processes) -> None:
    end(world, lambda: os.kill(PID(), signal.SIGKILL))


def is_stopped(world: Processes) -> None:
    end(world, lambda: os.kill(PID(), signal.SIGSTOP))


def hangs(world: Processes) -> None:
    end(world, lambda: time.sleep(LIMIT))


def fails(world: Processes) -> None:
    def fail() -> None:
        raise DataError("of its own")

    end(world, fail)


def loses_the_store(world: Processes) -> None:
    """The store of rank 0, which ends with rank 0."""
    end(world, lambda: os.kill(PID(), signal.SIGKILL), rank=0)


def opens(world: Processes, open: Callable[[], Any]) -> None:
    assert world.opened(lambda: open() if world.first else None, lambda _: {}) is None
    trains(world)


def hangs_while_it_packs(world: Processes) -> None:
    opens(world, lambda: time.sleep(LIMIT))


def packs(world: Processes) -> None:
    """Make progress for longer than the progress timeout."""

    def pack() -> None:
        with Progress("images", 15) as progress:
            for _ in range(15):
                time.sleep(0.5)
                progress.update(1)

    opens(world, pack)


def is_killed_while_the_first_packs(world: Processes) -> None:
    if not world.first:
        os.kill(PID(), signal.SIGKILL)
    opens(world, lambda: time.sleep(LIMIT))


def is_terminated(world: Processes) -> None:
    opens(world, lambda: time.sleep(LIMIT))


def is_busy_before_its_first_update(world: Processes) -> None:
    if world.rank == 1:
        time.sleep(1.5 * TIMEOUT)
    trains(world)


def agrees(world: Processes) -> None:
    """Gather and broadcast values of different lengths."""
    value = ["é" * world.rank, None, {"rank": world.rank}]
    expected = [["é" * rank, None, {"rank": rank}] for rank in range(world.size)]
    assert world.gathered(value) == expected
    assert world.broadcast(value) == expected[0]
    votes = world.votes(2)
    for step in range(3):
        votes.cast(world.rank, step)
        # One vote late, the same on every rank.
        assert votes.decided() == ([world.size - 1, step - 1] if step else [0, 0])
    assert votes.settled() == [world.size - 1, 2]
    trains(world)


def has_a_form_that_fails(world: Processes) -> None:
    """On one rank: all train with the plain forms, and end with the same weights."""
    forward = Convolution.forward

    def failing(self: Convolution, towers: list[Tensor], exchange: Exchange) -> list[Tensor]:
        if self.together:
            raise RuntimeError("no engine")
        return forward(self, towers, exchange)

    if world.rank == 1:
        Convolution.forward = failing  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        flags = {"network": "digits", "image_size": 20, "data_path": "synthetic:16", "batch_size": 8, "max_steps": 2}
        config = TrainConfig(**flags, parallel="data", forms={"shared": "together"})  # type: ignore[arg-type]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            trainer = Trainer(config, Path(folder), None, torch.device("cpu"), world)
            assert trainer.run() == 0
        assert trainer.config.forms == asdict(trainer.forms) == asdict(Forms())
        (note,) = [line for line in said.getvalue().splitlines() if line.startswith("note: the forms")]
        assert note == (
            "note: the forms first pixels, shared together, towers in turn fail on rank 1 (no engine); using "
            "first pixels, shared apart, towers in turn"
        )
        sums = [float(parameter.double().sum()) for parameter in trainer.model.parameters()]
        assert world.gathered(sums) == [sums] * world.size


def comes_late(world: Processes) -> None:
    trains(world)


def never_comes(world: Processes) -> None:
    raise AssertionError


PID = os.getpid
#: What the last rank does before it joins the others.
BEFORE: dict[Callable[[Processes], None], Callable[[int], object]] = {
    comes_late: lambda rank: time.sleep(LATE) if rank else None,
    never_comes: lambda rank: os.kill(PID(), signal.SIGSTOP) if rank == 2 else None,
}
JOBS = (
    Job(is_killed, 3),
    Job(is_stopped, 3),
    Job(hangs, 4),
    Job(fails),
    Job(loses_the_store, agent=False),
    Job(hangs_while_it_packs, progress_timeout=3),
    Job(packs, progress_timeout=5),
    Job(is_killed_while_the_first_packs),
    Job(is_terminated),
    Job(is_busy_before_its_first_update),
    Job(agrees, 3),
    Job(has_a_form_that_fails),
    Job(comes_late),
    Job(never_comes, 3, start_timeout=15),
)


def forked(run: Callable[[], None], errors: Path) -> int:
    """Fork a process that calls ``run`` and exits; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    # torchrun's processes would not inherit these handlers.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    file = os.open(errors, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - for as long as the process lives
    status = 70
    try:
        cli.run(lambda: run())
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 71
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def play(job: Job, folder: Path) -> None:
    """Start the ranks of a job and record how each ends."""
    os.environ |= {
        "MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": str(job.agent), "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    # The store has a thread, whose locks a fork would copy as they are: the ranks are forked before, and told the port.
    told, tell = os.pipe()

    def run(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "MASTER_PORT": os.read(told, DIGITS).decode()}
        job.rank(rank)

    begin = time.monotonic()
    pids = {forked(lambda rank=rank: run(rank), folder / f"{rank}"): rank for rank in range(job.ranks)}  # type: ignore[misc]
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if job.agent else None
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1] if store is None else store.port
    os.write(tell, f"{port:0{DIGITS}}".encode() * job.ranks)
    ended: dict[int, tuple[int, float]] = {}

    def wait(seconds: float, enough: int) -> None:
        while len(ended) < enough and time.monotonic() - begin < seconds:
            for pid, rank in pids.items():
                if rank not in ended and (done := os.waitpid(pid, os.WNOHANG))[0]:
                    ended[rank] = os.waitstatus_to_exitcode(done[1]), time.monotonic() - begin
            time.sleep(0.05)

    def send(number: int) -> None:
        for pid, rank in pids.items():
            if rank not in ended:
                os.kill(pid, number)

    if job.run is is_killed_while_the_first_packs:
        wait(LIMIT, 1)
        send(signal.SIGTERM)
    if job.run is is_terminated:
        time.sleep(TIMEOUT / 2)
        send(signal.SIGTERM)
    wait(LIMIT, job.ranks - (job.run in (is_stopped, hangs, never_comes)))
    by_themselves = dict(ended)
    if job.run is is_stopped:
        send(signal.SIGCONT)
        wait(LIMIT, job.ranks)
        by_themselves = dict(ended)
    send(signal.SIGKILL)
    results = {
        rank: [*by_themselves.get(rank, (None, None)), (folder / f"{rank}").read_text()] for rank in pids.values()
    }
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(results))


def main() -> None:
    root, names = Path(sys.argv[1]), sys.argv[2:]
    players = []
    for job in JOBS:
        if names and job.run.__name__ not in names:
            continue
        folder = root / job.run.__name__
        folder.mkdir()
        players.append(forked(lambda job=job, folder=folder: play(job, folder), root / f"{folder.name}.log"))  # type: ignore[misc]
    for player in players:
        os.waitpid(player, 0)


if __name__ == "__main__":
    main()
