"""How ranks know that the others live while nobody expects a message for minutes: images are packed, code compiled."""

import collections
import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _world

from ..errors import RankError
from .activity import Activity, activity

#: Seconds between beats; at a short timeout there are ten in it.
INTERVAL = 1.0
BEATS_IN_TIMEOUT = 10
#: Beats that are missed before a process that is no longer there, or has failed, is told of; the rank itself, or the
#: others for the same reason, may be about to.
MISSED_BY_THE_ENDED = 3
#: Seconds for the main thread to end by itself when a rank is lost, or to finish the checkpoint that it writes.
GRACE = 3.0
#: What a rank leaves instead of its next beat: it is through, ends with an error, or does nothing and waits for nobody.
LEFT, FAILED, STILL = "left", "failed", "still"


class Heartbeat(threading.Thread):
    """A thread that counts up a number in the processes' store, watches the other ranks' numbers, and ends the process
    when one stands still for longer than the timeout.

    Missed beats are counted in this thread's own looks: clocks are never compared, and time in which this process
    itself stood still counts against nobody.

    A process that is stopped, dead, or stuck where it cannot run Python is found so. One whose main thread alone hangs
    finds itself, once it keeps the others from their work: for as long as the timeout it has neither computed, read nor
    written, nor have its children, although every other rank had sent all the messages that this one has, and those are
    idle too or ahead. (Not where the system does not tell that, :func:`net.parallel.activity.activity`; nor in an
    endless loop, which looks like a long compilation: there only the timeout of a message finds it.) A disk that does
    not answer for as long is taken for a hang too.

    A single call that keeps Python's lock for longer than the timeout looks like a stopped process. Compiling the
    network on a CPU kept it for 0.7 s, saving and reading checkpoints for 0.04 s.

    Args:
        store: of the processes. The thread has a connection of its own: a client that waits for a key is locked.
        rank, ranks: this process, and how many there are.
        timeout: seconds.
    """

    def __init__(self, store: Store, rank: int, ranks: int, timeout: float) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.store: Store = store.clone()  # type: ignore[attr-defined]  # missing in its stub
        self.rank, self.ranks, self.timeout = rank, ranks, timeout
        self.interval = min(INTERVAL, timeout / BEATS_IN_TIMEOUT)
        self.allowed = math.ceil(timeout / self.interval)
        self.beats = [""] * ranks
        self.missed = [0] * ranks
        #: How often this rank came to wait for the first one to pass.
        self.holds = 0
        #: What was done up to each look, as far back as the timeout, and looks since this rank waited for another.
        self.done: collections.deque[Activity] = collections.deque(maxlen=self.allowed + 1)
        self.unhindered = 0
        #: Set when this process leaves; when a rank is lost.
        self.over, self.lost = threading.Event(), threading.Event()
        self.store.set(self._place(rank), f"{os.getpid()} {socket.gethostname()}")
        self.store.set(self._key(rank), self._beat(0, False))

    def run(self) -> None:
        number = 0
        # Without the store, which went with torchrun or the first host, nothing can be told: messages will fail.
        with contextlib.suppress(dist.DistError):
            while not self.over.wait(self.interval):
                number += 1
                idle = self._idle()
                still = self._hangs() and idle
                self.store.set(self._key(self.rank), STILL if still else self._beat(number, idle))
                found = self._look()
                if found is not None:
                    self._end(*found)
                    return

    def leave(self, last: str) -> None:
        """Stop, and tell the others why: ``LEFT`` or ``FAILED``."""
        if self.over.is_set():
            return
        self.over.set()
        self.join(GRACE)
        with contextlib.suppress(dist.DistError):
            self.store.set(self._key(self.rank), last)

    def ended(self) -> tuple[list[int], list[int]]:
        """The ranks on this machine whose processes are gone without a last word, and all ranks that failed."""
        beats = self._read()
        gone = [rank for rank, beat in enumerate(beats) if beat not in (LEFT, FAILED) and self._gone(rank)]
        return gone, [rank for rank, beat in enumerate(beats) if beat == FAILED]

    def verdict(self, missing: list[int], hang: bool, otherwise: str = "") -> RankError | SystemExit:
        """End those of the ``missing`` ranks that ``hang`` on this machine.

        Returns:
            An error that names them, or says ``otherwise`` where none is missing, for the first who asks on any rank; a
            silent end for all others, and where the first rank has told its own error.
        """
        beats = self._read()
        failed = [rank for rank in missing if beats[rank] == FAILED]
        if 0 in failed:
            return SystemExit(1)
        first = self.store.add("askers", 1) == 1
        names = []
        for rank in failed or missing:
            process, host = self._where(rank)
            names.append(f"rank {rank} (process {process} on {host})")
            # Of ranks that are all missing, the first to ask must live to tell it.
            if hang and host == socket.gethostname() and rank != self.rank and (first or self.rank not in missing):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        if not first:
            return SystemExit(1)
        if not names:
            return RankError(otherwise)
        state = f"did not answer for {self.timeout:g} s (--timeout) and was ended" if hang else "died"
        if failed:
            state = "ended with an error"
        return RankError(f"{', '.join(names)} {state}; go on from the last checkpoint with --resume")

    def _look(self) -> tuple[list[int], bool] | None:
        """Which ranks are lost, and whether they hang; None when all is well."""
        beats = self._read()
        for rank, (before, beat) in enumerate(zip(self.beats, beats, strict=True)):
            self.missed[rank] = self.missed[rank] + 1 if beat == before and beat != LEFT else 0
        self.beats = beats
        still = [rank for rank, beat in enumerate(beats) if beat == STILL]
        # One that stands still leaves it to the others to say so, if there are any.
        if still and (self.rank not in still or all(beat in (STILL, LEFT) for beat in beats)):
            return still, True
        silent = [rank for rank, missed in enumerate(self.missed) if missed >= MISSED_BY_THE_ENDED]
        if ended := [rank for rank in silent if beats[rank] == FAILED or self._gone(rank)]:
            return ended, False
        if max(self.missed) >= self.allowed:
            # Those that went silent together, with their host, reach the limit a look apart.
            return [rank for rank, missed in enumerate(self.missed) if missed > self.allowed // 2], True
        return None

    def _idle(self) -> bool:
        """Whether this process, where that can be told, has done nothing for the timeout."""
        now = activity()
        if now is None:
            return False
        self.done.append(now)
        full = len(self.done) > self.allowed
        return full and now.idle_since(self.done[0], self.allowed * self.interval)

    def _hangs(self) -> bool:
        """Whether this process, if it is idle, keeps the others: for the timeout none of them owed it a message, and
        now they have nothing to do either, or are ahead."""
        ours = self._sent()
        others = [json.loads(beat)[1:] for rank, beat in enumerate(self.beats) if beat[:1] == "[" and rank != self.rank]
        behind = any(theirs.get(name, count) < count for theirs, _ in others for name, count in ours.items())
        self.unhindered = 0 if behind else self.unhindered + 1
        # What is not ahead and works may be waited for without a message: ranks take turns to compile for one cache.
        return self.unhindered > self.allowed and all(
            idle or any(theirs.get(name, count) > count for name, count in ours.items()) for theirs, idle in others
        )

    def _sent(self) -> dict[str, int]:
        """How many messages of each group this rank has sent, or waits to send."""
        groups: list[Any] = list(_world.pg_map)
        counts = {group.group_name: group._get_sequence_number_for_group() for group in groups}
        return counts | {"hold": self.holds}

    def _beat(self, number: int, idle: bool) -> str:
        return json.dumps([number, self._sent(), idle])

    def _end(self, missing: list[int], hang: bool) -> None:
        """End this process, whatever its main thread is at."""
        verdict = self.verdict(missing, hang)
        if isinstance(verdict, RankError):
            print(f"error: {verdict}", file=sys.stderr, flush=True)
        self.lost.set()
        if not self.over.wait(GRACE):
            os._exit(1)

    def _read(self) -> list[str]:
        return [beat.decode() for beat in self.store.multi_get([self._key(rank) for rank in range(self.ranks)])]

    def _where(self, rank: int) -> tuple[int, str]:
        """The process and the host of ``rank``."""
        process, _, host = self.store.get(self._place(rank)).decode().partition(" ")
        return int(process), host

    def _gone(self, rank: int) -> bool:
        """Whether ``rank`` was a process of this machine and is none any more."""
        process, host = self._where(rank)
        if host != socket.gethostname():
            return False
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    @staticmethod
    def _key(rank: int) -> str:
        return f"beat {rank}"

    @staticmethod
    def _place(rank: int) -> str:
        return f"process {rank}"
