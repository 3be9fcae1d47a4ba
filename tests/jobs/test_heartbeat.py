"""When the heartbeat declares a rank dead, poll by poll and without a thread; for whole jobs see
:mod:`tests.jobs.test_jobs`."""

import json
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from net.common.errors import RankError
from net.common.progress import Progress
from net.parallel.heartbeat import DIED, ENDED, FAILED, LEFT, SILENT, Heartbeat, place

#: Seconds; the first spans ten beats, the second twenty.
TIMEOUT, PROGRESS_TIMEOUT = 0.05, 0.1
UNANSWERED = "did not answer for 0.05 s (--timeout)"


@pytest.fixture
def pair() -> Iterator[tuple[Heartbeat, Heartbeat]]:
    """Two ranks, both in this process, that have just joined."""
    # With the default server, libuv's, connecting to the ninth store of a process takes five seconds.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, use_libuv=False)
    ours, theirs = (Heartbeat(store, rank, 2, TIMEOUT, PROGRESS_TIMEOUT) for rank in range(2))
    for each, host in ((ours, "alpha"), (theirs, "beta")):
        store.set(place(each.rank), host)
    assert ours._poll() is None
    yield ours, theirs
    # Close the connections before the server.
    del ours, theirs


def poll(ours: Heartbeat, count: int, theirs: Heartbeat | None = None) -> list[str]:
    """The errors of ``count`` polls, each after a beat of ``ours`` and, if given, of ``theirs``."""
    found = []
    for number in range(count):
        Progress.reports += 1
        for each in (ours, theirs):
            if each is not None:
                each._beat(number + 1000)
        found.append(str(ours._poll()))
    return found


def said(error: object) -> str:
    assert isinstance(error, RankError)
    return str(error)


def test_a_rank_is_lost_after_the_timeouts_worth_of_polls(pair: tuple[Heartbeat, Heartbeat]) -> None:
    ours, theirs = pair
    assert poll(ours, 9) == ["None"] * 9
    theirs._beat(1)
    *before, last = poll(ours, 11)
    assert before == ["None"] * 10
    assert last == f"rank 1 on beta {UNANSWERED}"


def test_time_in_which_this_process_stood_still_counts_against_nobody(pair: tuple[Heartbeat, Heartbeat]) -> None:
    ours, _ = pair
    time.sleep(5 * TIMEOUT)
    assert poll(ours, 1) == ["None"]


def test_a_rank_that_has_left_is_not_missed(pair: tuple[Heartbeat, Heartbeat]) -> None:
    ours, theirs = pair
    theirs._set(LEFT)
    assert poll(ours, 30) == ["None"] * 30
    assert ours.blamed() == ([], "")


def test_a_rank_that_failed_is_missed_soon(pair: tuple[Heartbeat, Heartbeat]) -> None:
    ours, theirs = pair
    theirs._set(FAILED)
    *before, last = poll(ours, SILENT + 1)
    assert before == ["None"] * SILENT
    assert last.startswith(f"rank 1 on beta {ENDED}")


def test_who_is_to_blame(pair: tuple[Heartbeat, Heartbeat]) -> None:
    """For a failed collective: the ranks that failed, else the silent ones, else those that have started fewer."""
    ours, theirs = pair
    poll(ours, 1, theirs)
    assert ours.blamed() == ([], "")
    ours.waits += 1
    assert ours.blamed() == ([1], UNANSWERED)
    assert theirs.blamed() == ([], "")
    poll(ours, SILENT)
    assert ours.blamed() == ([1], DIED)
    theirs._set(FAILED)
    poll(ours, 1)
    assert ours.blamed() == ([1], ENDED)


def test_one_rank_speaks_and_the_first_ranks_own_error_is_enough(pair: tuple[Heartbeat, Heartbeat]) -> None:
    ours, theirs = pair
    assert isinstance(theirs.error_for([0], ENDED), SystemExit)
    assert said(theirs.error_for([0], DIED)).startswith("rank 0 on alpha died")
    assert isinstance(ours.error_for([1], DIED), SystemExit)


def test_a_rank_without_progress_ends_itself(pair: tuple[Heartbeat, Heartbeat]) -> None:
    ours, theirs = pair

    def idle(count: int) -> list[str]:
        found = []
        for number in range(count):
            theirs._beat(number + 1)
            ours._beat(number + 1)
            found.append(str(ours._poll()))
        return found

    assert idle(15) == ["None"] * 15
    Progress.reports += 1
    assert idle(20) == ["None"] * 20
    ours.waits += 1
    # Waiting for a rank that has not arrived is not idleness; once it has, time counts.
    assert idle(60) == ["None"] * 60
    theirs.waits += 1
    *before, last = idle(21)
    assert before == ["None"] * 20
    assert last.startswith("rank 0 on alpha reported no progress for 0.1 s (--progress-timeout)")
    assert ours.store.get("beat 0") == FAILED.encode()


@pytest.mark.parametrize("junk", ["", "[", "[1", "[1, 2]", '[1, {"hold": "x"}]', "[[[[", "7", "left ", "\udcff"])
def test_what_anybody_writes_into_the_store_does_no_more_than_be_read(
    pair: tuple[Heartbeat, Heartbeat], junk: str
) -> None:
    ours, theirs = pair
    ours.waits += 1
    theirs.store.set("beat 1", junk.encode(errors="surrogateescape"))
    assert poll(ours, 5) == ["None"] * 5
    theirs.store.set(place(1), "\x1b[31mhost\nerror: forged")
    assert said(ours.error_for([1], DIED)).startswith("rank 1 on '\\x1b[31mhost\\nerror: forged' died")


def test_beats_tell_how_many_messages_were_sent(pair: tuple[Heartbeat, Heartbeat]) -> None:
    ours, _ = pair
    ours.waits = 3
    ours._beat(5)
    assert json.loads(ours.store.get("beat 0")) == [5, {"hold": 3}]
