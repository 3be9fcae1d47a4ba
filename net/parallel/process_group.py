"""The processes of a run: rendezvous, collective decisions, barriers, and the diagnosis of failed ranks."""

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

from ..common.device import choose, gpu_count, is_gpu, joins_processes
from ..common.errors import DataError, RankError, UsageError
from ..training.config import TrainConfig
from .heartbeat import DIED, ENDED, FAILED, LEFT, SILENT, Heartbeat, place
from .launch import Launch

#: Timeout in seconds of collectives during which a rank may be busy for long: packing images, compiling, saving. Only
#: heartbeats detect failed ranks then.
PATIENCE = 24 * 3600.0
#: Seconds between polls for another rank.
POLL = 0.1

Value = TypeVar("Value")


class Votes:
    """Repeated max-reductions of a few integers over the ranks; this class is for a single process.

    With several processes a vote is reduced asynchronously while the work after it runs, so :meth:`decided` returns the
    result of the vote before.

    Args:
        count: integers in a vote.
    """

    def __init__(self, count: int) -> None:
        self.last = [0] * count

    def cast(self, *values: int) -> None:
        """Submit this rank's values, each at least 0. Every rank casts equally often."""
        self.last = list(values)

    def decided(self) -> list[int]:
        """The maxima of the last vote or, with several processes, of the one before; zeros if there was none."""
        return self.last

    def settled(self) -> list[int]:
        """The maxima of the last vote; with several processes this waits for them."""
        return self.last


class VotesOfSeveral(Votes):
    """Votes of a process group; see :class:`Votes`.

    Args:
        count: integers in a vote.
        group: the ranks.
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
    """The processes of a run; this class is a world of one. :class:`Processes` implements it for several."""

    rank = 0
    size = 1
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def describe(self) -> str:
        """World size and backend, for the first lines of a log."""
        return ""

    def votes(self, count: int) -> "Votes":
        """Votes on ``count`` numbers among these processes."""
        return Votes(count)

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce: the sum over the ranks."""
        return tensor

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value; it must be JSON."""
        return value

    def gathered(self, value: Value) -> list[Value]:
        """The values of all ranks; they must be JSON."""
        return [value]

    def wait_for_first(self) -> None:
        """Block the other ranks until rank 0 arrives, without a timeout."""

    def enforce_timeout(self, groups: Iterable[dist.ProcessGroup]) -> None:
        """Barrier, after which collectives of ``groups`` fail once they exceed ``--timeout``."""

    def opened(self, open: Callable[[], Value], identity: Callable[[Value], Mapping[str, object]]) -> Value:
        """Call ``open``, on rank 0 before the others, and return its result.

        Raises:
            DataError: ``open`` raised it on any rank, or ``identity`` of the results differs between ranks.
            UsageError: ``open`` raised it on any rank.
        """
        return open()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turn an error of a collective into one that names the rank that failed."""
        yield

    def close(self) -> None:
        """Leave the process group."""


class Processes(World):
    """Several processes, started by torchrun.

    Args:
        launch: rank and world size.
        backend: ``gloo`` or ``nccl``, for the network's collectives.
        config: gives ``start_timeout``, ``timeout`` and ``progress_timeout``, the seconds after which a rank that does
            not join, does not answer, or reports no progress counts as failed.

    Raises:
        RankError: the rendezvous failed.
    """

    #: Number of rendezvous of this process; each uses its own prefix in the store.
    meetings = 0

    def __init__(self, launch: Launch, backend: str, config: TrainConfig) -> None:
        self.rank, self.size, self.timeout, self.backend = launch.rank, launch.world_size, config.timeout, backend
        Processes.meetings += 1
        try:
            # torchrun keeps its store across restarts of the processes.
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
            #: For small CPU tensors, independent of the network's collectives.
            self.control = dist.new_group(backend="gloo", timeout=_seconds(PATIENCE))
        except (dist.DistError, RuntimeError, ValueError, OSError) as error:
            raise RankError(f"rank {self.rank} cannot reach the others: {_meeting_place(error)}") from None
        self.before = signal.signal(signal.SIGTERM, self._terminated)

    def _gather_at(self, store: PrefixStore, seconds: float) -> None:
        """Wait until every rank has joined."""
        store.set(place(self.rank), socket.gethostname())
        end = time.monotonic() + seconds
        while not store.check(list(map(place, range(self.size)))):
            if time.monotonic() > end:
                missing = [rank for rank in range(self.size) if not store.check([place(rank)])]
                raise self.heartbeat.error_for(missing, f"did not join within {seconds:g} s (--start-timeout)")
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
        # Not the store's own wait, which blocks signal handlers.
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
        failure: UsageError | DataError | None = None
        if not self.first:
            self.wait_for_first()
        try:
            opened.append(open())
            seen = identity(opened[0])
        except (UsageError, DataError) as error:
            failure = error
        if self.first:
            self.wait_for_first()
        errors = self.gathered(None if failure is None else [isinstance(failure, UsageError), str(failure)])
        everywhere = all(each == errors[0] for each in errors)
        for rank, each in enumerate(errors):
            if each is not None:
                usage, message = each
                raise (UsageError if usage else DataError)(message if everywhere else f"rank {rank}: {message}")
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
            reported = self._lost(error) if lost else None
            self.heartbeat.leave(FAILED)
            if reported is None:
                raise
            raise reported from None

    def _lost(self, error: BaseException) -> BaseException:
        """Find out which rank failed; one rank reports it."""
        # torchrun may have noticed too, and its SIGTERM must not come before the message.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            if self.heartbeat.lost.wait(self.heartbeat.poll_seconds(SILENT)):
                return SystemExit(1)
            ranks, state = self.heartbeat.blamed()
            first_line = str(error).splitlines()[0]
            return self.heartbeat.error_for(ranks or [self.rank], state or f"lost its connection: {first_line}")
        except dist.DistError:
            return self.heartbeat.store_lost()

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM outside training. torchrun sends it when another process ended; report that first."""
        if self.heartbeat.over.is_set() or self.heartbeat.lost.wait(self.heartbeat.poll_seconds(SILENT)):
            return
        ranks, state = self.heartbeat.blamed()
        if state == ENDED:
            # This process is about to raise the same error, or to notice that they are gone, and reports it then.
            return
        with contextlib.suppress(dist.DistError):
            if state == DIED:
                raise self.heartbeat.error_for(ranks, state)
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
    """The distributed store: torchrun's, or rank 0's own where torchrun has none."""
    unset = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if unset:
        raise ValueError(f"torchrun's variable {unset[0]} is missing")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # PyTorch would retry an unknown host name, and print a page of addresses if there is no answer.
    socket.getaddrinfo(address, port)
    own = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    end = time.monotonic() + seconds
    while not own:
        try:
            socket.create_connection((address, port), timeout=seconds).close()
            break
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(f"no answer within {seconds:g} s (--start-timeout): {error}") from None
            time.sleep(POLL)
    timeout = _seconds(seconds)
    store: Store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=own, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )
    return store


def _meeting_place(error: BaseException) -> str:
    """Why the rendezvous failed, with its address."""
    address, port = (os.environ.get(name, "unset") for name in ("MASTER_ADDR", "MASTER_PORT"))
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "EADDRINUSE" in str(error) or "address already in use" in str(error):
        return f"port {port} (MASTER_PORT) is in use; run torchrun with --standalone or another --master-port"
    return f"{first} (MASTER_ADDR {address}, MASTER_PORT {port})"


def _backend(device: torch.device, shared: bool) -> str:
    """NCCL for one GPU per rank; gloo for CPUs and for ranks that share a GPU.

    Raises:
        UsageError: this PyTorch has no NCCL.
    """
    if shared or not is_gpu(device):
        return "gloo"
    if not dist.is_nccl_available():
        raise UsageError(
            "--device cuda: several GPUs need NCCL, which this build of PyTorch lacks; install one that has it, or use "
            "--device cpu"
        )
    return "nccl"


def _device_name(name: str | None, launch: Launch, count: int) -> tuple[str | None, bool]:
    """Resolve ``--device`` for this rank on a machine with ``count`` GPUs; also returns whether ranks share a GPU."""
    if name == "cpu" or count == 0 or launch.local_world_size == 1:
        return name, False
    if name is None or name == "cuda":
        return f"cuda:{launch.local_rank % count}", launch.local_world_size > count
    return name, True


def join(launch: Launch, config: TrainConfig) -> tuple[World, torch.device]:
    """Choose this rank's device and join the other processes of the run.

    Raises:
        UsageError: no such device, or no NCCL. RankError: the rendezvous failed.
    """
    name, shared = _device_name(config.device, launch, gpu_count())
    device = choose(name)
    if config.parallel != "none" and not joins_processes(device):
        raise UsageError(f"--device {device} runs in one process; it needs --parallel none, not {config.parallel}")
    if config.parallel == "none":
        return World(), device
    return Processes(launch, _backend(device, shared), config), device
