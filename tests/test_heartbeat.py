"""Whom a rank takes for lost, look by look, without a thread; :mod:`tests.test_parallel` has whole jobs."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from net.errors import RankError
from net.parallel.heartbeat import FAILED, LEFT, MISSED_BY_THE_ENDED, Heartbeat

#: Seconds; ten beats fit in.
TIMEOUT = 0.05


@pytest.fixture
def pair() -> Iterator[tuple[Heartbeat, Heartbeat]]:
    """Two ranks of this process that have just met."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ours, theirs = (Heartbeat(store, rank, 2, TIMEOUT) for rank in range(2))
    beat(ours, 0)
    assert ours._look() is None
    yield ours, theirs
    # Connections end before the server.
    del ours, theirs


def beat(heartbeat: Heartbeat, word: object) -> None:
    heartbeat.store.set(f"beat {heartbeat.rank}", str(word))


def looks(ours: Heartbeat, count: int) -> list[object]:
    """What ``count`` looks find, a beat of its own before each."""
    found: list[object] = []
    for number in range(count):
        beat(ours, f"look {time.monotonic()} {number}")
        found.append(ours._look())
    return found


def test_a_rank_is_lost_after_the_timeouts_worth_of_looks(pair: tuple[Heartbeat, Heartbeat]) -> None:
    ours, theirs = pair
    assert looks(ours, 9) == [None] * 9
    beat(theirs, "moves again")
    assert looks(ours, 11) == [None] * 10 + [([1], True)]


def test_time_in_which_this_process_stood_still_counts_against_nobody(pair: tuple[Heartbeat, Heartbeat]) -> None:
    ours, _ = pair
    time.sleep(5 * TIMEOUT)
    assert looks(ours, 1) == [None]


def test_a_rank_that_has_left_is_not_missed(pair: tuple[Heartbeat, Heartbeat]) -> None:
    ours, theirs = pair
    beat(theirs, LEFT)
    assert looks(ours, 30) == [None] * 30


def process_of_nobody() -> int:
    """A number that a process had which is gone."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    return gone.pid


@pytest.mark.parametrize("how", ["died", "failed"])
def test_a_rank_that_ended_is_missed_soon(pair: tuple[Heartbeat, Heartbeat], how: str) -> None:
    ours, theirs = pair
    if how == "died":
        ours.store.set("process 1", f"{process_of_nobody()} {socket.gethostname()}")
        assert ours.ended() == ([1], [])
    else:
        beat(theirs, FAILED)
        assert ours.ended() == ([], [1])
        assert looks(ours, 1) == [None]
    assert looks(ours, MISSED_BY_THE_ENDED) == [None] * (MISSED_BY_THE_ENDED - 1) + [([1], False)]
    ending = {"died": "died", "failed": "ended with an error"}[how]
    error = ours.verdict([1], False)
    assert isinstance(error, RankError)
    assert str(error).startswith("rank 1 (process ")
    assert f") {ending};" in str(error)


def test_processes_of_another_machine_are_missed_by_the_timeout_alone(pair: tuple[Heartbeat, Heartbeat]) -> None:
    ours, _ = pair
    ours.store.set("process 1", f"{process_of_nobody()} elsewhere")
    assert ours.ended() == ([], [])
    assert looks(ours, 10) == [None] * 9 + [([1], True)]
    assert "elsewhere) did not answer for 0.05 s (--timeout)" in str(ours.verdict([1], True))


def test_one_rank_speaks_and_the_first_ranks_own_error_is_enough(pair: tuple[Heartbeat, Heartbeat]) -> None:
    ours, theirs = pair
    beat(ours, FAILED)
    assert isinstance(theirs.verdict([0], False), SystemExit)
    beat(ours, 7)
    said = theirs.verdict([0], False)
    assert isinstance(said, RankError)
    assert str(said).startswith(f"rank 0 (process {os.getpid()} on {socket.gethostname()}) died; go on from the last ")
    assert isinstance(ours.verdict([1], False), SystemExit)
    assert isinstance(theirs.verdict([0], False), SystemExit)
