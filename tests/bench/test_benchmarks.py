"""The benchmarks as pytest runs them: what is timed, in which order, and what becomes of what is not."""

import inspect
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import bench_contention, bench_kernels, bench_rivals, bench_steps, cells
from bench.cells import RUNTIME_BATCHES, Scale
from bench.compile_ahead import KINDS, compile_ahead
from bench.measure import timing
from bench.measure.timing import Clock
from bench.subjects.cases import NEEDS_GPU, may_refuse
from bench.subjects.steps import Step
from tests.commands import ROOT, environment


def test_a_replay_takes_the_times_it_was_given() -> None:
    clock = Clock()
    pass_time = clock.replay([0.5, 0.25])
    assert clock() == clock()
    ticks = [clock()]
    for _ in range(2):
        pass_time()
        ticks.append(clock())
    assert [after - before for before, after in itertools.pairwise(ticks)] == [0.5, 0.25]
    with pytest.raises(StopIteration):
        pass_time()
    clock.stop()
    assert clock() != clock()


def test_only_others_may_refuse() -> None:
    assert may_refuse("triton", NEEDS_GPU)
    assert may_refuse("aten", "failed: NotImplementedError: no such dtype")
    assert may_refuse("cudnn", "failed: CudnnError: status 3000")
    assert not may_refuse("aten", "failed: WrongResultError: output differs")
    for ours in ("triton", "reference", "inductor", "traced"):
        assert not may_refuse(ours, "failed: RuntimeError: out of registers")


@pytest.mark.parametrize(("each", "samples"), [(0.01, 10), (0.5, 5)])
def test_slow_calls_are_sampled_fewer_times(monkeypatch: pytest.MonkeyPatch, each: float, samples: int) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def call() -> None:
        clock[0] += each

    found = timing.seconds([[call], [call, call]], torch.device("cpu"), 10)
    assert found == [pytest.approx([each] * samples)] * 2


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 10), (1.0, 4), (9.0, 3)])
def test_steps_take_turns(monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int) -> None:
    """Networks that can be called share their time, and one that cannot fails alone."""
    called: list[str] = []
    clock = [0.0]

    def ready(step: Step, device: object) -> bench_steps.Rival:
        if step.network == "broken":
            raise RuntimeError("no such thing")

        def call() -> None:
            called.append(step.network)
            clock[0] += seconds * len(step.network)

        return bench_steps.Rival(call, "auto", {"first_call_s": 2.0})

    monkeypatch.setattr(bench_steps, "ready", ready)
    monkeypatch.setattr(bench_steps, "synchronized", lambda: clock[0])
    hows = {"a": "eager", "broken": "eager", "b": "compiled"}
    a, broken, b = (Step("update", name, "auto", how, "float32", 16) for name, how in hows.items())
    found = bench_steps.in_turns.__wrapped__((a, broken, b), torch.device("cpu"), print)
    # What was compiled may have to be found again.
    assert called == ["b"] + ["a", "b"] * rounds
    for step in (a, b):
        assert found[step] == (pytest.approx([seconds] * rounds), {"first_call_s": 2.0})
    assert str(found[broken]) == "no such thing"


def test_one_list_says_what_is_measured() -> None:
    """A GPU's update is as net.train runs it, first of all; no cell is there twice; every mode is one of PyTorch's."""
    gpu, cpu, toy = Scale("cuda", 128, "paper"), Scale("cpu", 16, "paper"), Scale("cpu", 2, "digits", toy=True)
    assert (
        cells.updates(gpu)[0]
        == cells.profiled(gpu)[0]
        == Step("update", "paper", "triton", "recorded", "bfloat16", 128)
    )
    modes = {"", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"}
    for scale in (gpu, cpu, toy):
        steps = [*cells.updates(scale), *cells.inference(scale)]
        assert len(set(steps)) == len(steps) > 3
        assert {step.mode for step in [*steps, *cells.profiled(scale), *cells.autotuned(scale)]} <= modes
        operators = cells.operators(scale)
        assert len(set(operators)) == len(operators) > 10
    assert not any(step.mode for step in cells.updates(toy))
    assert "recorded" not in {step.how for step in cells.updates(cpu)}
    assert [parameters.values for parameters in bench_steps.marked()] == [
        tuple(step) for step in (*cells.updates(bench_steps.SCALE), *cells.inference(bench_steps.SCALE))
    ]


@pytest.mark.slow
def test_programs_are_compiled_ahead() -> None:
    """By processes whose failure nobody else would notice; one that fails keeps nobody waiting."""
    said: list[str] = []
    programs = [
        ("operator", "no such case", "aten", "float32"),
        ("operator", "relu_max_pool5", "reference", "float32"),
        ("step", "inference", "digits", "auto", "eager", "float32", 2),
    ]
    compile_ahead(programs, 1, said.append)
    assert said[0] == "compiling 3 programs in 1 processes"
    assert said[1].startswith("compiled 1 of 3: operator, no such case, aten, float32: failed: KeyError: ")
    assert said[2].startswith("compiled 2 of 3: operator, relu_max_pool5, reference, float32; about ")
    assert said[3] == "compiled 3 of 3: step, inference, digits, auto, eager, float32, 2"


def test_processes_that_end_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    said: list[str] = []
    compile_ahead([("stages", "inductor", 16)] * 3, 2, said.append)
    assert len(said) == 1


def test_keys_of_compiled_code_do_not_depend_on_who_imported_torch_first() -> None:
    """Beside a program that imports nothing before; pickle names the module where it finds ``torch``."""
    find = "print(pickle.whichmodule(torch.contiguous_format, str(torch.contiguous_format)))"
    first = "import pickle, sys, types; runner = sys.modules['runner'] = types.ModuleType('runner'); import torch"
    before, after = run_python(
        f"{first}; runner.torch = torch; import bench.compile_ahead as ahead; {find}; ahead.share_keys(); {find}"
    )
    assert before == "runner"
    assert [after] == run_python(f"import pickle, torch; {find}")


def run_python(code: str) -> list[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment()
    ).stdout.split()


def test_a_first_call_after_compiling_ahead_is_a_warm_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_steps, "prepared", lambda step, device: (lambda: None, torch.nn.Identity()))
    for how, column in (("eager", "first_call_s"), ("compiled", "first_call_warm_s")):
        step = Step("inference", "digits", "auto", how, "float32", 2)
        assert [name for name in bench_steps.ready(step, torch.device("cpu")).columns if "first" in name] == [column]


def test_all_that_compiles_is_marked_to_be_compiled_ahead() -> None:
    """With arguments that its function takes; and nothing that --quick measures is compiled."""
    modules = (bench_contention._cells, bench_kernels._marked, bench_rivals._cells, bench_steps.marked)
    found = set()
    for cell in itertools.chain.from_iterable(listed() for listed in modules):
        marks = {mark.name: mark for mark in cell.marks}
        compiled = [value for value in cell.values if str(value).endswith("compiled") or value == "inductor"]
        compiled += [
            value
            for value in cell.values
            if len(cell.values) == 2 and cell.values[0] in RUNTIME_BATCHES and value in ("auto", "aten")
        ]
        assert bool(compiled) == ("ahead" in marks), cell
        if "ahead" in marks:
            assert "long" in marks
            kind, *arguments = marks["ahead"].args
            inspect.signature(KINDS[kind]).bind(*arguments)
            found.add(marks["ahead"].args)
    assert {kind for kind, *_ in found} == set(KINDS)
    assert len(found) == 3 + 5 + 2 + 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_updates_need_instructions_for_their_dtype(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Where there are none the row says so, and nothing is built."""
    reason = "needs bf16 instructions: a product takes 106 x as long as in float32"
    monkeypatch.setattr(bench_steps, "lacking", lambda which, device: reason if which == torch.bfloat16 else "")
    for measure in ("in_turns", "on_a_gpu"):
        monkeypatch.setattr(bench_steps, measure, lambda *arguments: pytest.fail("measured"))
    columns: dict[str, object] = {}
    arguments = (columns.update, torch.device("cpu"), None, print, "update", "paper", "auto", "eager", dtype, 16)
    refused = pytest.skip.Exception if dtype == "bfloat16" else pytest.fail.Exception
    with pytest.raises(refused):
        bench_steps.test_step(lambda *_: [], print, *arguments)
    assert columns.get("status") == (reason if dtype == "bfloat16" else None)
    assert columns["case"] == "update of paper"


@pytest.mark.slow
def test_one_task_from_its_command(tmp_path: Path) -> None:
    """Two rivals are timed and recorded as they were sampled; the kernel that needs a GPU says so."""
    written = tmp_path / "benchmark.json"
    command = [
        *(sys.executable, "-m", "pytest", "bench/bench_kernels.py", "--benchmark-only", "-p", "no:cacheprovider"),
        *("-k", "relu_max_pool5 and float32 and inference", "-rs", "--quick", f"--benchmark-json={written}"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=280)
    assert done.returncode == 0, done.stdout
    # While it is measured, and not with the output of a test that has failed.
    assert "0:00:00  this machine's limits: copy of 16 MiB" in done.stdout.partition("- benchmark: ")[0]
    assert "inference of relu_max_pool5, float32: aten, reference" in done.stdout
    rows = [benchmark["extra_info"] for benchmark in json.loads(written.read_text())["benchmarks"]]
    assert {"aten", "reference"} <= {row["implementation"] for row in rows}
    for row, benchmark in zip(rows, json.loads(written.read_text())["benchmarks"], strict=True):
        assert row["median_us"] == pytest.approx(benchmark["stats"]["median"] * 1e6, rel=1e-3)
        assert row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["limit_us"] > 0
    if "triton" not in {row["implementation"] for row in rows}:
        assert NEEDS_GPU in done.stdout
