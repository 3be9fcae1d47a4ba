"""Fixtures that every test shares."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from net.cli import spin_briefly

spin_briefly()

import torch  # noqa: E402 - after the line above

if os.environ.get("KERNELS_TEST", "") not in ("", "ptx"):
    raise pytest.UsageError(f"KERNELS_TEST must be ptx or nothing; got {os.environ['KERNELS_TEST']!r}")
if not torch.cuda.is_available():
    # Without a GPU the Triton kernels run in Triton's interpreter, which is chosen when they are defined; or, if asked
    # for, what they are compiled to in an emulator.
    if os.environ.get("KERNELS_TEST"):
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"

from tests.commands import run_here  # noqa: E402 - after the line above


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Among the tests there is nothing to benchmark, and it takes seconds to see that."""
    return True if config.getoption("benchmark_only", False) else None


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds not-a-number: what reads it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back that a test has changed."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shapes_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: the digits network after a few updates on small synthetic shapes, whose folder is beside it."""
    root = tmp_path_factory.mktemp("shapes")
    done = run_here("net.data.shapes", root / "shapes", "--train", 12, "--val", 4, "--size", 32)
    assert done.returncode == 0, done.stderr
    done = run_here(
        "net.train", "--data-path", root / "shapes", "--network", "digits", "--image-size", 28, "-b", 48,
        "--epochs", 3, "--output-dir", root / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root / "run"
