"""Times that are modelled from machine code: the arithmetic by hand, and the command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bench.model import H200, measured, predict
from bench.schedule import LAUNCH, MEMORY, NONE, Code, Instruction, clocks, parse, warps
from tests.commands import ROOT, environment


def step(unit: str, taken: int, stall: int = 1, latency: int = 5, **rest: Any) -> Instruction:
    return Instruction(unit, taken, latency, stall, **{"waits": (), "result": NONE, "operands": NONE, **rest})


def spent(turn: list[Instruction], programs: int, resident: int, turns: int = 1) -> int:
    return clocks(Code([], turn, []), [turns] * programs, resident)


def test_a_scheduler_issues_an_instruction_a_clock() -> None:
    """100 instructions of a warp alone take their stalls; four warps fill one another's."""
    quick, slow = [step("FMA", 1)] * 100, [step("FMA", 1, stall=4)] * 100
    assert spent(quick, programs=4, resident=1) == 100
    assert spent(quick, programs=4, resident=1, turns=3) == 300
    assert spent(quick, programs=8, resident=2) == 200
    assert spent(slow, programs=4, resident=1) == 400 - 3
    assert 400 <= spent(slow, programs=16, resident=4) <= 410
    assert 800 <= spent(slow, programs=32, resident=8) <= 810


def test_units_are_waited_for() -> None:
    special, loads = [step("XU", 8)] * 50, [step("LSU", 4)] * 50
    assert spent(special, programs=4, resident=1) == 50 * 8 - 7
    assert spent(special, programs=8, resident=2) == 100 * 8 - 7
    assert 4 * 50 * 4 - 16 <= spent(loads, programs=4, resident=1) <= 4 * 50 * 4, "one for all schedulers"


def test_scoreboards_are_waited_for() -> None:
    """A load's result, what a load still reads, and copies, each as long as it takes and no longer."""
    use = step("FMA", 1, waits=(2,))
    assert spent([step("LSU", 4, latency=700, result=2), use], 1, 1) == 704 + 1
    assert spent([step("LSU", 4, latency=700, operands=2), use], 1, 1) == 4 + 10 + 1
    assert spent([step("LSU", 4, latency=700, result=3), use], 1, 1) == 2
    copies = [step("LSU", 4, latency=700, copies=True), step("", 0, commits=True)]
    assert spent([*copies, step("", 0, waits=(0,))], 1, 1) == 704 + 1
    assert spent([*copies, step("", 0, waits=(1,))], 1, 1) == 3


def test_programs_take_the_places_of_those_that_are_done() -> None:
    body = [step("FMA", 1, stall=2)] * 1000
    first = spent(body, programs=8, resident=2)
    assert first == 2000
    assert spent(body, programs=12, resident=2) == pytest.approx(first + 2000 + LAUNCH, abs=5)
    # Two warps take all clocks, and the third begins when they are done.
    assert spent(body, programs=12, resident=3) == pytest.approx(first + 2000, abs=5)


def test_warps_of_a_scheduler() -> None:
    """16384 registers a scheduler, in steps of eight a thread: 96 leave room for five warps."""
    assert [warps(registers) for registers in (32, 64, 65, 72, 80, 96, 97, 128, 168, 255)] == [
        8, 8, 7, 7, 6, 5, 4, 4, 3, 2,
    ]  # fmt: skip
    assert warps(32, 30_000) == 1


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;             /* 0x00000a0000017a02 */
                                                                      /* 0x003fe20000000f00 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R6.64], P0 ; /* 0x0000000006027fae */
                                                                      /* 0x0003e2000b921a44 */
        /*0020*/              @!P1 FMUL R3, R3, R4 ;                  /* 0x0000000403037220 */
                                                                      /* 0x004fc80000400000 */
        /*0030*/                   MUFU.RSQ R5, R3 ;                  /* 0x0000000300057308 */
                                                                      /* 0x000ea20000001400 */
        /*0040*/                   DEPBAR.LE SB0, 0x0 ;               /* 0x000080000000791a */
                                                                      /* 0x000fc80000000000 */
        /*0050*/               @P1 BRA 0x20 ;                         /* 0xffffffc000001947 */
                                                                      /* 0x000fea000383ffff */
        /*0060*/                   EXIT ;                             /* 0x000000000000794d */
                                                                      /* 0x000fea0003800000 */
        /*0070*/                   BRA 0x70;                          /* 0xfffffffc00fc7947 */
                                                                      /* 0x000fc0000383ffff */
"""


def test_the_assembler_s_schedule_is_read() -> None:
    before, turn, behind = parse(LISTING)
    assert [len(part) for part in (before, turn, behind)] == [2, 4, 1]
    assert before[0] == Instruction("ALU", 2, 6, 1, (0, 1), NONE, NONE)
    assert before[1] == Instruction("LSU", 4, MEMORY, 1, (), NONE, 1, copies=True)
    assert turn[0] == Instruction("FMA", 1, 5, 4, (2,), NONE, NONE)
    assert turn[1] == Instruction("XU", 8, 22, 1, (), 2, NONE)
    assert turn[2].waits == (0,)
    assert turn[3].stall == 8
    with pytest.raises(ValueError, match="a kernel with a loop"):
        parse(LISTING.replace("BRA 0x20", "BRA 0x60"))


def test_the_four_times() -> None:
    """1320 programs are ten a multiprocessor, two or three a scheduler: 1400 instructions each."""
    row = {
        "registers": 126,
        "shared_bytes": 0,
        "instructions": 1100,
        "loop_instructions": 100,
        "special_functions": 30,
        "loop_special_functions": 10,
    }
    code = Code([step("FMA", 1)] * 1000, [step("FMA", 1)] * 100, [])
    times = predict(row, code, 1320, [4], 403_000_000, H200)
    clock = H200.clock_hz * 1e-6
    assert times["instructions"] == pytest.approx(10 * 1400 / 4 / clock)
    assert times["special_functions"] == pytest.approx(10 * 60 * 2 / clock)
    assert times["schedule"] == pytest.approx(3 * 1400 / clock)
    assert round(times["bytes"], 6) == 100.0
    assert times["modelled"] == 100.0
    assert predict(row, code, 1320, [4], 0, H200)["modelled"] == times["schedule"]
    shorter = predict(row, code, 1320, [4, 2], 0, H200)
    assert shorter["instructions"] == pytest.approx(10 * 1300 / 4 / clock), "every other program is shorter"


def test_a_measurement_is_of_the_same_kernel_and_machine() -> None:
    row = {"case": "a", "implementation": "triton", "mode": "forward", "shape": "1", "dtype": "x", "memory_format": "y"}
    others = [
        {**row, "machine": "another", "median_us": 1.0},
        {**row, "machine": H200.name, "mode": "backward", "median_us": 2.0},
    ]
    assert measured(pd.DataFrame(others), row) is None
    assert measured(pd.DataFrame(), row) is None
    found = [{**row, "machine": H200.name, "median_us": value} for value in (3.0, 4.0)]
    assert measured(pd.DataFrame([*others, *found]), row) == 4.0


def test_the_command(tmp_path: Path) -> None:
    clean = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.model", "--case", "relu_max_pool5", "--dtype", "bfloat16", "--record"]
    done = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True, env=clean, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["mode"] for row in rows] == ["forward", "inference", "backward"]
    for row in rows:
        assert row["machine"] == "modelled: NVIDIA H200"
        assert "median_us" not in row
        assert row["modelled_us"] == max(row["bytes_us"], row["schedule_us"])
        assert 0 < max(row["special_functions_us"], row["instructions_us"]) < row["schedule_us"], "no unit is exceeded"
