"""How ranks know that the others live while nobody expects a message for minutes: images are packed, code compiled."""

import contextlib
import json
import math
import os
import sys
import threading
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _world

from ..common.errors import RankError
from ..common.progress import Progress

#: Seconds between beats; at a short timeout there are ten in it.
INTERVAL = 1.0
BEATS_IN_TIMEOUT = 10
#: Beats missed by which a rank counts as dead when there is another sign of it.
SILENT = 3
#: Seconds for the main thread to end by itself when a rank is lost.
GRACE = 3.0
#: What a rank leaves instead of its next beat: it is through, or ends with an error.
LEFT, FAILED = "left", "failed"

DIED, ENDED = "died", "ended with an error"


class Heartbeat(threading.Thread):
    """A thread that counts up a number in the processes' store and watches the other ranks' numbers. It ends its own
    process, and no other, when

    - a rank's number stands still for longer than ``timeout``: it was stopped or killed, or its host is gone;
    - a rank has failed;
    - the main thread has neither sent a message nor reported progress (:class:`net.common.progress.Progress`) for
      longer than ``progress_timeout``, although no rank has sent fewer messages, which it would be waiting for;
    - the store is gone, which went with torchrun or the first host.

    Time is counted in this thread's own looks: clocks are never compared, and time in which this process stood still
    counts against nobody. Whoever reaches the store can write to it, so what it says names ranks and does nothing else.

    A single call that keeps Python's lock for longer than the timeout looks like a stopped process. Compiling the
    network on a CPU kept it for 0.7 s, saving and reading checkpoints for 0.04 s.

    Args:
        store: of the processes. The thread has a connection of its own: a client that waits for a key is locked.
        rank, ranks: this process, and how many there are.
        timeout, progress_timeout: seconds.
    """

    def __init__(self, store: Store, rank: int, ranks: int, timeout: float, progress_timeout: float) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.store: Store = store.clone()  # type: ignore[attr-defined]  # missing in its stub
        self.rank, self.ranks, self.timeout, self.progress_timeout = rank, ranks, timeout, progress_timeout
        self.interval = min(INTERVAL, timeout / BEATS_IN_TIMEOUT)
        self.beats = [""] * ranks
        self.missed = [0] * ranks
        #: How often this rank came to wait for the first one to pass.
        self.waits = 0
        #: What the main thread had done at the last look, and looks since that changed.
        self.done: tuple[dict[str, int], int] = {}, 0
        self.idle = 0
        #: Whether all ranks have been there.
        self.met = False
        #: Set when this process leaves; when a rank is lost.
        self.over, self.lost = threading.Event(), threading.Event()
        self._beat(0)

    def run(self) -> None:
        self.met, number = True, 0
        try:
            while not self.over.wait(self.interval):
                number += 1
                self._beat(number)
                verdict = self._look()
                if verdict is not None:
                    self._end(verdict)
                    return
        except dist.DistError:
            self._end(self.store_lost(), GRACE)

    def leave(self, last: str) -> None:
        """Stop, and tell the others why: ``LEFT`` or ``FAILED``."""
        if self.over.is_set():
            return
        self.over.set()
        self.join(GRACE)
        with contextlib.suppress(dist.DistError):
            self._set(last)

    def blamed(self) -> tuple[list[int], str]:
        """Which ranks are to blame for a message that failed or a signal to end, and what they did; call it some looks
        later."""
        for ranks, state in (
            ([rank for rank, beat in enumerate(self.beats) if beat == FAILED], ENDED),
            ([rank for rank, missed in enumerate(self.missed) if missed >= SILENT], DIED),
            (self._behind(), self._unanswered()),
        ):
            if ranks:
                return ranks, state
        return [], ""

    def verdict(self, ranks: list[int], state: str) -> RankError | SystemExit:
        """An error that says what the ``ranks`` did, for the first who asks on any rank; a silent end for all others,
        and where the first rank has told its own error."""
        if (state == ENDED and 0 in ranks) or self.store.add("verdicts", 1) > 1:
            return SystemExit(1)
        advice = "; go on from the last checkpoint with --resume" if self.met else ""
        return RankError(f"{', '.join(map(self._described, ranks))} {state}{advice}")

    def store_lost(self) -> RankError:
        """For when nothing can be asked any more."""
        return RankError(f"rank {self.rank} lost the processes' store: torchrun or the first host is gone")

    def looks(self, count: int) -> float:
        """Seconds that ``count`` looks take, on other ranks too."""
        return (count + 2) * self.interval

    def _unanswered(self) -> str:
        return f"did not answer for {self.timeout:g} s (--timeout)"

    def _look(self) -> RankError | SystemExit | None:
        """Compare with the last look; None when all is well."""
        beats = [beat.decode(errors="replace") for beat in self.store.multi_get(list(map(_key, range(self.ranks))))]
        for rank, (before, beat) in enumerate(zip(self.beats, beats, strict=True)):
            self.missed[rank] = self.missed[rank] + 1 if beat == before and beat != LEFT else 0
        self.beats = beats
        failed = [rank for rank, beat in enumerate(beats) if beat == FAILED and self.missed[rank] >= SILENT]
        if failed:
            return self.verdict(failed, ENDED)
        allowed = math.ceil(self.timeout / self.interval)
        if max(self.missed) >= allowed:
            # Those that went silent together, with their host, reach the limit a look apart.
            return self.verdict(
                [rank for rank, missed in enumerate(self.missed) if missed > allowed // 2], self._unanswered()
            )
        done = self._sent(), Progress.reports
        self.idle = 0 if done != self.done or self._behind() else self.idle + 1
        self.done = done
        if self.idle * self.interval > self.progress_timeout:
            verdict = self.verdict(
                [self.rank], f"reported no progress for {self.progress_timeout:g} s (--progress-timeout)"
            )
            self._set(FAILED)
            return verdict
        return None

    def _sent(self) -> dict[str, int]:
        """How many messages of each group this rank has sent, or waits to send."""
        groups: list[Any] = list(_world.pg_map)
        counts = {group.group_name: group._get_sequence_number_for_group() for group in groups}
        return counts | {"hold": self.waits}

    def _behind(self) -> list[int]:
        """The ranks that have sent fewer messages than this one, which waits for them or soon will."""
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

    def _end(self, verdict: RankError | SystemExit, patience: float = 0.0) -> None:
        """End this process, whatever its main thread is at, unless it leaves by itself within ``patience`` seconds."""
        if self.over.wait(patience):
            return
        if isinstance(verdict, RankError):
            print(f"error: {verdict}", file=sys.stderr, flush=True)
        self.lost.set()
        if not self.over.wait(GRACE):
            os._exit(1)

    def _described(self, rank: int) -> str:
        """``rank``, and the host that it has said it is on."""
        if not self.store.check([place(rank)]):
            return f"rank {rank}"
        host = self.store.get(place(rank)).decode(errors="replace")[:64]
        return f"rank {rank} on {host if host.isprintable() else ascii(host)}"


def _key(rank: int) -> str:
    return f"beat {rank}"


def place(rank: int) -> str:
    """Where ``rank`` leaves its host's name when it comes."""
    return f"host {rank}"
