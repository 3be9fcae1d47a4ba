"""What a user's own program takes beside busy processes: nothing is set for it, and nothing outlives the benchmark."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from bench import contention
from bench.contention import EAGER, UNSET, Program, busy, measure
from bench.subjects import user_program
from tests.commands import ROOT, environment


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_busy_processes_end_with_what_they_were_started_for() -> None:
    before = children(os.getpid())

    def interrupted() -> list[int]:
        with busy(2):
            started.extend(set(children(os.getpid())) - set(before))
            raise KeyboardInterrupt

    started: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(started) == 2
    assert not any(map(alive, started))


def test_a_busy_process_ends_with_the_one_that_started_it() -> None:
    code = (
        f"import os, subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {contention.LOOP!r}, str(os.getpid())])"
    )
    with subprocess.Popen([sys.executable, "-c", f"{code}\ninput()"], stdin=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while not (loops := children(process.pid)) and time.monotonic() < end:
            time.sleep(0.02)
        try:
            process.kill()
            process.wait()
            while any(map(alive, loops)) and time.monotonic() < end:
                time.sleep(0.02)
            assert len(loops) == 1
            assert not any(map(alive, loops))
        finally:
            for loop in filter(alive, loops):
                os.kill(loop, signal.SIGKILL)


@pytest.mark.slow
def test_a_user_s_program_imports_nothing_else_and_has_nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ast.parse(Path(user_program.__file__).read_text())
    imported = [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert ours == {"torch", "kernels"}
    for name in UNSET:
        monkeypatch.setenv(name, "1")
    with Program(1) as program:
        answer = program.ask("time", "aten, eager")
        assert answer["seconds"] > 0
        assert program._process is not None
        pid = program._process.pid
        variables = {entry.split(b"=")[0].decode() for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}
        assert "PATH" in variables
        assert not variables & set(UNSET)
        # PyTorch's own operators hold several tensors of the size of their input.
        scratch = program.ask("scratch", "aten, eager")
        assert scratch["scratch_percent_of_input"] > 200
        with pytest.raises(RuntimeError, match="failed: exit status"):
            program.ask("time", "no such implementation")
    assert not alive(pid)


def test_a_call_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing PyTorch alone takes longer than that."""
    monkeypatch.setattr(contention, "FIRST_LIMIT", 0.01)
    with Program(1) as program, pytest.raises(TimeoutError, match="stopped after"):
        program.ask("time", "aten, eager")
    assert program._process is None


@pytest.mark.slow
def test_memory_beyond_what_is_returned() -> None:
    """In a process whose C library gives freed memory back: a training in this one has told it not to."""
    code = "from tests.bench.test_contention import beyond; beyond()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment())


def beyond() -> None:
    """Another thread's too; in pages, and the allocator keeps some of them."""

    def call() -> torch.Tensor:
        first = torch.ones(16 << 20, dtype=torch.uint8)
        with ThreadPoolExecutor(1) as threads:
            second: torch.Tensor = threads.submit(torch.ones, 32 << 20, dtype=torch.uint8).result()
        del first
        torch.ones(8 << 20, dtype=torch.uint8)
        return second

    call()
    result, (most, held) = user_program.allocated(call)
    assert result.nbytes == 32 << 20
    assert abs(most - (48 << 20)) < 2 << 20
    assert abs(held - (32 << 20)) < 2 << 20


class Fake:
    """A program whose calls take 0.05 and 1 s; one of them, an implementation's so many-th, hangs."""

    fails: tuple[str, int] | None = None
    asked: ClassVar[list[tuple[str, str]]]

    def __init__(self, images: int) -> None:
        Fake.asked = []

    def __enter__(self) -> "Fake":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, what: str, name: str) -> dict[str, Any]:
        self.asked.append((what, name))
        if self.fails == (name, self.asked.count((what, name))):
            raise TimeoutError("stopped after 30 s")
        return (
            {"scratch_mib": 1.5}
            if what == "scratch"
            else {
                "seconds": 0.05 if name == "auto, eager" else 1.0,
                "threads": 2,
            }
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(contention, "Program", Fake)
    monkeypatch.setattr(contention, "BUSY", (0, 1))
    monkeypatch.setattr(contention, "ROUNDS", (2, 6, 3.5))
    monkeypatch.setattr(Fake, "fails", None)
    return Fake


def test_implementations_take_turns_and_are_bounded(fake: type[Fake]) -> None:
    said: list[str] = []
    rows = list(measure(EAGER, 16, said.append))
    assert [(row["implementation"], row["busy_processes"]) for row in rows] == [
        (name, count) for count in (0, 1) for name in EAGER
    ]
    # A first call; one to be ready; then in turns, four of one of them being enough.
    timed = [name for what, name in fake.asked if what == "time"]
    assert timed[:12] == list(EAGER) * 6
    assert timed[12:14] == ["auto, eager"] * 2
    ours, theirs = rows[0], rows[1]
    assert (len(ours["times"]), len(theirs["times"])) == (6, 4)
    assert ours["median_us"] == 50_000
    assert ours["images_per_s"] == 320
    assert (ours["scratch_mib"], ours["threads"], ours["dtype"]) == (1.5, 2, "float32")
    assert "scratch_mib" not in rows[2]
    assert ours["shape"] == "16x96x55x55 + 16x256x27x27"
    assert said[0] == "auto, eager: first call"


def test_an_implementation_that_hangs_costs_the_others_nothing(
    fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "fails", ("aten, eager", 3))
    rows = list(measure(EAGER, 16, print))
    statuses = [row.get("status") for row in rows]
    assert statuses == [None, "stopped after 30 s", None, None]
    # Once there is enough, it has been measured.
    monkeypatch.setattr(fake, "fails", ("aten, eager", 5))
    rows = list(measure(EAGER, 16, print))
    assert [row.get("status") for row in rows] == [None] * 4
    assert len(rows[1]["times"]) == 2


def test_the_table_says_how_many_times_faster(fake: type[Fake]) -> None:
    rows = list(measure(EAGER, 16, print))
    (line,) = [line for line in contention.table(rows).splitlines() if line.startswith("auto, eager")]
    assert "20.00" in line
    assert json.dumps(rows)
