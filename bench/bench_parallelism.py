"""The strategies at equal global batch: the cases of ``python -m bench.parallelism`` for the digits network."""

from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from net.parallel.strategies import STRATEGIES

from .parallelism import ALL_CORES, cores_per_process, started, too_few_gpus

BATCH = 64


@pytest.mark.parametrize("strategy", ["none", ALL_CORES, *STRATEGIES])
def test_update(benchmark: BenchmarkFixture, recorded: list[dict[str, Any]], strategy: str) -> None:
    """Processes of their own, timed from start to end; the row is what they measured."""
    ranks = 1 if strategy in ("none", ALL_CORES) else 2
    if strategy == ALL_CORES and cores_per_process(ALL_CORES, 2) == cores_per_process("none", 2):
        pytest.skip("is the same as none here")
    if too_few_gpus(ranks):
        pytest.skip(f"needs {ranks} GPUs")
    arguments = (strategy, ranks, ("--network", "digits", "--batch-size", BATCH, "--updates", 10, "--ranks", 2))
    row = benchmark.pedantic(started, arguments, rounds=1)
    benchmark.extra_info.update(row)
    recorded.append(row)


def test_link(benchmark: BenchmarkFixture, recorded: list[dict[str, Any]]) -> None:
    """All-reduces of a number and of 64 MiB, by which the cost model predicts the updates above."""
    rows = benchmark.pedantic(started, ("link", 2, ("--ranks", 2)), rounds=1)
    recorded.extend(rows)


@pytest.mark.parametrize("strategy", ["none", *STRATEGIES])
def test_one_rank(benchmark: BenchmarkFixture, recorded: list[dict[str, Any]], strategy: str) -> None:
    """What a strategy computes on one device, its messages left out."""
    arguments = ("--network", "digits", "--batch-size", BATCH, "--updates", 10, "--ranks", 2)
    row = benchmark.pedantic(started, (f"alone: {strategy}", 1, arguments), rounds=1)
    recorded.append(row)
