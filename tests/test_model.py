"""Times that are modelled from machine code: the arithmetic by hand, and the command."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from bench.model import H200, measured, predict
from tests.commands import ROOT, environment

ROW = {
    "registers": 126,
    "instructions": 1100,
    "loop_instructions": 100,
    "special_functions": 30,
    "loop_special_functions": 10,
}


def test_the_four_times() -> None:
    """1320 programs are ten a multiprocessor, which holds 16 of 128 registers: one round of 1400 instructions."""
    times = predict(ROW, 1320, 4, 403_000_000, H200)
    clock = H200.clock_hz * 1e-6
    assert times["instructions"] == pytest.approx(10 * 1400 / 4 / clock)
    assert times["special_functions"] == pytest.approx(10 * 60 * 2 / clock)
    assert times["latency"] == pytest.approx(1400 * 6 / clock)
    assert round(times["bytes"], 6) == 100.0
    assert times["modelled"] == 100.0 == max(times.values())
    assert predict(ROW, 1320 * 2, 4, 0, H200)["latency"] == pytest.approx(2 * 1400 * 6 / clock), (
        "twenty need a second round"
    )


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
        parts = [row[f"{name}_us"] for name in ("bytes", "special_functions", "instructions", "latency")]
        assert row["modelled_us"] == max(parts) > 0
