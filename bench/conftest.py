"""Shared by the benchmarks: flags, fixtures, and rows made from pytest-benchmark's measurements."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from net.common.cli import spin_briefly

# As the commands do, before torch is imported.
spin_briefly()

import torch  # noqa: E402

from net.common.allocator import keep_freed_memory  # noqa: E402
from net.common.progress import duration  # noqa: E402
from net.data.processes import available_cores  # noqa: E402

from .compile_ahead import compile_ahead  # noqa: E402
from .measure import ceilings as ceilings_module  # noqa: E402
from .measure.ceilings import Ceilings  # noqa: E402
from .measure.records import time_columns, write  # noqa: E402
from .measure.timing import Clock  # noqa: E402
from .predict.roofline import Work  # noqa: E402

ROWS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()
CLOCK = Clock()
Say = Callable[[str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("this project's benchmarks")
    group.addoption("--record", action="store_true", help="append the rows to reports/data")
    group.addoption("--quick", action="store_true", help="fewer cases, and nothing that takes long to compile")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    # As the commands do.
    keep_freed_memory()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name.startswith("bench_"):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
            # Compiling the whole network on two cores takes minutes.
            item.add_marker(pytest.mark.timeout(900))
            if config.getoption("--quick") and item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="left out by --quick"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--record") and session.config.stash[ROWS]:
        rows = session.config.stash[ROWS]
        print(f"\nrecorded {len(rows)} rows in {write(rows)}")


@pytest.fixture(scope="session")
def together(request: pytest.FixtureRequest) -> Callable[..., list[dict[str, Any]]]:
    """``together(test, task)``: the parameters of all cells of a test that this run measures for the same task."""

    def cells(test: Callable[..., None], task: dict[str, Any]) -> list[dict[str, Any]]:
        found = []
        for item in request.session.items:
            if isinstance(item, pytest.Function) and item.function is test and not item.get_closest_marker("skip"):
                parameters = dict(item.callspec.params)
                if task.items() <= parameters.items():
                    found.append(parameters)
        return found

    return cells


@pytest.fixture(scope="session")
def recorded(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The rows of this run's record."""
    return request.config.stash[ROWS]


@pytest.fixture(scope="session", autouse=True)
def cold_compiler() -> Iterator[None]:
    """Uses a fresh Inductor cache for each pytest run, so that first calls really compile."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", os.path.join(folder, "inductor"))
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Graphs cannot be captured on the default stream.
    torch.cuda.set_stream(torch.cuda.Stream())
    return torch.device("cuda")


@pytest.fixture
def replay(benchmark: BenchmarkFixture) -> Iterator[Callable[[list[float]], None]]:
    """Passes times in seconds, measured interleaved with rivals, to pytest-benchmark: one round each."""
    yield lambda times: benchmark.pedantic(CLOCK.replay(times), rounds=len(times))
    CLOCK.stop()


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Say:
    """Prints a line of progress past pytest's capture, with the time since the first one."""
    reporter, capture = map(request.config.pluginmanager.getplugin, ("terminalreporter", "capturemanager"))
    begin = time.perf_counter()

    def line(what: str) -> None:
        with capture.global_and_fixture_disabled():
            if reporter._tw.width_of_current_line:
                reporter.write_line("")
            reporter.write_line(f"{duration(time.perf_counter() - begin)}  {what}")
            reporter.flush()

    return line


@pytest.fixture(scope="session")
def compiled_ahead(request: pytest.FixtureRequest, device: torch.device, cold_compiler: None, say: Say) -> None:
    """On a CPU, compile the programs of the run's ``ahead`` marks, in one process per core."""
    items = [item for item in request.session.items if not item.get_closest_marker("skip")]
    marks = [mark for item in items for mark in item.iter_markers("ahead")]
    # In the order of the run: building a network changes settings that are part of the cache's keys.
    programs = list(dict.fromkeys(mark.args for mark in marks))
    if device.type != "cuda" and programs:
        compile_ahead(programs, min(len(programs), available_cores()), say)


@pytest.fixture(scope="session")
def ceilings(recorded: list[dict[str, Any]], device: torch.device, say: Say) -> Ceilings:
    """This machine's ceilings, measured once; their rows are recorded too."""
    rows = list(ceilings_module.rows(device, announce=lambda what: say(f"this machine's limits: {what}")))
    recorded.extend(rows)
    return ceilings_module.ceilings(rows)


@pytest.fixture
def row(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, recorded: list[dict[str, Any]]
) -> Iterator[Callable[..., None]]:
    """Declares what a benchmark measures: ``row(case=..., images=..., work=...)``.

    ``images`` and ``work`` are per call.
    """
    columns: dict[str, Any] = {}
    yield columns.update
    work: Work | None = columns.pop("work", None)
    images = columns.pop("images", None)
    if benchmark.stats is not None:
        columns.update(time_columns(benchmark.stats.stats.data))
        if images is not None:
            columns["images_per_s"] = round(images / (columns["median_us"] * 1e-6), 1)
    elif "status" not in columns:
        return
    if work is not None:
        limits = request.getfixturevalue("ceilings") if "ceilings" in request.fixturenames else None
        columns.update(work.columns(columns.get("median_us"), columns["dtype"], limits))
    benchmark.extra_info.update(columns)
    recorded.append(columns)
