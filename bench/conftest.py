"""What the benchmarks share: the ``--record`` flag, and rows made from what pytest-benchmark measured."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from net.cli import spin_briefly

# As the commands do, before torch is imported.
spin_briefly()

from net.device import keep_freed_memory  # noqa: E402

from .records import time_columns, write  # noqa: E402

ROWS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="append what is measured to reports/data")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    # Likewise.
    keep_freed_memory()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--record") and session.config.stash[ROWS]:
        rows = session.config.stash[ROWS]
        print(f"\nrecorded {len(rows)} rows in {write(rows)}")


@pytest.fixture
def row(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Says what a benchmark measures: ``row(case=..., images=...)``; ``images`` is for one timed call."""
    columns: dict[str, Any] = {}
    yield columns.update
    if benchmark.stats is None:
        return
    times = benchmark.stats.stats.data
    images = columns.pop("images", None)
    columns.update(time_columns(times))
    if images is not None:
        columns["images_per_s"] = round(images / (columns["median_us"] * 1e-6), 1)
    benchmark.extra_info.update(columns)
    request.config.stash[ROWS].append(columns)
