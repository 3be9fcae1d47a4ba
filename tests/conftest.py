"""Where the kernels' tests run, and shared fixtures.

GPUs are hidden from the tests, so that they behave the same everywhere; Triton kernels run in the interpreter. With the
environment variable ``KERNELS_TEST=gpu`` only tests marked ``gpu`` run, on the GPU. With ``ptx`` the kernels' tests
run the PTX compiled for an H200 in an emulator; with ``ptx:sm_100`` that for a B200.
"""

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from net.common.cli import spin_briefly

spin_briefly()
if "PYTEST_XDIST_WORKER" in os.environ:
    # The cores are shared by processes: more threads in each would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402 - after the lines above

from net.data import processes  # noqa: E402
from tests import interpreter  # noqa: E402
from tests.commands import run_here  # noqa: E402

WHERE, _, TARGET = os.environ.get("KERNELS_TEST", "").partition(":")
#: NVIDIA targets; the emulator runs only PTX.
TARGETS = ("", "sm_80", "sm_90", "sm_100", "sm_120")


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test is imported: kernels read TRITON_INTERPRET when they are defined."""
    if WHERE not in ("", "gpu", "ptx") or TARGET not in (TARGETS if WHERE == "ptx" else ("",)):
        allowed = f"gpu, ptx, ptx:TARGET with one of{', '.join(TARGETS)[1:]}, or nothing"
        raise pytest.UsageError(f"KERNELS_TEST must be {allowed}; got {os.environ['KERNELS_TEST']!r}")
    if config.getoption("benchmark_only", False):
        return
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # Ignored in a shell's background; child processes would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # For commands that tests start: with an untested PyTorch, an error must still be the only line on stderr.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:kernels was not tried")
    if WHERE == "gpu":
        if not torch.cuda.is_available():
            raise pytest.UsageError("KERNELS_TEST=gpu needs a GPU, and PyTorch finds none")
    else:
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
            os.environ[name] = ""
    if WHERE:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_report_header(config: pytest.Config) -> str:
    where = {"": "in Triton's interpreter", "gpu": "on this GPU", "ptx": "as compiled code, in an emulator"}
    return f"kernels: {where[WHERE]} (environment variable KERNELS_TEST: gpu, ptx or nothing)"


#: What the commands' worker processes import.
WORKERS = ("net.training.trainer", "net.training.curve", "net.data.packing", "net.data.rendering")
#: Seconds for a slow test: some compile for minutes, and machines are shared. pyproject.toml has the others' limit.
SLOW_LIMIT = 1800
#: Files with a test that takes up to a minute. They run first, so that no process is left alone with one at the end.
LONG = ("test_emulator.py", "test_aot.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT))
    items.sort(key=lambda item: item.path.name not in LONG)
    if WHERE == "gpu" and not config.getoption("benchmark_only", False):
        chosen = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Not earlier: the package reads TRITON_INTERPRET at import.
    from kernels import compiler

    if item.get_closest_marker("compiles") and (obstacle := compiler.obstacle()) is not None:
        pytest.skip(f"needs a C++ compiler: {obstacle}")


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Skip collecting the tests for --benchmark-only: it takes seconds, and they contain no benchmarks."""
    return True if config.getoption("benchmark_only", False) else None


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialized memory with NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def hastened_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
            interpreter.hasten(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def preloaded_workers() -> Iterator[None]:
    """Import what any command's workers need before they are forked.

    The fork server imports only what its first command asks for. Users run one command per process; here, the workers
    of all later commands would each import PyTorch.
    """
    context = processes.context
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "context", lambda *modules: context(*WORKERS))
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore PyTorch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shapes_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: the digits network after a few updates on small synthetic shapes, stored in ``../shapes``."""
    root = tmp_path_factory.mktemp("shapes")
    done = run_here("net.data.shapes", root / "shapes", "--train", 12, "--val", 4, "--size", 32)
    assert done.returncode == 0, done.stderr
    done = run_here(
        "net.train", "--data-path", root / "shapes", "--network", "digits", "--image-size", 28, "-b", 48,
        "--epochs", 3, "--output-dir", root / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root / "run"
