"""Liveness of the ranks during minutes without communication, while images are packed or code is compiled."""

import contextlib
import json
import math
import os
import sys
import threading

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from kernels import private

from ..common.errors import RankError
from ..common.progress import Progress

#: Seconds between beats; less at a short timeout, so that it spans ten beats.
INTERVAL = 1.0
BEATS_IN_TIMEOUT = 10
#: Missed beats after which a rank counts as dead if there is further evidence.
SILENT = 3
#: Seconds the main thread has to exit by itself after a rank has failed.
GRACE = 3.0
#: A rank's last beat: it has finished, or exits with an error.
LEFT, FAILED = "left", "failed"

DIED, ENDED = "died", "ended with an error"


class Heartbeat(threading.Thread):
    """A thread that increments a counter in the distributed store and watches the counters of the other ranks.

    It ends its own process, and no other, when

    - a rank's counter has not changed for ``timeout``: it was stopped or killed, or its host is gone;
    - a rank has failed;
    - the main thread has neither started a collective nor reported progress
      (:class:`net.common.progress.Progress`) for ``progress_timeout``, and is not waiting for a rank that has started
      fewer collectives;
    - the store is gone, because torchrun or the host of rank 0 is.

    Time is measured in polls by this thread: clocks of different hosts are never compared, and no rank is blamed for
    time in which this process was suspended. Anybody who can reach the store can write to it, so its contents are only
    used to name ranks.

    A single call that holds the GIL for longer than the timeout looks like a stopped process. Compiling the network on
    a CPU held it for 0.7 s, saving and reading checkpoints for 0.04 s.

    Args:
        store: the processes' store. The thread clones it: a client that waits for a key blocks its connection.
        rank, ranks: this process's rank and the world size.
        timeout, progress_timeout: seconds.
    """

    def __init__(self, store: Store, rank: int, ranks: int, timeout: float, progress_timeout: float) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.store: Store = store.clone()  # type: ignore[attr-defined]  # missing in its stub
        self.rank, self.ranks, self.timeout, self.progress_timeout = rank, ranks, timeout, progress_timeout
        self.interval = min(INTERVAL, timeout / BEATS_IN_TIMEOUT)
        self.beats = [""] * ranks
        self.missed = [0] * ranks
        #: Number of calls of World.wait_for_first on this rank.
        self.waits = 0
        #: Collectives and progress of the main thread at the last poll, and polls since either changed.
        self.done: tuple[dict[str, int], int] = {}, 0
        self.idle = 0
        #: Whether all ranks have joined.
        self.met = False
        #: over: this process leaves. lost: a rank has failed.
        self.over, self.lost = threading.Event(), threading.Event()
        self._beat(0)

    def run(self) -> None:
        self.met, number = True, 0
        try:
            while not self.over.wait(self.interval):
                number += 1
                self._beat(number)
                error = self._poll()
                if error is not None:
                    self._end(error)
                    return
        except dist.DistError:
            self._end(self.store_lost(), GRACE)

    def leave(self, last: str) -> None:
        """Stop, and tell the other ranks why: ``LEFT`` or ``FAILED``."""
        if self.over.is_set():
            return
        self.over.set()
        self.join(GRACE)
        with contextlib.suppress(dist.DistError):
            self._set(last)

    def blamed(self) -> tuple[list[int], str]:
        """The ranks that caused a failed collective or a SIGTERM, and what they did; call it some polls later."""
        for ranks, state in (
            ([rank for rank, beat in enumerate(self.beats) if beat == FAILED], ENDED),
            ([rank for rank, missed in enumerate(self.missed) if missed >= SILENT], DIED),
            (self._behind(), self._unanswered()),
        ):
            if ranks:
                return ranks, state
        return [], ""

    def error_for(self, ranks: list[int], state: str) -> RankError | SystemExit:
        """The error to raise about ``ranks``.

        It has a message for the first caller on any rank, and is a silent exit for all others. If rank 0 has failed,
        all exit silently, because rank 0 prints its own errors.
        """
        if (state == ENDED and 0 in ranks) or self.store.add("errors", 1) > 1:
            return SystemExit(1)
        advice = "; continue from the last checkpoint with --resume" if self.met else ""
        return RankError(f"{', '.join(map(self._described, ranks))} {state}{advice}")

    def store_lost(self) -> RankError:
        """The error when the store cannot be reached any more."""
        return RankError(
            f"rank {self.rank} lost its connection to the distributed store: torchrun or the host of rank 0 is gone"
        )

    def poll_seconds(self, count: int) -> float:
        """Seconds in which every rank completes ``count`` polls."""
        return (count + 2) * self.interval

    def _unanswered(self) -> str:
        return f"did not answer for {self.timeout:g} s (--timeout)"

    def _poll(self) -> RankError | SystemExit | None:
        """Poll the store; returns the error to end with, or None if all is well."""
        beats = [beat.decode(errors="replace") for beat in self.store.multi_get(list(map(_key, range(self.ranks))))]
        for rank, (before, beat) in enumerate(zip(self.beats, beats, strict=True)):
            self.missed[rank] = self.missed[rank] + 1 if beat == before and beat != LEFT else 0
        self.beats = beats
        failed = [rank for rank, beat in enumerate(beats) if beat == FAILED and self.missed[rank] >= SILENT]
        if failed:
            return self.error_for(failed, ENDED)
        allowed = math.ceil(self.timeout / self.interval)
        if max(self.missed) >= allowed:
            # Ranks that went silent together, with their host, may reach the limit one poll apart.
            return self.error_for(
                [rank for rank, missed in enumerate(self.missed) if missed > allowed // 2], self._unanswered()
            )
        done = self._sent(), Progress.reports
        self.idle = 0 if done != self.done or self._behind() else self.idle + 1
        self.done = done
        if self.idle * self.interval > self.progress_timeout:
            error = self.error_for(
                [self.rank], f"reported no progress for {self.progress_timeout:g} s (--progress-timeout)"
            )
            self._set(FAILED)
            return error
        return None

    def _sent(self) -> dict[str, int]:
        """The number of collectives of each group that this rank has started."""
        return private.collectives_started() | {"hold": self.waits}

    def _behind(self) -> list[int]:
        """The ranks that have started fewer collectives than this one, which waits for them or soon will."""
        ours = self._sent()
        behind = []
        for rank, beat in enumerate(self.beats):
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                _, theirs = json.loads(beat)
                if any(theirs.get(name, count) < count for name, count in ours.items()):
                    behind.append(rank)
        return [rank for rank in behind if rank != self.rank]

    def _beat(self, number: int) -> None:
        self._set(json.dumps([number, self._sent()]))

    def _set(self, beat: str) -> None:
        self.store.set(_key(self.rank), beat)

    def _end(self, error: RankError | SystemExit, patience: float = 0.0) -> None:
        """End this process, whatever its main thread does, unless it leaves by itself within ``patience`` seconds."""
        if self.over.wait(patience):
            return
        if isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        self.lost.set()
        if not self.over.wait(GRACE):
            os._exit(1)

    def _described(self, rank: int) -> str:
        """``rank``, and the host name it has reported."""
        if not self.store.check([place(rank)]):
            return f"rank {rank}"
        host = self.store.get(place(rank)).decode(errors="replace")[:64]
        return f"rank {rank} on {host if host.isprintable() else ascii(host)}"


def _key(rank: int) -> str:
    return f"beat {rank}"


def place(rank: int) -> str:
    """The store key of the host name of ``rank``, which is set when it joins."""
    return f"host {rank}"
