"""Checks, for 130 s at most, that the kernels are correct on this device.

A failure stops nothing: rows that time this project's operators are marked ``unverified``; other rows are unaffected.
"""

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..measure.environment import ROOT
from ..measure.records import Row
from ..subjects.cases import CASES, Case, check, failure, inputs, prepare
from .processes import Command
from .run import CHECKER, FIRST, Rows, Run, cores

#: Repetitions that must be bitwise identical.
REPEATS = 20
#: The kernels' tests, and the core of them: every dtype, memory format and special value, and that an image's
#: result does not depend on its batch.
TESTS = ("tests/kernels/test_triton_stage.py", "tests/kernels/test_one_pass.py", "tests/kernels/test_fuse.py")
CORE = "half_types or every_dtype or special_values or nan_reaches or its_batch or layout or one_pass"
#: Two quick tests, in the interpreter, to see that tests are run.
TOY = "count_offsets_alike or flops_are_counted"
#: Processes that share the tests, which mostly compile, on one core each.
PROCESSES = 14
#: Seconds left for the verdict when the tests are stopped.
MARGIN = 3.0


def rows(run: Run) -> Rows:
    """Two stages, forward and backward, repeated and compared with float64; meanwhile the core of the tests."""
    with_tests = Tests(run, TESTS[:1] if run.scale.toy else TESTS[:2], TOY if run.scale.toy else CORE)
    try:
        yield repeated(run, CASES[:2], 3 if run.scale.toy else REPEATS)
        run.say(f"waiting for the tests in {len(with_tests.commands)} processes")
        yield with_tests.row(run.left - MARGIN)
    finally:
        with_tests.stop()


def repeated(run: Run, cases: Sequence[Case], repeats: int) -> Row:
    """Whether cases are correct and bitwise repeatable."""
    begin = time.perf_counter()
    status = "passed"
    for case in cases:
        try:
            prepared = prepare(case, run.scale.ours)
            check(prepared, 2, torch.bfloat16, run.device)
            input, bias = inputs(case, 2, torch.bfloat16, "channels_last", run.device)
            first: list[torch.Tensor] = []
            for _ in range(repeats):
                output = prepared(input, bias)
                result = [output, *prepared.gradients(output, input, bias, torch.ones_like(output))]
                first = first or result
                if not all(map(torch.equal, result, first)):
                    status = f"failed: {case.name} gives other bits when it is repeated"
        except Exception as error:  # Any error becomes the verdict.
            status = f"{failure(error)} ({case.name})"
    elapsed = round((time.perf_counter() - begin) * 1e6)
    return {"suite": "gate", "case": FIRST, "repeats": repeats, "status": status, "median_us": elapsed}


class Tests:
    """Tests of the kernels, in several processes that each run some of them.

    Args:
        run: its folder receives their output.
        files: test files.
        chosen: pytest's ``-k``.
        checker: a command that runs another one, such as a memory checker.
    """

    def __init__(self, run: Run, files: Sequence[str], chosen: str = "", checker: Sequence[str] = ()) -> None:
        self.begin = time.perf_counter()
        self.missing = importlib.util.find_spec("pytest") is None
        count = 1 if checker or run.scale.toy else min(PROCESSES, cores())
        self.outputs: list[Path] = []
        self.commands: list[Command] = []
        # Without this project's pytest options, whose plugins may not be installed.
        command = [*checker, sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", "-m", "not slow"]
        command += ["-p", "no:cacheprovider", "-p", "bench.suite.shard", *files, *(["-k", chosen] if chosen else [])]
        for number in range(0 if self.missing else count):
            environment = {**os.environ, "SHARD": f"{number}/{count}", "KERNELS_TEST": "gpu" if run.cuda else ""}
            environment["OMP_NUM_THREADS"] = "1"
            self.outputs.append(run.folder / f"tests-{len(list(run.folder.glob('tests-*')))}.txt")
            with open(self.outputs[-1], "wb") as output:
                self.commands.append(Command(command, environment, ROOT, output, part=True))

    def row(self, limit: float, case: str = "kernel tests") -> Row:
        """The verdict, after ``limit`` seconds at most."""
        limit += time.perf_counter() - self.begin
        statuses = [command.wait(limit) for command in self.commands]
        for status, output in zip(statuses, self.outputs, strict=True):
            if status not in (0, 5, None):
                print(output.read_text(errors="replace")[-3000:], flush=True)
        # 5: this process got no test. Below 0: ended by a signal, such as an invalid memory access.
        bad = [status for status in statuses if status is not None and (status in (1, 9) or status < 0)]
        odd = [status for status in statuses if status not in (0, 5, None)]
        if self.missing:
            said = "no verdict: pytest is not installed"
        elif bad:
            said = f"failed: exit status {bad[0]}{self._failed()}, see what the tests printed"
        elif None in statuses:
            said = f"stopped after {time.perf_counter() - self.begin:.0f} s"
        elif odd or 0 not in statuses:
            said = f"no verdict: pytest ended with {(odd or statuses)[0]}"
        else:
            said = "passed"
        return {
            "suite": "gate",
            "case": case,
            "status": said,
            "median_us": round((time.perf_counter() - self.begin) * 1e6),
        }

    def _failed(self) -> str:
        """The first failed test, as pytest names it."""
        for output in self.outputs:
            for line in output.read_text(errors="replace").splitlines():
                if line.startswith(("FAILED ", "ERROR ")):
                    return f" in {line.split(' - ')[0].split(' ', 1)[1]}"
        return ""

    def stop(self) -> None:
        """Stop the processes that still run."""
        for command in self.commands:
            command.stop()


def full(run: Run) -> Rows:
    """Every operator repeated 250 times, all of :data:`TESTS`, and a memory checker if there is one."""
    yield repeated(run, CASES[1:2] if run.scale.toy else CASES, 3 if run.scale.toy else 250)
    tests = Tests(run, TESTS[:1] if run.scale.toy else TESTS, TOY if run.scale.toy else "")
    try:
        yield tests.row(run.left - MARGIN)
    finally:
        tests.stop()
    if (checker := shutil.which(CHECKER)) and run.cuda:
        # Querying the driver for a function that it lacks is not an error.
        options = ["--error-exitcode", "9", "--report-api-errors", "no"]
        checked = Tests(run, TESTS[:1], "half_types or every_dtype", [checker, *options])
        try:
            yield checked.row(run.left - MARGIN, CHECKER)
        finally:
            checked.stop()
