"""Every operator at the paper's shapes: each implementation, forward, backward and both, checked before it is timed."""

import itertools
from collections.abc import Callable
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import CASES, DTYPES, IMPLEMENTATIONS, MODES, Case, Prepared, check, describe, formats, inputs, prepare
from .ceilings import Ceilings
from .memory import kept_bytes
from .timing import copies

Row = Callable[..., None]
BATCH = {"cuda": 128, "cpu": 16}
BY_NAME = {case.name: case for case in CASES}
#: On a CPU only the whole stages are compiled and measured in bfloat16; the parts of the chain cost what they do there.
WHOLE = ("stage1", "stage2")


def _cells() -> list[object]:
    gpu = torch.cuda.is_available()
    cells: list[object] = []
    for case, dtype, implementation, mode in itertools.product(BY_NAME, DTYPES, IMPLEMENTATIONS, MODES):
        compiled = IMPLEMENTATIONS[implementation][1] or implementation == "inductor"
        if not gpu and case not in WHOLE and (compiled or dtype == "bfloat16"):
            continue
        if gpu and implementation == "inductor":
            continue
        marks = [pytest.mark.long] if compiled else []
        cells.append(pytest.param(case, dtype, implementation, mode, marks=marks))
    return cells


@cache
def checked(case: Case, implementation: str, dtype: str, device: torch.device) -> tuple[Prepared | None, str]:
    """The implementation, once it has been found right; None and why it is not timed."""
    if implementation == "triton" and device.type != "cuda":
        return None, "needs a GPU"
    prepared = prepare(case, implementation)
    try:
        check(prepared, DTYPES[dtype], formats(implementation, device), device)
    except Exception as error:
        return None, f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    return prepared, ""


@pytest.mark.parametrize(("case", "dtype", "implementation", "mode"), _cells())
def test_operator(
    benchmark: BenchmarkFixture,
    row: Row,
    device: torch.device,
    ceilings: Ceilings,
    case: str,
    dtype: str,
    implementation: str,
    mode: str,
) -> None:
    """One cell of reports/kernels.md."""
    one, images = BY_NAME[case], BATCH[device.type]
    format = formats(implementation, device)
    work = one.work(images, DTYPES[dtype])[mode]
    row(**describe(one, implementation, mode, images, dtype, format), work=work)
    prepared, reason = checked(one, implementation, dtype, device)
    if prepared is None:
        row(status=reason)
        # PyTorch's own operators may refuse a dtype; ours may not fail.
        if implementation in ("aten", "compiled", "triton") and "WrongResultError" not in reason:
            pytest.skip(reason)
        pytest.fail(f"not timed: {reason}")
    # On a GPU calls take turns with inputs, so that each finds its own out of the cache.
    count = copies(work.bytes) if device.type == "cuda" else 1
    sets = [inputs(one, images, DTYPES[dtype], format, device, seed) for seed in range(count)]
    calls = prepared.calls(mode, sets)
    kept = kept_bytes(lambda: prepared(*sets[0]), ()) if mode == "forward" else None

    def run() -> None:
        for call in calls:
            call()

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
    row(calls=count, **({} if kept is None else {"saved_mib": round(kept / 2**20, 2)}))
