"""How long the kernels should take on an H200, from their machine code: ``python -m bench.model``.

A program of these kernels is one warp. It runs the instructions before and behind its loop once and those of the loop
for every row; both are counted in the code that is compiled for sm_90. A time is the longest of four:

- bytes: what must move at least, at the rate that copies were measured at;
- special functions: 16 a clock on a multiprocessor, for the 32 lanes of each warp;
- instructions: one a clock for each of a multiprocessor's four schedulers;
- latency: a warp gets to issue every ``CLOCKS_AN_INSTRUCTION`` clocks at best, so that rounds of as many programs as
  fit a multiprocessor's registers take so long for each of their instructions, however few they are.

The last constant was read off a profile of an earlier form of these kernels (reports/LOG.md: 5.5 and 6.7), which waited
for their loads more than they do now: the model knows them better than any other kernel, and may be too careful.
Launching is not in it.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from kernels import aot, triton_stage

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
SCHEDULERS = 4
REGISTERS = 65536
#: One-warp programs that a multiprocessor holds at once.
PROGRAMS = 32
SPECIAL_FUNCTIONS_A_CLOCK = 16
CLOCKS_AN_INSTRUCTION = 6.0
BATCH = 128


def predict(row: dict[str, Any], programs: int, steps: int, moved: int, device: Device) -> dict[str, float]:
    """The four times in microseconds, and the longest of them.

    Args:
        row: what :func:`kernels.aot.build` found in the machine code.
        programs: of the launch.
        steps: turns of a program's loop.
        moved: bytes that must move at least.
        device: the GPU.
    """
    instructions = row["instructions"] + (steps - 1) * row["loop_instructions"]
    special = row["special_functions"] + (steps - 1) * row["loop_special_functions"]
    each = programs / device.multiprocessors
    resident = min(PROGRAMS, REGISTERS // (32 * 8 * math.ceil(row["registers"] / 8)))
    clocks = {
        "special_functions": each * special * 32 / SPECIAL_FUNCTIONS_A_CLOCK,
        "instructions": each * instructions / SCHEDULERS,
        "latency": math.ceil(each / resident) * instructions * CLOCKS_AN_INSTRUCTION,
    }
    times = {name: count / device.clock_hz * 1e6 for name, count in clocks.items()}
    times["bytes"] = moved / device.bytes_per_s * 1e6
    return {**times, "modelled": max(times.values())}


def _built(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, float]]]:
    shape = (BATCH, case.channels, case.size, case.size)
    built = aot.Case(case.name, shape, case.normalization, case.pooling, case.relu)
    for mode, launch, moved in aot.launches(built, dtype, torch.channels_last):
        row = aot.build(launch, H200.target)
        rows = launch.arguments["tile_rows" if mode == "backward" else "out_rows"]
        steps = triton_stage._segments(rows)[1]
        yield mode, predict(row, launch.grid[0], steps, moved, H200)


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
    print(f"{'':42} bytes special instr. latency modelled measured us")
    for row in rows([case for case in CASES if not options.case or case.name in options.case], options.dtype):
        was = measured(records, row)
        print(
            f"{row['case']:15} {row['mode']:10} {row['dtype']:16} {row['bytes_us']:>5.1f} "
            f"{row['special_functions_us']:>7.1f} {row['instructions_us']:>6.1f} {row['latency_us']:>7.1f} "
            f"{row['modelled_us']:>8.1f} {'' if was is None else f'{was:.1f}':>8}",
            flush=True,
        )
        found.append(row)
    if options.record:
        print(f"recorded {len(found)} rows in {write(found, options.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
