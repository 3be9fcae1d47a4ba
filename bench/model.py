"""How long the kernels should take on an H200, from their machine code: ``python -m bench.model``.

A program of these kernels is one warp. It runs the instructions before and behind its loop once and those of the loop
for every row, as they are compiled for sm_90. A time is the longer of two:

- bytes: what must move at least, at the rate that copies were measured at;
- schedule: how long a multiprocessor takes to issue its programs' code (:mod:`bench.schedule`).

Beside them two limits of the schedule, whatever the order of instructions: special functions, 16 a clock on a
multiprocessor for the 32 lanes of each warp, and instructions, one a clock for each of its four schedulers.

Launching is not in it. Of the two kernels that were measured in the state they had then (stage 1 in bfloat16, record
2026-11-20-gpu-382778dd5c, 52.6 us forward and 48.8 us for inference) this model says 46.9 and 43.6, 11 % too little.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from kernels import aot

from . import schedule
from .cases import CASES, DTYPES, Case
from .records import DATA, read, write


class Device(NamedTuple):
    """A GPU's rates."""

    name: str
    target: str
    multiprocessors: int
    clock_hz: float
    bytes_per_s: float


#: NVIDIA's figures, and the copies of 64 MiB in reports/data/2026-11-20-gpu-382778dd5c.jsonl.
H200 = Device("NVIDIA H200", "sm_90", 132, 1.98e9, 4.03e12)
SPECIAL_FUNCTIONS_A_CLOCK = 16
BATCH = 128


def predict(
    row: dict[str, Any], code: schedule.Code, programs: int, turns: Sequence[int], moved: int, device: Device
) -> dict[str, float]:
    """The four times in microseconds, and the one that is modelled.

    Args:
        row: what :func:`kernels.aot.build` found in the machine code.
        code: the machine code.
        programs: of the launch.
        turns: of the loop in programs that follow one another, over and over.
        moved: bytes that must move at least.
        device: the GPU.
    """
    each = programs / device.multiprocessors
    mean = sum(turns) / len(turns)
    instructions = row["instructions"] + (mean - 1) * row["loop_instructions"]
    special = row["special_functions"] + (mean - 1) * row["loop_special_functions"]
    most = [turns[number % len(turns)] for number in range(math.ceil(each))]
    counts = {
        "special_functions": each * special * 32 / SPECIAL_FUNCTIONS_A_CLOCK,
        "instructions": each * instructions / schedule.SCHEDULERS,
        "schedule": schedule.clocks(code, most, schedule.warps(row["registers"], row["shared_bytes"])),
    }
    times = {name: count / device.clock_hz * 1e6 for name, count in counts.items()}
    times["bytes"] = moved / device.bytes_per_s * 1e6
    return {**times, "modelled": max(times["bytes"], times["schedule"])}


def _built(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, float]]]:
    shape = (BATCH, case.channels, case.size, case.size)
    built = aot.Case(case.name, shape, case.normalization, case.pooling, case.relu)
    for mode, launch, moved in aot.launches(built, dtype, torch.channels_last):
        row, code = aot.build(launch, H200.target), schedule.parse(aot.listing(launch, H200.target))
        rows = launch.arguments["tile_rows" if mode == "backward" else "out_rows"]
        each = launch.arguments["segment_rows"]
        turns = [min(each, rows - first) for first in range(0, rows, each)]
        yield mode, predict(row, code, launch.grid[0], turns, moved, H200)


def rows(cases: Sequence[Case] = CASES, dtypes: Sequence[str] = tuple(DTYPES)) -> Iterator[dict[str, Any]]:
    """A row for each kernel at the paper's shapes."""
    for case in cases:
        for dtype in dtypes:
            for mode, times in _built(case, DTYPES[dtype]):
                yield {
                    "suite": "model",
                    "case": case.name,
                    "implementation": "triton",
                    "mode": mode,
                    "shape": f"{BATCH}x{case.channels}x{case.size}x{case.size}",
                    "dtype": dtype,
                    "memory_format": "channels_last",
                    "machine": f"modelled: {H200.name}",
                    **{f"{name}_us": round(value, 2) for name, value in times.items()},
                }


def measured(records: pd.DataFrame, row: dict[str, Any]) -> float | None:
    """The newest measured median of the same kernel, in microseconds, on the GPU that is modelled."""
    keys = ("case", "implementation", "mode", "shape", "dtype", "memory_format")
    if records.empty or not all(key in records for key in keys):
        return None
    same = records[(records[list(keys)] == [row[key] for key in keys]).all(axis=1)]
    same = same[same["machine"] == H200.name]
    return None if same.empty else float(same["median_us"].iloc[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the modelled times, and record them if asked; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=[case.name for case in CASES], help="operators to model")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of input and output")
    parser.add_argument("--record", action="store_true", help="append the rows to reports/data")
    parser.add_argument("--output", type=Path, default=DATA, help="folder for the record")
    options = parser.parse_args(arguments)
    records, found = pd.DataFrame(read(DATA)), []
    print(f"{'':42} bytes special instr. schedule modelled measured us")
    for row in rows([case for case in CASES if not options.case or case.name in options.case], options.dtype):
        was = measured(records, row)
        print(
            f"{row['case']:15} {row['mode']:10} {row['dtype']:16} {row['bytes_us']:>5.1f} "
            f"{row['special_functions_us']:>7.1f} {row['instructions_us']:>6.1f} {row['schedule_us']:>8.1f} "
            f"{row['modelled_us']:>8.1f} {'' if was is None else f'{was:.1f}':>8}",
            flush=True,
        )
        found.append(row)
    if options.record:
        print(f"recorded {len(found)} rows in {write(found, options.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
