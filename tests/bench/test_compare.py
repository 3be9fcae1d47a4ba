"""Two records held against each other: what the machine did is told from what the code did."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import report
from net.common.errors import UsageError
from tests.commands import Done, one_line, run_here

MACHINE = {"machine": "CPU: Xeon", "threads": 2, "torch": "2.13.0+cpu", "date": "2026-12-01"}
Row = dict[str, Any]


def row(suite: str, case: str, implementation: str, median: float, **columns: Any) -> Row:
    """A row as a benchmark writes it; its middle three fifths are two percent wide."""
    times = {"median_us": median, "p20_us": median * 0.99, "p80_us": median * 1.01}
    return {"suite": suite, "case": case, "implementation": implementation, **times, **MACHINE, **columns}


def kernel(implementation: str, median: float, **columns: Any) -> Row:
    """A row of a stage, which moves more than it computes."""
    work = {"dtype": "float32", "gflop": 0.01, "fewest_mb": 30.0}
    return row("kernels", "stage1", implementation, median, **{"mode": "forward", **work, **columns})


def step(median: float, implementation: str = "auto, eager") -> Row:
    """A row of a whole update, which computes more than it moves."""
    return row("steps", "update of paper", implementation, median, dtype="float32", gflop=66.0, fewest_mb=2000.0)


def ceilings(copy: float, product: float, half: float = 1.0) -> list[Row]:
    """20 GB/s and 160 GFLOP/s, slowed by these factors; bfloat16 at a hundredth of that."""
    product_of = {"float32": (100.0 * product, 160.0 / product), "bfloat16": (100.0 * half, 1.6 / half)}
    rows = [row("ceilings", "copy", "aten", 100.0 * copy, dtype="float32", gb_per_s=20.0 / copy)]
    for dtype, (median, rate) in product_of.items():
        rows.append(row("ceilings", "matrix product", "aten", median, dtype=dtype, gflop_per_s=rate))
    return rows


def compared(folder: Path, before: Sequence[Row], after: Sequence[Row]) -> Done:
    paths = []
    for name, rows in (("before.jsonl", before), ("after.jsonl", after)):
        paths.append(folder / name)
        paths[-1].write_text("".join(json.dumps(one) + "\n" for one in rows))
    return run_here("bench.report", "--compare", *paths)


def verdicts(done: Done) -> list[tuple[str, str, str]]:
    """Verdict, implementation and the last column of each line."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("slower", "faster", "fails"))]
    names = ("auto, eager", "inductor", "triton", "traced", "reference")
    return [(line.split()[0], next(name for name in names if name in line), line.split()[-1]) for line in lines]


def test_comparing_tells_change_from_noise(tmp_path: Path) -> None:
    before = [kernel("triton", 100.0), kernel("traced", 100.0), kernel("inductor", 100.0)]
    # Four percent; eight with a wide spread; fifty, timed once.
    wide = kernel("traced", 108.0, p20_us=99.0)
    once = {name: value for name, value in kernel("inductor", 150.0).items() if name not in ("p20_us", "p80_us")}
    done = compared(tmp_path, before, [kernel("triton", 104.0), wide, once])
    assert done.returncode == 0
    assert "0 of 3 changed" in done.stdout
    assert "2 were timed often enough" in done.stdout
    done = compared(tmp_path, before, [kernel("triton", 80.0)])
    assert done.returncode == 0
    assert verdicts(done) == [("faster", "triton", "-20%")]
    assert f"2 only in {tmp_path / 'before.jsonl'}" in done.stdout
    done = compared(tmp_path, before, [kernel("triton", 108.0), kernel("traced", 80.0)])
    assert done.returncode == 1
    assert verdicts(done) == [("slower", "triton", "+8%"), ("faster", "traced", "-20%")]
    failed = {**kernel("triton", 1.0), "status": "failed: WrongResult: no"}
    del failed["median_us"]
    done = compared(tmp_path, before, [failed])
    assert done.returncode == 1
    assert "failed: WrongResult: no" in done.stdout


def test_a_slower_machine_is_no_slower_code(tmp_path: Path) -> None:
    """Everything that products limit takes a third longer; memory is as it was."""
    before = [*ceilings(1.0, 1.0), kernel("aten", 900.0), kernel("reference", 200.0), step(1000.0)]
    done = compared(
        tmp_path, before, [*ceilings(1.0, 1.32), kernel("aten", 900.0), kernel("reference", 200.0), step(1320.0)]
    )
    assert done.returncode == 0, done.stdout
    assert "the machine moved, products in float32: +32% time for the same code (1 rows)" in done.stdout
    assert "the machine is the same, memory: +0% time for the same code (2 rows)" in done.stdout
    assert "0 of 2 changed" in done.stdout
    # What did not get slower with it got faster; what is limited otherwise is held against something else.
    done = compared(
        tmp_path, before, [*ceilings(1.0, 1.32), kernel("aten", 900.0), kernel("reference", 264.0), step(1000.0)]
    )
    assert done.returncode == 1
    assert verdicts(done) == [("slower", "reference", "+32%"), ("faster", "auto, eager", "-24%")]


def test_pytorch_s_operators_are_the_yardstick(tmp_path: Path) -> None:
    """The median of copies and rivals, none of which is judged; how they differ is the noise."""
    rivals = [kernel(name, 100.0, mode=mode) for name in ("aten", "compiled") for mode in ("forward", "backward")]
    before = [*ceilings(1.0, 1.0), *rivals, kernel("reference", 100.0), kernel("inductor", 100.0)]
    factors = (1.1, 1.5, 1.5, 1.9)
    slowed = [
        kernel(one["implementation"], 100.0 * f, mode=one["mode"]) for one, f in zip(rivals, factors, strict=True)
    ]
    done = compared(
        tmp_path, before, [*ceilings(1.5, 1.0), *slowed, kernel("reference", 150.0), kernel("inductor", 400.0)]
    )
    assert "memory: +50% time for the same code (5 rows)" in done.stdout
    assert verdicts(done) == [("slower", "inductor", "+167%")]
    # A rival alone slows nothing down.
    done = compared(tmp_path, [kernel("aten", 100.0)], [kernel("aten", 200.0)])
    assert done.returncode == 0
    assert "0 of 0 changed" in done.stdout
    # Nor does one of another version, which says nothing about the machine.
    done = compared(
        tmp_path, [kernel("xla", 100.0), kernel("triton", 100.0)], [kernel("xla", 200.0), kernel("triton", 99.0)]
    )
    assert done.returncode == 0
    assert "0 of 1 changed" in done.stdout
    # Within what rivals differ by, in both directions.
    spread = [
        kernel(one["implementation"], 100.0 * f, mode=one["mode"])
        for one, f in zip(rivals, (0.7, 0.7, 1.4, 1.4), strict=True)
    ]
    ours = [kernel("reference", 125.0), kernel("inductor", 80.0)]
    assert "0 of 2 changed" in compared(tmp_path, before, [*ceilings(1.0, 1.0), *spread, *ours]).stdout
    assert len(verdicts(compared(tmp_path, before, [*ceilings(1.0, 1.0), *rivals, *ours]))) == 2


def test_a_dtype_without_instructions_limits_no_stage(tmp_path: Path) -> None:
    """Stages compute bfloat16 in float32, and go with memory."""
    before = [*ceilings(1.0, 1.0), kernel("reference", 200.0, dtype="bfloat16", gflop=0.06)]
    done = compared(
        tmp_path, before, [*ceilings(1.0, 1.0, 3.0), kernel("reference", 200.0, dtype="bfloat16", gflop=0.06)]
    )
    assert "products in bfloat16: +200%" in done.stdout
    assert "0 of 1 changed" in done.stdout


def test_rows_beside_busy_processes_are_rows_of_their_own(tmp_path: Path) -> None:
    def contention(busy: int, ours: float, aten: float) -> list[Row]:
        names = {"auto, eager": ours, "aten, eager": aten}
        return [row("contention", "stages 1 + 2", name, time, busy_processes=busy) for name, time in names.items()]

    before = [*contention(0, 57.0, 316.0), *contention(2, 4360.0, 1032.0)]
    done = compared(tmp_path, before, [*contention(0, 57.0, 316.0), *contention(2, 300.0, 2064.0)])
    assert "the machine moved, 2 busy processes: +100% time" in done.stdout
    assert verdicts(done) == [("faster", "auto, eager", "-97%")]
    assert "1 of 2 changed" in done.stdout


def test_only_records_of_one_machine_are_compared(tmp_path: Path) -> None:
    other = {**kernel("aten", 100.0), "torch": "2.12.0"}
    one_line(compared(tmp_path, [kernel("aten", 100.0)], [other]), 2, "torch 2.13.0", "torch 2.12.0", "one machine")
    done = compared(tmp_path, [kernel("aten", 100.0)], [kernel("triton", 100.0)])
    one_line(done, 2, "no measurement in common")
    missing = tmp_path / "none.jsonl"
    one_line(run_here("bench.report", "--compare", tmp_path / "after.jsonl", missing), 2, f"{missing} is no file")
    with pytest.raises(UsageError, match=r"--compare takes two records; got 1"):
        report.ReportConfig(("a",))
