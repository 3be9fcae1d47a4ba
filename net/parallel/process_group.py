"""The processes of a run: how they meet, agree, wait for one another, and find out who is missing."""

import contextlib
import datetime
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from kernels import private

from ..common.device import choose
from ..common.errors import DataError, RankError, UsageError
from ..training.config import TrainConfig
from .heartbeat import DIED, ENDED, FAILED, LEFT, SILENT, Heartbeat, place
from .launch import Launch

#: Seconds that a message may take where a rank may have long work of its own: packing images, compiling, saving. Only
#: heartbeats tell then who is lost.
PATIENCE = 24 * 3600.0
#: Seconds between two looks for another rank.
POLL = 0.1

Value = TypeVar("Value")


class Votes:
    """The largest of some numbers on any rank, again and again; here of the only process.

    Of several processes a vote travels beside the work that follows it, so what has been decided is the vote before.

    Args:
        count: numbers in a vote.
    """

    def __init__(self, count: int) -> None:
        self.last = [0] * count

    def cast(self, *values: int) -> None:
        """This rank's numbers, at least 0. Every rank casts equally often."""
        self.last = list(values)

    def decided(self) -> list[int]:
        """The maxima of the last vote, or, of several processes, of the one before; zeros when there was none."""
        return self.last

    def settled(self) -> list[int]:
        """The maxima of the last vote, for which several processes wait."""
        return self.last


class VotesOfSeveral(Votes):
    """Votes of a group of processes; see :class:`Votes`.

    Args:
        count: numbers in a vote.
        group: the processes.
    """

    def __init__(self, count: int, group: dist.ProcessGroup) -> None:
        super().__init__(count)
        self.group = group
        self.sent = torch.zeros(count, dtype=torch.int64)
        self.work: Any = None

    def cast(self, *values: int) -> None:
        self.last = self.settled()
        self.sent = torch.tensor(values)
        self.work = dist.all_reduce(self.sent, dist.ReduceOp.MAX, self.group, async_op=True)

    def settled(self) -> list[int]:
        if self.work is not None:
            self.work.wait()
        return self.sent.tolist()


class World:
    """A run's only process. :class:`Processes` is what several make of the same methods."""

    rank = 0
    size = 1
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def describe(self) -> str:
        """The processes in words, for the first lines of a log."""
        return ""

    def votes(self, count: int) -> "Votes":
        """Votes on ``count`` numbers among these processes."""
        return Votes(count)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, on each of them."""
        return tensor

    def broadcast(self, value: Value) -> Value:
        """The first rank's value, which travels as JSON."""
        return value

    def gathered(self, value: Value) -> list[Value]:
        """Every rank's value; they travel as JSON."""
        return [value]

    def wait_for_first(self) -> None:
        """The other ranks wait here until the first one arrives, however long that takes."""

    def enforce_timeout(self, groups: Iterable[dist.ProcessGroup]) -> None:
        """A barrier; from there on a rank that keeps ``groups`` waiting for longer than the timeout is lost."""

    def opened(self, open: Callable[[], Value], identity: Callable[[Value], Mapping[str, object]]) -> Value:
        """What ``open`` returns; the first rank opens before the others.

        Raises:
            DataError: ``open`` raised it on a rank, or ``identity`` of what was opened differs between ranks.
            UsageError: likewise.
        """
        return open()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turns an error of the messages between the ranks into one that names the rank that is lost."""
        yield

    def close(self) -> None:
        """Leave the other processes."""


class Processes(World):
    """Several processes, started by torchrun.

    Args:
        launch: which of them this is.
        backend: ``gloo`` or ``nccl``, for the network's messages.
        config: has the seconds after which a rank that does not come, that keeps the others waiting, or that reports no
            progress counts as lost.

    Raises:
        RankError: they do not meet.
    """

    #: How often this process has met others; each time has keys of its own in the store.
    meetings = 0

    def __init__(self, launch: Launch, backend: str, config: TrainConfig) -> None:
        self.rank, self.size, self.timeout, self.backend = launch.rank, launch.world_size, config.timeout, backend
        Processes.meetings += 1
        try:
            # torchrun keeps its store when it starts the processes again.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            prefix = f"attempt {attempt}, meeting {Processes.meetings}"
            self.store = PrefixStore(prefix, _store(self.rank, config.start_timeout))
            self.heartbeat = Heartbeat(self.store, self.rank, self.size, self.timeout, config.progress_timeout)
            self._gather_at(self.store, config.start_timeout)
            self.heartbeat.start()
            dist.init_process_group(
                backend, store=self.store, rank=self.rank, world_size=self.size, timeout=_seconds(PATIENCE)
            )
            self.group = dist.group.WORLD
            #: For small messages between the hosts, beside those of the network.
            self.control = dist.new_group(backend="gloo", timeout=_seconds(PATIENCE))
        except (dist.DistError, RuntimeError, ValueError, OSError) as error:
            raise RankError(f"rank {self.rank} does not reach the others: {_meeting_place(error)}") from None
        self.before = signal.signal(signal.SIGTERM, self._terminated)

    def _gather_at(self, store: PrefixStore, seconds: float) -> None:
        """Wait until every rank is there."""
        store.set(place(self.rank), socket.gethostname())
        end = time.monotonic() + seconds
        while not store.check(list(map(place, range(self.size)))):
            if time.monotonic() > end:
                missing = [rank for rank in range(self.size) if not store.check([place(rank)])]
                raise self.heartbeat.verdict(missing, f"did not come within {seconds:g} s (--start-timeout)")
            time.sleep(POLL)

    def describe(self) -> str:
        return f"{self.size} processes ({self.backend})"

    def votes(self, count: int) -> "Votes":
        return VotesOfSeveral(count, self.control)

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def broadcast(self, value: Value) -> Value:
        return self.gathered(value)[0]

    def gathered(self, value: Value) -> list[Value]:
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = list(torch.zeros(self.size, 1, dtype=torch.int64))
        dist.all_gather(sizes, torch.tensor([len(text)]), self.control)
        longest = int(max(sizes))
        texts = list(torch.zeros(self.size, longest, dtype=torch.uint8))
        dist.all_gather(texts, F.pad(text, (0, longest - len(text))), self.control)
        return [json.loads(text[:size].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)]

    def wait_for_first(self) -> None:
        self.heartbeat.waits += 1
        key = f"hold {self.heartbeat.waits}"
        if self.first:
            self.store.set(key, "")
            return
        # Not the store's own wait, in which no signal is heard.
        while not self.store.check([key]):
            if self.heartbeat.lost.wait(POLL):
                raise SystemExit(1)

    def enforce_timeout(self, groups: Iterable[dist.ProcessGroup]) -> None:
        dist.barrier(self.control)
        for group in {self.group, self.control, *groups}:
            private.set_group_timeout(group, self.timeout)

    def opened(self, open: Callable[[], Value], identity: Callable[[Value], Mapping[str, object]]) -> Value:
        opened: list[Value] = []
        seen: Mapping[str, object] = {}
        refused: UsageError | DataError | None = None
        if not self.first:
            self.wait_for_first()
        try:
            opened.append(open())
            seen = identity(opened[0])
        except (UsageError, DataError) as error:
            refused = error
        if self.first:
            self.wait_for_first()
        errors = self.gathered(None if refused is None else [isinstance(refused, UsageError), str(refused)])
        everywhere = all(each == errors[0] for each in errors)
        for rank, each in enumerate(errors):
            if each is not None:
                usage, said = each
                raise (UsageError if usage else DataError)(said if everywhere else f"rank {rank}: {said}")
        all_seen = self.gathered(seen)
        for rank, theirs in enumerate(all_seen):
            for name, value in all_seen[0].items():
                if theirs.get(name) != value:
                    raise DataError(f"rank {rank} differs from rank 0: {name} {theirs.get(name)} instead of {value}")
        return opened[0]

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            lost = isinstance(error, dist.DistError) or (
                isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))
            )
            verdict = self._lost(error) if lost else None
            self.heartbeat.leave(FAILED)
            if verdict is None:
                raise
            raise verdict from None

    def _lost(self, error: BaseException) -> BaseException:
        """Have one rank say who is missing."""
        # torchrun's, who may have seen it too: there is a line to be said first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            if self.heartbeat.lost.wait(self.heartbeat.looks(SILENT)):
                return SystemExit(1)
            ranks, state = self.heartbeat.blamed()
            first_line = str(error).splitlines()[0]
            return self.heartbeat.verdict(ranks or [self.rank], state or f"lost its connection: {first_line}")
        except dist.DistError:
            return self.heartbeat.store_lost()

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM outside training. When another process ended it is torchrun's, and that is to be said first."""
        if self.heartbeat.over.is_set() or self.heartbeat.lost.wait(self.heartbeat.looks(SILENT)):
            return
        ranks, state = self.heartbeat.blamed()
        if state == ENDED:
            # This process is about to find the same error, or to miss them, and says so then.
            return
        with contextlib.suppress(dist.DistError):
            if state == DIED:
                raise self.heartbeat.verdict(ranks, state)
        self.heartbeat.leave(LEFT)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    def close(self) -> None:
        dist.destroy_process_group()
        self.heartbeat.leave(LEFT)
        signal.signal(signal.SIGTERM, self.before)


def _seconds(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=seconds)


def _store(rank: int, seconds: float) -> Store:
    """The processes' store: torchrun's, or the first rank's own where torchrun has none."""
    unset = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if unset:
        raise ValueError(f"torchrun's variable {unset[0]} is missing")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # PyTorch would wait for a name that nobody has, and print a page of addresses when nobody answers.
    socket.getaddrinfo(address, port)
    own = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    end = time.monotonic() + seconds
    while not own:
        try:
            socket.create_connection((address, port), timeout=seconds).close()
            break
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(f"nobody answered within {seconds:g} s (--start-timeout): {error}") from None
            time.sleep(POLL)
    timeout = _seconds(seconds)
    store: Store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=own, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )
    return store


def _meeting_place(error: BaseException) -> str:
    """Why the processes do not meet, with the address they were to meet at."""
    address, port = (os.environ.get(name, "unset") for name in ("MASTER_ADDR", "MASTER_PORT"))
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "EADDRINUSE" in str(error) or "address already in use" in str(error):
        return f"port {port} (MASTER_PORT) is in use; give torchrun --standalone or another --master-port"
    return f"{first} (MASTER_ADDR {address}, MASTER_PORT {port})"


def _backend(device: torch.device, shared: bool) -> str:
    """NCCL for ranks with a GPU each; gloo for CPUs and for ranks that share a GPU.

    Raises:
        UsageError: this PyTorch has no NCCL.
    """
    if device.type != "cuda" or shared:
        return "gloo"
    if not dist.is_nccl_available():
        raise UsageError(
            "--device cuda: ranks with a GPU each need NCCL, which this PyTorch lacks; install a build that has it, or "
            "give --device cpu"
        )
    return "nccl"


def _device_name(name: str | None, launch: Launch, count: int) -> tuple[str | None, bool]:
    """What ``--device`` means for this rank on a machine with ``count`` GPUs, and whether ranks share a GPU there."""
    if name == "cpu" or count == 0 or launch.local_world_size == 1:
        return name, False
    if name is None or name == "cuda":
        return f"cuda:{launch.local_rank % count}", launch.local_world_size > count
    return name, True


def join(launch: Launch, config: TrainConfig) -> tuple[World, torch.device]:
    """This rank's device, and the other processes of the run, met.

    Raises:
        UsageError: no such device, or no NCCL. RankError: the processes do not meet.
    """
    name, shared = _device_name(config.device, launch, torch.cuda.device_count())
    device = choose(name)
    if device.type == "mps" and config.parallel != "none":
        raise UsageError(f"--device mps computes in one process, without --parallel {config.parallel}")
    if config.parallel == "none":
        return World(), device
    return Processes(launch, _backend(device, shared), config), device
