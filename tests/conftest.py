"""Fixtures that every test shares."""

import os
from collections.abc import Iterator

import pytest

from net.cli import spin_briefly

spin_briefly()

import torch  # noqa: E402 - after the line above

if not torch.cuda.is_available():
    # Without a GPU the Triton kernels run in Triton's interpreter, which is chosen when they are defined.
    os.environ["TRITON_INTERPRET"] = "1"


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
