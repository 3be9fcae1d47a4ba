"""Whole jobs in which a rank is killed, stopped, late or hangs: the error printed, and how each process ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, environment
from tests.jobs.faults import JOBS, LIMIT, TIMEOUT

#: Seconds after the timeout within which a rank is named, as the README promises.
PROMISED = 10.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    command = [sys.executable, "-m", "tests.jobs.faults", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), timeout=4 * LIMIT)
    return folder


@pytest.mark.slow
def test_a_rank_that_starts_40_s_late(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.jobs.faults", str(tmp_path), "comes_late"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(OMP_NUM_THREADS="1", LATE="40"), timeout=4 * LIMIT)
    results = json.loads((tmp_path / "comes_late.json").read_text())
    assert [status for status, _, _ in results.values()] == [0, 0], results
    assert all(seconds >= 40 for _, seconds, _ in results.values())


#: The exit status of each rank, None if it had to be killed, and the single error line.
EXPECTED: dict[str, tuple[list[int | None], str]] = {
    "is_killed": ([1, -9, 1], "rank 1 on container died;"),
    "is_stopped": ([1, 1, 1], "rank 1 on container did not answer for 5 s (--timeout);"),
    "hangs": ([1, None, 1, 1], "rank 1 on container did not answer for 5 s (--timeout);"),
    "fails": ([1, 1], "rank 1 on container ended with an error;"),
    "loses_the_store": ([-9, 1], "rank 1 lost its connection to the distributed store"),
    "hangs_while_it_packs": ([1, 1], "rank 0 on container reported no progress for 3 s (--progress-timeout);"),
    "packs": ([0, 0], ""),
    "is_killed_while_the_first_packs": ([1, -9], "rank 1 on container died;"),
    "is_terminated": ([-15, -15], ""),
    "is_busy_before_its_first_update": ([0, 0], ""),
    "agrees": ([0, 0, 0], ""),
    "has_a_form_that_fails": ([0, 0], ""),
    "comes_late": ([0, 0], ""),
    "never_comes": ([1, 1, None], "rank 2 did not join within 15 s (--start-timeout)"),
}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.run.__name__)
def test_jobs(folder: Path, job: object) -> None:
    name = job.run.__name__  # type: ignore[attr-defined]
    results = json.loads((folder / f"{name}.json").read_text())
    statuses, line = EXPECTED[name]
    assert [each[0] for each in results.values()] == statuses, results
    said = [each for _, _, errors in results.values() for each in errors.splitlines() if each.startswith("error: ")]
    assert len(said) == bool(line), results
    if line:
        assert said[0].startswith(f"error: {line}"), said
        assert all(seconds < TIMEOUT + 5 * PROMISED for _, seconds, _ in results.values() if seconds is not None)
