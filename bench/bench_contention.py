"""Stages 1 and 2 as a user's own program runs them, alone and with busy processes running: :mod:`bench.contention`."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from .contention import BUSY, EAGER, measure
from .subjects.user_program import IMPLEMENTATIONS

Row = Callable[..., None]
Say = Callable[[str], None]
Together = Callable[..., list[dict[str, Any]]]
IMAGES = 16


def _cells() -> list[object]:
    compiles = {
        name: [] if name in EAGER else [pytest.mark.long, pytest.mark.ahead("stages", name, IMAGES)]
        for name in IMPLEMENTATIONS
    }
    return [pytest.param(name, count, marks=compiles[name]) for name in IMPLEMENTATIONS for count in BUSY]


@cache
def rows(names: tuple[str, ...], say: Say) -> dict[tuple[str, int], dict[str, Any]]:
    """Times of the implementations, each in its own process, interleaved."""
    found = measure(names, IMAGES, say)
    return {(row["implementation"], row["busy_processes"]): row for row in found}


@pytest.mark.parametrize(("implementation", "busy_processes"), _cells())
@pytest.mark.usefixtures("compiled_ahead")
def test_contention(
    together: Together,
    replay: Callable[[list[float]], None],
    row: Row,
    say: Say,
    implementation: str,
    busy_processes: int,
) -> None:
    """One cell: forward and backward, with PyTorch's default thread and memory settings."""
    names = tuple(dict.fromkeys(cell["implementation"] for cell in together(test_contention, {})))
    found = rows(names, say)[implementation, busy_processes]
    times = found.get("times")
    row(**{name: value for name, value in found.items() if name != "times"})
    if times is None:
        pytest.fail(f"not timed: {found['status']}")
    replay(times)
