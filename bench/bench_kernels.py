"""Every operator at the paper's shapes: each implementation, forward, backward and both, checked before it is timed."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from .cells import Operator, here, operators
from .compile_ahead import checked
from .measure.ceilings import Ceilings
from .subjects.cases import BY_NAME, DTYPES, Case, describe, formats, kept, may_refuse, sampled

Row = Callable[..., None]
Together = Callable[..., list[dict[str, Any]]]
Say = Callable[[str], None]
SCALE = here()
SAMPLES = {"cuda": 30, "cpu": 10}


@cache
def times(
    case: Case, dtype: str, mode: str, names: tuple[str, ...], device: torch.device, say: Say
) -> dict[str, list[float] | str]:
    """Seconds of the implementations that passed their check, sampled interleaved; or why there are none."""
    right = [checked(case, name, dtype, SCALE)[0] for name in names]
    rivals = [prepared for prepared in right if prepared is not None]
    say(f"{mode} of {case.name}, {dtype}: {', '.join(rival.implementation for rival in rivals)}")
    found = sampled(rivals, mode, SCALE.images, DTYPES[dtype], device, SAMPLES[device.type])
    return dict(zip((rival.implementation for rival in rivals), found, strict=True))


def _marks(cell: Operator) -> list[pytest.MarkDecorator]:
    if not cell.compiled:
        return []
    # XLA takes a second, and has no cache that another process could read.
    ahead = [pytest.mark.ahead("operator", cell.case, cell.implementation, cell.dtype)]
    return [pytest.mark.long, *(ahead if cell.implementation != "xla" else [])]


def _marked() -> list[object]:
    return [pytest.param(*cell, marks=_marks(cell)) for cell in operators(SCALE)]


@pytest.mark.parametrize(("case", "dtype", "mode", "implementation"), _marked())
@pytest.mark.usefixtures("compiled_ahead")
def test_operator(
    together: Together,
    replay: Callable[[list[float]], None],
    row: Row,
    device: torch.device,
    ceilings: Ceilings,
    say: Say,
    case: str,
    dtype: str,
    mode: str,
    implementation: str,
) -> None:
    """One cell of reports/kernels.md, sampled interleaved with those of its rivals in this run."""
    one, images = BY_NAME[case], SCALE.images
    work = one.work(images, DTYPES[dtype])[mode]
    row(**describe(one, implementation, mode, images, dtype, formats(implementation, device)), work=work)
    prepared, reason = checked(one, implementation, dtype, SCALE)
    if prepared is None:
        row(status=reason)
        if may_refuse(implementation, reason):
            pytest.skip(reason)
        pytest.fail(f"not timed: {reason}")
    cells = together(test_operator, {"case": case, "dtype": dtype, "mode": mode})
    rivals = tuple(cell["implementation"] for cell in cells)
    found = times(one, dtype, mode, rivals, device, say)[implementation]
    if isinstance(found, str):
        row(status=found)
        pytest.fail(f"not timed: {found}")
    replay(found)
    if mode == "forward":
        row(saved_mib=kept(prepared, images, DTYPES[dtype], device))
