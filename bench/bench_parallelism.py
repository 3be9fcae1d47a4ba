"""The strategies at equal global batch: the measurements of ``python -m bench.parallelism`` for the digits network."""

from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .parallelism import ALL, Job, plan, started

BATCH, UPDATES, RANKS = 64, 10, 2
JOBS = plan(["digits"], BATCH, UPDATES, RANKS, [name for name in ALL if not name.startswith("losses")])


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.job)
def test_job(benchmark: BenchmarkFixture, recorded: list[dict[str, Any]], job: Job) -> None:
    """Each job runs in its own processes, which return the rows; pytest times them from start to end."""
    found = benchmark.pedantic(started, (job.job, job.processes, job.arguments), rounds=1)
    rows = found if isinstance(found, list) else [found]
    benchmark.extra_info.update(rows[0])
    recorded.extend(rows)
