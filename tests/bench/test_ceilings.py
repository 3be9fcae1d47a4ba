"""What a machine can do at best: no product that its processor has no instructions for takes minutes."""

from collections.abc import Iterator

import pytest
import torch

from bench.measure import ceilings
from bench.measure.ceilings import HOPELESS, MATRIX, PROBE

CPU = torch.device("cpu")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[torch.dtype, int]]]:
    """Dtypes and sides of the matrices that are multiplied; a product takes twice ``HOPELESS`` in bfloat16."""
    asked: list[tuple[torch.dtype, int]] = []

    def product(dtype: torch.dtype, side: int, device: torch.device, samples: int) -> list[float]:
        asked.append((dtype, side))
        return [1e-3 * (2 * HOPELESS if dtype == torch.bfloat16 else 1), 5.0]

    monkeypatch.setattr(ceilings, "_product", product)
    monkeypatch.setattr(ceilings, "copy", lambda *arguments: [1e-3])
    slowdown = ceilings.slowdown
    slowdown.cache_clear()
    yield asked
    slowdown.cache_clear()


def test_a_dtype_without_instructions_is_measured_small(products: list[tuple[torch.dtype, int]]) -> None:
    said: list[str] = []
    rows = list(ceilings.rows(CPU, 3, said.append))
    assert max(side for dtype, side in products if dtype == torch.bfloat16) == PROBE
    full, small = rows[-2:]
    assert full["shape"] == "x".join([str(MATRIX["cpu"])] * 3)
    assert "note" not in full
    assert small["shape"] == "x".join([str(PROBE)] * 3)
    assert small["note"] == "needs bf16 instructions: a product takes 40 x as long as in float32"
    assert said == ["copy of 16 MiB", "copy of 256 MiB", "matrix product in float32", "matrix product in bfloat16"]


def test_what_is_asked_is_asked_once(products: list[tuple[torch.dtype, int]]) -> None:
    before = torch.get_num_threads()
    assert ceilings.lacking(torch.bfloat16, CPU) == ceilings.lacking(torch.bfloat16, CPU) != ""
    assert ceilings.lacking(torch.float32, CPU) == ""
    assert products == [(torch.bfloat16, PROBE), (torch.float32, PROBE)]
    assert torch.get_num_threads() == before


def test_a_dtype_with_instructions_is_measured_whole(
    products: list[tuple[torch.dtype, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "slowdown", lambda dtype, device: HOPELESS / 2)
    rows = list(ceilings.rows(CPU, 3))
    assert [row["shape"] for row in rows[-2:]] == ["x".join([str(MATRIX["cpu"])] * 3)] * 2
    assert not any("note" in row for row in rows)


def test_no_limit_is_lower_than_float32_s(products: list[tuple[torch.dtype, int]]) -> None:
    """What has no instructions for bfloat16 computes in float32, as the stages do."""
    found = ceilings.ceilings(list(ceilings.rows(CPU, 3)))
    assert found.flop_per_s["bfloat16"] == found.flop_per_s["float32"] > 0


def test_this_processor() -> None:
    """oneDNN knows from the processor's flags what the probe measures."""
    ceilings.slowdown.cache_clear()
    assert ceilings.slowdown(torch.float32, CPU) == 1
    assert ceilings.slowdown(torch.bfloat16, CPU) > 0
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert ceilings.lacking(torch.bfloat16, CPU) == ""
