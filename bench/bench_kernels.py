"""Every operator at the paper's shapes: each implementation, forward, backward and both, checked before it is timed."""

import itertools
from collections.abc import Callable
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import (
    CASES,
    DTYPES,
    IMPLEMENTATIONS,
    MODES,
    Case,
    Prepared,
    check,
    describe,
    formats,
    implementations,
    kept,
    prepare,
    sampled,
)
from .ceilings import Ceilings

Row = Callable[..., None]
BATCH = {"cuda": 128, "cpu": 16}
SAMPLES = {"cuda": 30, "cpu": 10}
BY_NAME = {case.name: case for case in CASES}
#: On a CPU each variant takes two cores half a minute to compile. Of what is compiled only the whole stages are
#: measured, stage 1 alone in bfloat16 too, and PyTorch's own operators in float32; the formula in a compiled caller's
#: graph costs what ``inductor`` does but for a call.
COMPILED, HALF = ("stage1", "stage2"), ("stage1",)
NEEDS_GPU = "needs a GPU"


def _cells() -> list[object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cells: list[object] = []
    for case, dtype, mode in itertools.product(CASES, DTYPES, MODES):
        for implementation in implementations(case, device):
            caller_compiled = IMPLEMENTATIONS[implementation][1]
            compiled = caller_compiled or implementation == "inductor"
            if mode not in modes(implementation, device):
                continue
            if device.type == "cpu":
                half = dtype == "bfloat16"
                if (compiled and case.name not in COMPILED) or (half and (case.name not in HALF or caller_compiled)):
                    continue
            marks = [pytest.mark.long] if compiled else []
            cells.append(pytest.param(case.name, dtype, mode, implementation, marks=marks))
    return cells


def modes(implementation: str, device: torch.device) -> tuple[str, ...]:
    """On a CPU what a compiled caller takes without a gradient is not measured: compiling it takes half a minute."""
    compiled = IMPLEMENTATIONS[implementation][1]
    return tuple(mode for mode in MODES if mode != "inference" or not compiled or device.type == "cuda")


@cache
def checked(case: Case, implementation: str, dtype: str, device: torch.device) -> tuple[Prepared | None, str]:
    """The implementation, once it has been found right; None and why it is not timed."""
    if implementation == "triton" and device.type != "cuda":
        return None, NEEDS_GPU
    prepared = prepare(case, implementation)
    try:
        check(prepared, BATCH[device.type], DTYPES[dtype], device, modes(implementation, device))
    except Exception as error:  # Whatever it is becomes the row's status; the benchmark fails, and the others go on.
        return None, f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    return prepared, ""


def may_refuse(implementation: str, reason: str) -> bool:
    """Whether an implementation that is not timed is none of our failures.

    PyTorch's own operators, and cuDNN's, may refuse a dtype; nothing may be wrong, and ours may not fail.
    """
    return reason == NEEDS_GPU or (IMPLEMENTATIONS[implementation][0] == "aten" and "WrongResultError" not in reason)


@cache
def times(case: Case, dtype: str, mode: str, names: tuple[str, ...], device: torch.device) -> dict[str, list[float]]:
    """Seconds of the implementations that are right, sampled in turns."""
    right = [checked(case, name, dtype, device)[0] for name in names]
    rivals = [prepared for prepared in right if prepared is not None]
    found = sampled(rivals, mode, BATCH[device.type], DTYPES[dtype], device, SAMPLES[device.type])
    return dict(zip((rival.implementation for rival in rivals), found, strict=True))


@pytest.mark.parametrize(("case", "dtype", "mode", "implementation"), _cells())
def test_operator(
    request: pytest.FixtureRequest,
    benchmark: BenchmarkFixture,
    replay: Callable[[list[float]], None],
    row: Row,
    device: torch.device,
    ceilings: Ceilings,
    case: str,
    dtype: str,
    mode: str,
    implementation: str,
) -> None:
    """One cell of reports/kernels.md, sampled in turns with those of its rivals that this run has."""
    one, images = BY_NAME[case], BATCH[device.type]
    work = one.work(images, DTYPES[dtype])[mode]
    row(**describe(one, implementation, mode, images, dtype, formats(implementation, device)), work=work)
    prepared, reason = checked(one, implementation, dtype, device)
    if prepared is None:
        row(status=reason)
        if may_refuse(implementation, reason):
            pytest.skip(reason)
        pytest.fail(f"not timed: {reason}")
    replay(times(one, dtype, mode, _rivals(request.session, case, dtype, mode), device)[implementation])
    if mode == "forward":
        row(saved_mib=kept(prepared, images, DTYPES[dtype], device))


def _rivals(session: pytest.Session, case: str, dtype: str, mode: str) -> tuple[str, ...]:
    """The implementations that this run measures at the same task."""
    task = {"case": case, "dtype": dtype, "mode": mode}
    found: list[str] = []
    for item in session.items:
        skipped = item.get_closest_marker("skip")
        if isinstance(item, pytest.Function) and item.function is test_operator and not skipped:
            parameters = dict(item.callspec.params)
            name = str(parameters.pop("implementation"))
            if parameters == task:
                found.append(name)
    return tuple(found)
