"""Every operator at the paper's shapes: each implementation, forward, backward and both, checked before it is timed."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch

from .measure.ceilings import Ceilings
from .subjects.cases import (
    CASES,
    DTYPES,
    IMPLEMENTATIONS,
    MODES,
    Case,
    Prepared,
    check,
    describe,
    failure,
    formats,
    implementations,
    kept,
    prepare,
    sampled,
)

Row = Callable[..., None]
Together = Callable[..., list[dict[str, Any]]]
Say = Callable[[str], None]
BATCH = {"cuda": 128, "cpu": 16}
SAMPLES = {"cuda": 30, "cpu": 10}
BY_NAME = {case.name: case for case in CASES}
#: On a CPU each variant takes two cores half a minute to compile. Of what is compiled only the whole stages are
#: measured, stage 1 alone in bfloat16 too, and PyTorch's own operators in float32; the formula in a compiled caller's
#: graph costs what ``inductor`` does but for a call.
COMPILED, HALF = ("stage1", "stage2"), ("stage1",)
NEEDS_GPU = "needs a GPU"


def _compiled(implementation: str) -> bool:
    return IMPLEMENTATIONS[implementation][1] or implementation == "inductor"


def _cells() -> list[object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cells: list[object] = []
    for case, dtype, mode in itertools.product(CASES, DTYPES, MODES):
        for implementation in implementations(case, device):
            caller_compiled, compiled = IMPLEMENTATIONS[implementation][1], _compiled(implementation)
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
        return None, failure(error)
    return prepared, ""


def may_refuse(implementation: str, reason: str) -> bool:
    """Whether an implementation that is not timed is none of our failures.

    PyTorch's own operators, and cuDNN's, may refuse a dtype; nothing may be wrong, and ours may not fail.
    """
    return reason == NEEDS_GPU or (IMPLEMENTATIONS[implementation][0] == "aten" and "WrongResultError" not in reason)


@cache
def times(
    case: Case, dtype: str, mode: str, names: tuple[str, ...], device: torch.device, say: Say
) -> dict[str, list[float] | str]:
    """Seconds of the implementations that are right, sampled in turns; or why there are none."""
    right = [checked(case, name, dtype, device)[0] for name in names]
    rivals = [prepared for prepared in right if prepared is not None]
    say(f"{mode} of {case.name}, {dtype}: {', '.join(rival.implementation for rival in rivals)}")
    found = sampled(rivals, mode, BATCH[device.type], DTYPES[dtype], device, SAMPLES[device.type])
    return dict(zip((rival.implementation for rival in rivals), found, strict=True))


@pytest.fixture(scope="session")
def compiled_ahead(together: Together, device: torch.device, cold_compiler: None, say: Say) -> None:
    """On a CPU, where it takes half a minute for each, all that this run compiles is compiled in a process for each
    core: one keeps little more than a core busy."""
    # XLA takes a second, and keeps nothing for another process.
    ours = [cell for cell in together(test_operator, {}) if cell["implementation"] != "xla"]
    cells = [cell for cell in ours if _compiled(cell["implementation"])]
    if device.type == "cuda" or not cells:
        return
    names = list(dict.fromkeys(f"{cell['case']},{cell['implementation']},{cell['dtype']}" for cell in cells))
    compile_ahead(names, min(len(names), os.cpu_count() or 1), say)


def compile_ahead(names: Sequence[str], count: int, say: Say) -> None:
    """Run :mod:`bench.measure.compile_ahead` for variants in ``count`` processes; ``say`` is told how far they are."""
    say(f"compiling {len(names)} variants in {count} processes")
    begin = time.perf_counter()
    answers, answer = os.pipe()
    shares = [[sys.executable, "-m", "bench.measure.compile_ahead", *names[number::count]] for number in range(count)]
    processes = [subprocess.Popen(share, stdout=answer, stderr=subprocess.DEVNULL) for share in shares]
    os.close(answer)
    try:
        # Ends when each process has ended, whether it has compiled all of its variants or not.
        with os.fdopen(answers) as lines:
            for done, line in enumerate(lines, 1):
                left = (time.perf_counter() - begin) / done * (len(names) - done)
                say(f"compiled {done} of {len(names)}: {line.strip()}" + (f"; about {left:.0f} s left" if left else ""))
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(("case", "dtype", "mode", "implementation"), _cells())
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
    cells = together(test_operator, {"case": case, "dtype": dtype, "mode": mode})
    rivals = tuple(cell["implementation"] for cell in cells)
    found = times(one, dtype, mode, rivals, device, say)[implementation]
    if isinstance(found, str):
        row(status=found)
        pytest.fail(f"not timed: {found}")
    replay(found)
    if mode == "forward":
        row(saved_mib=kept(prepared, images, DTYPES[dtype], device))
