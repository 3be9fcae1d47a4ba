"""Whom a rank takes for lost, look by look, without a thread; :mod:`tests.test_parallel` has whole jobs."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from net.errors import RankError
from net.parallel import heartbeat as module
from net.parallel.activity import IDLE_BYTES, IDLE_SHARE, Activity, activity
from net.parallel.heartbeat import FAILED, LEFT, MISSED_BY_THE_ENDED, STILL, Heartbeat

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


def test_a_rank_that_does_nothing_knows_it(pair: tuple[Heartbeat, Heartbeat], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair
    done = [0.0, 0]
    monkeypatch.setattr(module, "activity", lambda: Activity(*done))

    def idle(looks: int) -> list[bool]:
        return [ours._idle() for _ in range(looks)]

    assert idle(12) == [False] * 10 + [True] * 2
    done[0] += IDLE_SHARE * TIMEOUT * 1.01
    assert idle(11) == [False] * 10 + [True]
    done[1] += IDLE_BYTES
    assert idle(11) == [False] * 10 + [True]
    done[0] += IDLE_SHARE * TIMEOUT * 0.9
    assert idle(1) == [True]
    # A child has ended, and nobody knows any more what it did.
    done[0] = 0
    assert idle(11) == [False] * 10 + [True]
    monkeypatch.setattr(module, "activity", lambda: None)
    assert idle(30) == [False] * 30


@pytest.mark.parametrize("what", ["hold", "group"])
def test_a_rank_that_waits_for_another_does_not_hang(
    pair: tuple[Heartbeat, Heartbeat], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """And has the whole timeout for itself from when the other comes."""
    ours, theirs = pair
    monkeypatch.setattr(ours, "_sent", lambda: {"hold": 1, "group": 1, "another": 5})

    def they_sent(count: int, idle: bool) -> None:
        beat(theirs, json.dumps([time.monotonic(), {"hold": 1, "group": 1} | {what: count}, idle]))
        assert ours._look() is None

    def hangs(looks: int) -> list[bool]:
        return [ours._hangs() for _ in range(looks)]

    they_sent(0, idle=True)
    assert hangs(30) == [False] * 30
    they_sent(1, idle=True)
    assert hangs(11) == [False] * 10 + [True]
    # It may be waited for by other means.
    they_sent(1, idle=False)
    assert hangs(30) == [False] * 30
    they_sent(2, idle=False)
    assert hangs(1) == [True]
    they_sent(0, idle=False)
    assert hangs(1) == [False]
    # Who has left sends nothing any more.
    beat(theirs, LEFT)
    assert ours._look() is None
    assert hangs(11) == [False] * 10 + [True]


def test_the_others_end_a_rank_that_stands_still(pair: tuple[Heartbeat, Heartbeat]) -> None:
    ours, theirs = pair
    beat(theirs, STILL)
    assert ours._look() == ([1], True)
    assert theirs._look() is None
    beat(ours, STILL)
    assert ours._look() == ([0, 1], True)
    beat(theirs, LEFT)
    assert ours._look() == ([0], True)


def test_of_ranks_that_all_stand_still_one_lives_to_tell(
    pair: tuple[Heartbeat, Heartbeat], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    killed: list[int] = []
    monkeypatch.setattr(module.os, "kill", lambda process, _: killed.append(process))
    ours.store.set("process 0", f"100 {socket.gethostname()}")
    ours.store.set("process 1", f"101 {socket.gethostname()}")
    said = ours.verdict([0, 1], True)
    assert str(said).startswith("rank 0 (process 100 on ")
    assert killed == [101]
    assert isinstance(theirs.verdict([0, 1], True), SystemExit)
    assert killed == [101]


#: Of the test that is on.
children: list[subprocess.Popen[bytes]] = []


def spend(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def in_a_child() -> None:
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)


def in_a_grandchild() -> None:
    """Whose parent waits for it, and is waited for by nobody yet."""
    inner = "import time; [None for _ in iter(lambda: time.process_time() < 0.4, False)]; time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    child = subprocess.Popen([sys.executable, "-c", outer], start_new_session=True)
    children.append(child)
    time.sleep(1.0)


def in_a_thread() -> None:
    thread = threading.Thread(target=spend, args=(0.3,))
    thread.start()
    thread.join()


@pytest.mark.skipif(activity() is None, reason="the system does not tell what a process has done")
@pytest.mark.parametrize("work", [in_a_child, in_a_grandchild, in_a_thread], ids=lambda work: work.__name__)
def test_work_is_seen(work: Callable[[], None]) -> None:
    before = activity()
    work()
    after = activity()
    for child in children:
        os.killpg(child.pid, 9)
        child.wait()
    children.clear()
    assert before is not None
    assert after is not None
    assert 0.2 < after.seconds - before.seconds < 5
    assert not after.idle_since(before, 10)


@pytest.mark.skipif(activity() is None, reason="the system does not tell what a process has done")
def test_waiting_and_looking_are_no_work() -> None:
    before = activity()
    time.sleep(0.2)
    # The thread that looks is not counted: here this one.
    spend(0.2)
    after = activity()
    assert before is not None
    assert after is not None
    assert after.idle_since(before, 10)


@pytest.mark.skipif(activity() is None, reason="the system does not tell what a process has done")
def test_writing_is_seen(tmp_path: Path) -> None:
    kind = subprocess.run(["stat", "--file-system", "--format=%T", tmp_path], capture_output=True, text=True)
    if kind.stdout.strip() == "tmpfs":
        pytest.skip("files of the tests are in memory")
    before = activity()
    with open(tmp_path / "written", "wb") as file:
        file.write(bytes(1 << 20))
    after = activity()
    assert before is not None
    assert after is not None
    assert after.transferred - before.transferred >= 1 << 20
