"""Stages 1 and 2 as a user's own program runs them, alone and with busy processes running: :mod:`bench.contention`."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from .contention import BUSY, EAGER, QUICK_ROUNDS, ROUNDS, Rounds, measure
from .subjects.user_program import IMPLEMENTATIONS

Row = Callable[..., None]
Say = Callable[[str], None]
Together = Callable[..., list[dict[str, Any]]]
CELLS = [
    pytest.param(name, count, marks=[] if name in EAGER else [pytest.mark.long])
    for name in IMPLEMENTATIONS
    for count in BUSY
]


@cache
def rows(names: tuple[str, ...], rounds: Rounds, say: Say) -> dict[tuple[str, int], dict[str, Any]]:
    """Times of the implementations, each in its own process, interleaved."""
    found = measure(names, 16, rounds, say)
    return {(row["implementation"], row["busy_processes"]): row for row in found}


@pytest.mark.parametrize(("implementation", "busy_processes"), CELLS)
def test_contention(
    request: pytest.FixtureRequest,
    together: Together,
    replay: Callable[[list[float]], None],
    row: Row,
    say: Say,
    cold_compiler: None,
    implementation: str,
    busy_processes: int,
) -> None:
    """One cell: forward and backward, with PyTorch's default thread and memory settings."""
    names = tuple(dict.fromkeys(cell["implementation"] for cell in together(test_contention, {})))
    rounds = QUICK_ROUNDS if request.config.getoption("--quick") else ROUNDS
    found = rows(names, rounds, say)[implementation, busy_processes]
    times = found.get("times")
    row(**{name: value for name, value in found.items() if name != "times"})
    if times is None:
        pytest.fail(f"not timed: {found['status']}")
    replay(times)
