"""Every layer of the paper's network, and the share of the whole step that their sum explains."""

import itertools
from collections.abc import Callable
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from net.model.config import VARIANTS

from .cells import here
from .measure.ceilings import Ceilings
from .subjects.network import LayerCalls, build, images_and_labels, layer_calls, layer_modes, update_step, whole_work

Row = Callable[..., None]
SCALE = here()
CELLS = list(layer_modes(SCALE.network))
#: Median microseconds of the layers measured so far.
MEDIANS: dict[tuple[str, str], float] = {}


@cache
def layers(device: torch.device) -> dict[tuple[str, str], LayerCalls]:
    return {(layer.name, layer.mode): layer for layer in layer_calls(SCALE.network, SCALE.images, SCALE.dtype, device)}


@pytest.mark.parametrize(("name", "mode"), CELLS)
def test_layer(
    benchmark: BenchmarkFixture, row: Row, device: torch.device, ceilings: Ceilings, name: str, mode: str
) -> None:
    """One row of reports/layers.md."""
    layer = layers(device)[name, mode]
    # On a GPU the calls alternate, so that no call finds its tensors in the cache.
    calls = itertools.cycle(layer.calls)
    benchmark.pedantic(lambda: next(calls)(), rounds=10, warmup_rounds=2)
    assert benchmark.stats is not None
    MEDIANS[name, mode] = benchmark.stats.stats.median * 1e6
    row(
        suite="layers",
        case=name,
        implementation="auto, eager",
        mode=mode,
        dtype=SCALE.dtype,
        memory_format="channels_last",
        images=SCALE.images,
        work=layer.work,
        **layer.columns,
    )


def test_whole_step(benchmark: BenchmarkFixture, row: Row, device: torch.device, ceilings: Ceilings) -> None:
    """The same network's eager training step, compared with the sum of its layers."""
    layers.cache_clear()
    count, dtype = SCALE.images, SCALE.dtype
    model = build(SCALE.network, device)
    update = update_step(model, model, *images_and_labels(SCALE.network, count, device), dtype)
    benchmark.pedantic(update, rounds=5, warmup_rounds=1)
    assert benchmark.stats is not None
    # Input preparation is not part of a training step.
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
        work=whole_work(SCALE.network, count, dtype, "training"),
        parameters=VARIANTS[SCALE.network].parameters,
        **columns,
    )
