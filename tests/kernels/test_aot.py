"""The machine code of the kernels, built for GPUs that are not there, in a process without Triton's interpreter."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import aot
from kernels.aot import warps
from kernels.gpu import config
from tests.commands import ROOT, environment
from tests.test_readmes import commands

PAPER = ("--case", "stage 2", "--dtype", "bfloat16", "--memory-format", "channels_last")


def built(folder: Path, *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows by target and mode."""
    clean = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    file = folder / "rows.json"
    command = [sys.executable, "-m", "kernels.aot", *arguments, "--output", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert len(done.stdout.splitlines()) == len(rows) + len({row["target"] for row in rows}) + 1
    return {(row["target"], row["mode"]): row for row in rows}


def check_stage(target: str, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """No spills, and every activation and gradient is accessed 16 bytes at a time; the others as listed."""
    for mode in ("forward", "inference", "backward"):
        row = rows[target, mode]
        assert row["local_bytes"] == row["local_accesses"] == 0, row
        # What is loaded ahead waits in shared memory, once: six pixels, or four and four windows.
        assert row["shared_bytes"] == 32 * (4 * 16 + 4 * (16 + 8) if mode == "backward" else 6 * 16)
        assert row["warps"] >= (5 if mode == "backward" else 7), "registers a scheduler has"
        assert row["elements_a_step"] == (32 if mode == "backward" else 8)
    # Three pixels of the row above the segment, of the next two before the loop and in it; the bias has 32 bytes.
    assert rows[target, "forward"]["accesses"] == {
        "load 16 bytes": 5 * 3 + 2,
        "store 16 bytes": 1,
        "store 8 bytes": 1,
    }
    del rows[target, "forward"]["accesses"]["store 8 bytes"]
    assert rows[target, "inference"]["accesses"] == rows[target, "forward"]["accesses"], "no offsets"
    # Four windows' gradients and four pixels before the loop and in it, the bias for each pixel; offsets; sums.
    assert rows[target, "backward"]["accesses"] == {
        "load 16 bytes": 2 * (4 + 4) + 4 * 2,
        "load 8 bytes": 2 * 4,
        "store 16 bytes": 4,
        "store 4 bytes": 8,
    }
    # Instructions for each element: not many more than today.
    assert 0 < rows[target, "forward"]["loop_instructions"] / 8 < 106
    assert 0 < rows[target, "backward"]["loop_instructions"] / 32 < 41
    forward = rows[target, "forward"]
    assert forward["shape"] == [128, 128, 27, 27]
    # Input, output and a byte for each window, once.
    assert forward["least_bytes"] == 128 * 128 * (27 * 27 * 2 + 13 * 13 * 3)
    assert rows[target, "backward"]["least_bytes"] == 128 * 128 * (2 * 27 * 27 * 2 + 13 * 13 * 3)


#: By kernel that is no stage: most registers on NVIDIA's GPUs, a thread's accesses to global memory, and the minimum of
#: bytes moved, in bfloat16 with 128 images. A thread computes eight elements, or sixteen with bias and ReLU.
OTHERS: dict[str, tuple[int, dict[str, int], int]] = {
    # For each element a byte of the image and four bytes of the mean and of the colour noise; the crop's place.
    "input, pixels": (42, {"load 1 bytes": 8, "load 4 bytes": 19, "store 16 bytes": 1}, 128 * 3 * 224**2 * 3),
    "input, blocks": (
        42,
        {"load 1 bytes": 8, "load 4 bytes": 19, "store 16 bytes": 1},
        128 * 3 * (224**2 + 228**2 * 2),
    ),
    # Weight and velocity are read and written, the gradient read, the copy written; the rate.
    "update": (40, {"load 16 bytes": 5, "load 4 bytes": 1, "store 16 bytes": 5}, 20 * 60_954_656),
    # A row of 1000 logits need not begin at a multiple of 16 bytes; the label, and two results.
    "loss": (
        56,
        {"load 2 bytes": 8, "load 8 bytes": 1, "store 2 bytes": 8, "store 4 bytes": 2},
        2 * 128 * 1000 * 2,
    ),
    # The bias of eight channels is 32 bytes.
    "bias and ReLU": (32, {"load 16 bytes": 2 + 2, "store 16 bytes": 2}, 2 * 128 * 384 * 13**2 * 2),
    "bias and ReLU, backward": (
        56,
        {"load 16 bytes": 2 + 2, "store 16 bytes": 2, "store 4 bytes": 1},
        3 * 128 * 384 * 13**2 * 2,
    ),
}


def check_others(target: str, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """No spills; selecting among the pointers of eleven weights keeps accesses 16 bytes wide."""
    assert [name for _, name in rows] == list(aot.OTHERS) == list(OTHERS)
    for (_, name), row in rows.items():
        registers, accesses, moved = OTHERS[name]
        assert row["local_bytes"] == row["local_accesses"] == 0, row
        assert row["least_bytes"] == moved
        if target.startswith("sm_"):
            assert row["registers"] <= registers, row
            assert row["accesses"] == accesses, row
        else:
            assert 0 < row["registers"] <= 128, row


#: What is asserted of the stage's machine code is NVIDIA's; other tests build it for AMD.
STAGE_TARGETS = ("sm_80", "sm_90", "sm_100")


@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(each, marks=pytest.mark.slow) for each in aot.TARGETS if each != "sm_90")]
)
def test_machine_code_of_the_paper_s_stage_and_update(target: str, tmp_path: Path) -> None:
    cases = (*(PAPER[1:2] if target in STAGE_TARGETS else ()), *aot.OTHERS)
    rows = built(tmp_path, "--target", target, "--case", *cases, *PAPER[2:])
    stage = {key: row for key, row in rows.items() if key[1] in ("forward", "inference", "backward")}
    if target in STAGE_TARGETS:
        check_stage(target, stage)
    check_others(target, {key: row for key, row in rows.items() if key not in stage})


def test_warps_of_a_scheduler() -> None:
    """16384 registers a scheduler, in steps of eight a thread: 96 leave room for five warps."""
    assert [warps(registers) for registers in (32, 64, 65, 72, 80, 96, 97, 128, 168, 255)] == [
        8, 8, 7, 7, 6, 5, 4, 4, 3, 2,
    ]  # fmt: skip


@pytest.mark.slow
def test_tensors_that_are_not_aligned_take_narrow_accesses(tmp_path: Path) -> None:
    rows = built(tmp_path, "--target", "sm_90", "--misaligned", *PAPER)
    for row in rows.values():
        assert not row["aligned"]
        assert row["local_bytes"] == row["local_accesses"] == 0
        assert "load 16 bytes" not in row["accesses"]


@pytest.mark.slow
def test_a_launch_compiles_the_same(tmp_path: Path) -> None:
    """Triton's own way from a call's arguments to machine code, on a stand-in for a GPU, ends at the same code; so does
    compiling several kernels at once."""
    code = """
import os
import torch
from triton.runtime import driver
from kernels import aot
from kernels.gpu import runtime

class Device:
    get_current_target = staticmethod(lambda: aot._target("sm_90"))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Device())
made = list(aot.launches(aot.CASES[1], torch.bfloat16, torch.channels_last))
with runtime.compile_only():
    for _, launch, _ in made:
        arguments = {**launch.arguments, "C": launch.config, **launch.options(9)}
        runtime.launch(launch.kernel, launch.grid, torch.device("cpu"), **arguments)
at_once = len(os.listdir(os.environ["TRITON_CACHE_DIR"]))
launched = []
for mode, launch, _ in made:
    arguments = {**launch.arguments, "C": launch.config, **launch.options(9)}
    launched.append(launch.kernel.run(grid=launch.grid, warmup=True, **arguments))
print(at_once, "compiled at once, and", len(os.listdir(os.environ["TRITON_CACHE_DIR"])) - at_once, "later")
for (mode, launch, _), called in zip(made, launched):
    # Whole files may differ in the folders that their sources were compiled from.
    built, called = (aot._cuobjdump(one, "-sass") for one in (aot._compile(launch, "sm_90", True), called))
    print(mode, "EXIT" in built and built == called)
call = aot.others(torch.bfloat16)["update"]
unbuilt = aot.specialized(call.kernel, call.arguments)
built = aot.triton.compile(unbuilt, target=aot._target("sm_90"), options=call.options)
called = call.kernel.run(grid=(1,), warmup=True, **call.arguments, **call.options)
built, called = (aot._cuobjdump(one, "-sass") for one in (built, called))
print("update", "EXIT" in built and built == called)
"""
    clean = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    clean["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "3 compiled at once, and 0 later", "forward True", "inference True", "backward True", "update True"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_that_is_launched_can_be_built(tmp_path: Path) -> None:
    rows = built(tmp_path, "--target", "sm_80", "sm_90", "sm_100", "sm_120")
    assert {row["local_bytes"] + row["local_accesses"] for row in rows.values()} == {0}


@pytest.mark.slow
def test_what_is_launched_on_amd_s_gpus_can_be_built(tmp_path: Path) -> None:
    """For MI300 and MI350: 64 lanes, NaN of either sign, no spills. Nobody has run it there."""
    rows = built(tmp_path, "--target", "gfx942", "gfx950", *PAPER)
    assert len(rows) == 6
    for (target, mode), row in rows.items():
        assert row["local_bytes"] == row["local_accesses"] == 0, (target, mode)
        assert 0 < row["registers"] <= 256
        assert any(width.endswith("16 bytes") for width in row["accesses"]), row["accesses"]


def test_launches_are_those_of_the_target() -> None:
    made = {}
    for target in ("sm_90", "gfx950"):
        with aot.launched_for(target):
            ((_, launch, _), *_) = aot.launches(aot.CASES[1], torch.bfloat16, torch.channels_last)
        made[target] = launch.config.lanes
    assert made == {"sm_90": 32, "gfx950": 64}
    assert config.LANES == 32


@pytest.mark.slow
def test_more_columns_than_32_bits_count_can_be_built() -> None:
    """Of all images together: numbers of columns are divided in 64 bits then."""
    code = """
import torch
from kernels import aot
from kernels.arguments import Normalization
case = aot.Case("wide", (2**31, 8, 1, 1), Normalization(5, 1e-4, 0.75, 2.0, 1), None, True)
for mode, launch, _ in aot.launches(case, torch.bfloat16, torch.channels_last):
    print(mode, launch.arguments["strips"], aot.build(launch, "sm_90")["local_bytes"])
"""
    clean = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{mode} {2**31} 0" for mode in ("forward", "inference", "backward")]


@pytest.mark.skipif(not config.INTERPRETED, reason="needs Triton's interpreter")
def test_the_interpreter_has_nothing_to_compile(capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main(["--target", "sm_90"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "error: TRITON_INTERPRET=1 leaves nothing to compile; unset it\n"


def test_commands_of_the_readme() -> None:
    """Flags of ``kernels.aot`` are parsed, and the tests that are named exist."""
    found = set()
    for command in commands(ROOT / "kernels" / "README.md"):
        at = command.index("-m") + 1
        module, arguments = command[at], command[at + 1 :]
        found.add(module)
        if module == "kernels.aot":
            assert set(aot.parser().parse_args(arguments).target) <= set(aot.TARGETS)
        elif module == "pytest":
            assert [path for path in arguments if not (ROOT / path).exists()] == []
    assert found == {"kernels.aot", "pytest"}


ONE = """
import torch
from kernels import aot
from kernels.arguments import Pooling
for rows, columns in ((1, 9), (9, 1)):
    window = (min(rows, 3), min(columns, 3))
    pooling = Pooling(window, (1, 1), (0, 0), (1, 1), False)
    case = aot.Case("thin", (2, 8, rows, columns), aot.PAPER_NORMALIZATION, pooling)
    with aot.launched_for("sm_90"):
        for _, launch, _ in aot.launches(case, torch.float32, torch.channels_last):
            assert aot.build(launch, "sm_90")
"""


def test_images_of_one_row_or_column_can_be_built() -> None:
    """Triton makes a size of 1 a constant, which is no tensor."""
    done = subprocess.run(
        [sys.executable, "-c", ONE], cwd=ROOT, env=environment(TRITON_INTERPRET="0"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
