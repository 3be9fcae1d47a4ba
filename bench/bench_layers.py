"""Every layer of the paper's network, and what their sum leaves unexplained of the whole step."""

import itertools
from collections.abc import Callable
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from net.model.config import VARIANTS

from .ceilings import Ceilings
from .network import Step, build, images_and_labels, layer_modes, layer_steps, update_step, whole_work

Row = Callable[..., None]
BATCH = {"cuda": 128, "cpu": 16}
DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
CELLS = list(layer_modes("paper"))
#: Median microseconds of the layers measured so far.
MEDIANS: dict[tuple[str, str], float] = {}


@cache
def steps(device: torch.device) -> dict[tuple[str, str], Step]:
    kind = device.type
    return {(step.name, step.mode): step for step in layer_steps("paper", BATCH[kind], DTYPE[kind], device)}


@pytest.mark.parametrize(("name", "mode"), CELLS)
def test_layer(
    benchmark: BenchmarkFixture, row: Row, device: torch.device, ceilings: Ceilings, name: str, mode: str
) -> None:
    """One row of reports/layers.md."""
    step = steps(device)[name, mode]
    # On a GPU the calls take turns, so that each finds its tensors out of the cache.
    calls = itertools.cycle(step.calls)
    benchmark.pedantic(lambda: next(calls)(), rounds=10, warmup_rounds=2)
    assert benchmark.stats is not None
    MEDIANS[name, mode] = benchmark.stats.stats.median * 1e6
    row(
        suite="layers",
        case=name,
        implementation="auto, eager",
        mode=mode,
        dtype=DTYPE[device.type],
        memory_format="channels_last",
        images=BATCH[device.type],
        work=step.work,
        **step.columns,
    )


def test_whole_step(benchmark: BenchmarkFixture, row: Row, device: torch.device, ceilings: Ceilings) -> None:
    """The same network's eager training step, beside the sum of its layers."""
    steps.cache_clear()
    count, dtype = BATCH[device.type], DTYPE[device.type]
    model = build("paper", device)
    update = update_step(model, model, *images_and_labels("paper", count, device), dtype)
    benchmark.pedantic(update, rounds=10, warmup_rounds=2)
    assert benchmark.stats is not None
    # The images of an update are prepared before it.
    parts = [MEDIANS.get(cell) for cell in CELLS if cell[0] != "input preparation"]
    columns: dict[str, float] = {}
    if None not in parts:
        total = sum(value for value in parts if value is not None)
        whole = benchmark.stats.stats.median * 1e6
        columns = {"sum_of_layers_us": round(total, 2), "percent_explained": round(100 * total / whole, 1)}
    row(
        suite="layers",
        case="whole step",
        implementation="auto, eager",
        mode="training",
        dtype=dtype,
        memory_format="channels_last",
        images=count,
        work=whole_work("paper", count, dtype, "training"),
        parameters=VARIANTS["paper"].parameters,
        **columns,
    )
