"""The suite for GPUs, at toy sizes on a CPU."""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cells, device_suite
from bench.cells import Scale
from bench.measure import records
from bench.subjects import cases
from bench.subjects import steps as subjects
from bench.subjects.network import layer_modes
from bench.suite import ahead, choices, gate, inference, layers, loading, operators, ranks, steps, train
from bench.suite import run as running
from bench.suite.processes import Command
from bench.suite.rows import add_row, read_rows
from bench.suite.run import Run, record
from bench.suite.summary import summary
from kernels import aot
from kernels.gpu import config
from tests.commands import ROOT, Done, environment, one_line, run_here

Row = dict[str, Any]
#: In no order that the suite would choose itself.
ORDER = ("gate", "train", "profile")


@pytest.fixture
def toy(tmp_path: Path) -> Run:
    """A part's view of a run."""
    folder = tmp_path / "run"
    folder.mkdir()
    return Run(torch.device("cpu"), Scale("cpu", 2, "digits", toy=True), folder, tmp_path / "record", limit=300.0)


def run_parts(output: Path) -> Done:
    """Several parts as a user runs them."""
    # A minute is enough for the gate unless the machine has other things to do.
    code = "import sys; from bench import device_suite as suite; suite.PARTS['gate'] = suite.Part('gate', 60, timed=0);"
    code += "sys.exit(suite.main(sys.argv[1:]))"
    arguments = ["--parts", *ORDER, "--output", str(output), "--budget-s", "6000"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(OMP_NUM_THREADS="2"),
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_parts_run_in_their_order_and_find_what_there_is(tmp_path: Path) -> None:
    output = tmp_path / "record"
    done = run_parts(output)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = records.read(output)
    suites = [suite for suite, _ in itertools.groupby(row["suite"] for row in rows)]
    # What is compared with limits has them measured first.
    assert suites == ["gate", "ceilings", "train", "profile"]
    begun = [line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("--- ")]
    assert begun == ["compiling", "gate", "ceilings", "train", "profile"]
    assert all(row["machine"].startswith("CPU: ") and row["commit"] for row in rows)
    assert [row for row in rows if "unverified" in row] == []
    assert f"{len(rows)} rows in {output}" in done.stdout
    assert [row["status"] for row in rows if row["suite"] == "gate"] == ["passed", "passed"]
    assert {row["case"] for row in rows if row["suite"] == "ceilings"} == {"copy", "matrix product"}
    (trained,) = (row for row in rows if row["suite"] == "train")
    assert trained["images_per_s"] > 0
    assert trained["lost_us"] == pytest.approx(trained["median_us"] - trained["step_us"], abs=0.02)
    assert list(output.glob("trace-*.json.gz"))
    # Operators of an update are found in their layers.
    profile = [row for row in rows if row["suite"] == "profile"]
    assert profile[-1]["kernel"] == "sum"
    total = profile[-1]["us_per_step"]
    assert sum(row["us_per_step"] for row in profile[:-1]) == pytest.approx(total, rel=0.01)
    found = {(row["kernel"], row["layer"]) for row in profile[:-1]}
    assert {("aten::convolution_backward", f"conv{number}") for number in range(1, 6)} <= found
    assert {(f"aten::{kernel}", layer) for kernel in ("addmm", "mm") for layer in ("fc6", "fc7", "fc8")} <= found
    assert {("aten::_fused_sgd_", "optimizer"), ("aten::_log_softmax", "loss")} <= found
    assert sum(row["us_per_step"] for row in profile[:-1] if row["layer"] == "-") < 0.2 * total
    end = done.stdout[done.stdout.rindex("most expensive in the update of digits") :]
    assert end.index("ms in kernels of") < end.index("of the step alone") < end.index("rows in")


def test_a_training_that_fails_gives_the_reason(toy: Run, capfd: pytest.CaptureFixture[str]) -> None:
    packed = train.store(toy)
    row = train.trained(toy, packed, "--data-path", "/no/such/images")
    says = "error: --data-path images does not exist"
    assert row["status"] == f"failed: net.train ended with 1 after 0 updates; its last line: {says}"
    assert "/no/such/images does not exist" in capfd.readouterr().out
    toy.limit = 0.0
    assert train.trained(toy, packed)["status"] == "failed: net.train was stopped after 0 updates"


def test_a_summary_names_what_counts() -> None:
    described = {"case": "update of paper", "implementation": "triton, reduce-overhead", "dtype": "bfloat16"}
    step = {"suite": "steps", **described, "mode": "train_step", "shape": "128x3x224x224"}
    kernel = {"suite": "profile", **described, "layer": "conv1", "percent_of_step": 2.0}
    rows: list[Row] = [
        {**step, "median_us": 5000.0, "images_per_s": 25600.0, "percent_of_limit": 23.0, "unverified": "gate failed"},
        *({**kernel, "kernel": f"kernel {number}", "us_per_step": 100.0 * number} for number in range(1, 8)),
        {**kernel, "kernel": "sum", "us_per_step": 2800.0, "wall_us": 5000.0, "gaps_us": 2200.0},
        {"suite": "train", "case": "net.train of paper", "dtype": "float32", "images_per_s": 12800.0,
         "median_us": 10000.0, "step_us": 8000.0, "percent_of_step": 80.0},
        {"suite": "gate", "case": "kernel tests", "status": "failed: exit status 1"},
    ]  # fmt: skip
    text = summary(rows)
    assert "25,600      23  gate failed" in text
    assert [f"kernel {number}" in text for number in range(1, 8)] == [False, False] + [True] * 5
    assert text.index("kernel 7") < text.index("kernel 3")
    assert "2.800 ms in kernels of 5.000 ms; 2,200 us between them" in text
    assert "80 % of the step alone, which takes 8.000 ms" in text
    assert "kernel tests: failed: exit status 1" in text
    assert summary([]) == "nothing was measured"


def ended(process: str) -> bool:
    """Whether a process that was killed is gone, or will be within half a minute."""
    state = Path("/proc") / process / "stat"
    for _ in range(300):
        try:
            if state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def _script(folder: Path, case: str, then: str) -> str:
    return (
        "import sys, time; from pathlib import Path; from bench.suite.rows import add_row;"
        f"add_row(Path({str(folder)!r}), {{'suite': 'input', 'case': {case!r}, 'median_us': 1.0}}); {then}"
    )


def test_a_part_that_is_stopped_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One hangs after its first row, with a process of its own; the next one fails; the last one is as ever."""
    then = {
        "input": f"import subprocess; p = subprocess.Popen(['sleep', '600'], process_group=0);"
        f"Path({str(tmp_path / 'process')!r}).write_text(str(p.pid)); time.sleep(600)",
        "ceilings": "sys.exit(3)",
        "parallel": "",
    }
    limits: list[float] = []

    def start(suite: device_suite.Suite, child: str, limit: float, **variables: str) -> Command:
        limits.append(limit)
        command = Command([sys.executable, "-c", _script(suite.folder, child, then[child])], suite.environment, ROOT)
        suite.running.append(command)
        return command

    monkeypatch.setattr(device_suite.Suite, "start", start)
    monkeypatch.setitem(device_suite.PARTS, "input", device_suite.Part("loading", 1, most=5.0))
    begin = time.monotonic()
    arguments = ["--parts", "input", "ceilings", "parallel", "--output", str(tmp_path), "--budget-s", "600"]
    assert device_suite.main(arguments) == 1
    assert time.monotonic() - begin < 300
    said = capsys.readouterr()
    for case in ("input", "ceilings", "parallel"):
        assert f"  {case} " in said.out
    assert "note: input was stopped after 5 s" in said.out
    assert said.err == "error: ceilings failed, see above\n"
    # The one share of 31 comes to more than the part may take; what it leaves over goes to the others.
    assert limits[0] == 5.0
    assert limits[1] == pytest.approx(0.5 * 595, rel=0.1)
    assert limits[2] > limits[1]
    assert ended((tmp_path / "process").read_text())


def test_nothing_begins_without_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert device_suite.main(["--output", str(tmp_path), "--budget-s", "0"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert "steps is not begun" in capsys.readouterr().out


def test_shares_add_up_to_the_budget() -> None:
    shares = [device_suite.PARTS[name].share for name in device_suite.DEFAULT if name != "gate"]
    assert sum(shares) + device_suite.AHEAD.share == device_suite.BUDGET


def test_the_time_is_looked_at_between_rows(toy: Run) -> None:
    def part() -> Iterator[Row]:
        for number in range(3):
            toy.limit = 300.0 if number == 0 else -1.0
            yield {"suite": "input", "case": f"loader, {number}", "median_us": 1.0}

    record(toy, part())  # type: ignore[arg-type]
    assert [row["case"] for row in records.read(toy.output)] == ["loader, 0", "loader, 1"]
    assert read_rows(toy.folder)[0]["machine"].startswith("CPU: ")


@pytest.mark.parametrize(
    ("statuses", "mark"),
    [
        (["passed", "failed: exit status 1"], "gate failed"),
        (["passed", "stopped after 60 s"], "gate not finished"),
        (["passed"], "gate not finished"),
        (["passed", "passed"], None),
        ([], "gate not run"),
    ],
)
def test_a_gate_marks_what_depends_on_it(toy: Run, statuses: list[str], mark: str | None) -> None:
    for case, status in zip((running.FIRST, "kernel tests"), statuses, strict=False):
        add_row(toy.folder, {"suite": "gate", "case": case, "status": status})
    rows: list[Row] = [
        {"suite": "kernels", "case": "stage1", "implementation": "triton"},
        {"suite": "layers", "case": "stage2", "implementation": "auto, graph"},
        {"suite": "steps", "case": "update of paper", "implementation": "triton, reduce-overhead"},
        {"suite": "kernels", "case": "stage1", "implementation": "compiled"},
        {"suite": "layers", "case": "conv1", "implementation": "auto, graph"},
        {"suite": "steps", "case": "update of paper", "implementation": "aten, eager"},
        {"suite": "steps", "case": "inference of paper", "implementation": "openvino"},
        {"suite": "input", "case": "loader, 2 reading"},
    ]
    record(toy, ({**row, "median_us": 1.0} for row in rows))  # type: ignore[arg-type]
    assert [row.get("unverified") for row in read_rows(toy.folder) if row["suite"] != "gate"] == [mark] * 3 + [None] * 5


def test_an_earlier_gate_of_the_same_kernels_counts(toy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.output.mkdir()
    machine = {key: running.describe()[key] for key in ("machine", "torch", "triton", "kernels_code")}
    rows = [
        {"suite": "gate", "case": running.FIRST, "status": "failed: other bits", **machine},
        {"suite": "gate", "case": running.FIRST, "status": "passed", **machine},
        {"suite": "gate", "case": "kernel tests", "status": "passed", **machine},
        {"suite": "gate", "case": running.CHECKER, "status": "stopped after 90 s", **machine},
    ]
    (toy.output / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert running.unverified(toy) == ""
    monkeypatch.setattr(running, "describe", lambda: {**machine, "kernels_code": "other"})
    assert running.unverified(toy) == "gate not run"


def test_a_gate_finds_other_bits(toy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count(1)

    def operator(case: cases.Case) -> Any:
        return lambda input, bias: torch.nn.functional.max_pool2d(input + next(count) * 1e-3, 3, 2)

    monkeypatch.setattr(cases.Case, "operator", operator)
    monkeypatch.setattr(gate, "check", lambda *arguments: None)
    row = gate.repeated(toy, [cases.CASES[4]], 3)
    assert row["status"] == "failed: max_pool1 gives other bits when it is repeated"
    monkeypatch.undo()
    assert gate.repeated(toy, [cases.CASES[4]], 3)["status"] == "passed"


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (0, "passed"),
        (5, "no verdict: pytest ended with 5"),
        (1, "failed: exit status 1 in tests/a.py::test_b[0-1.5], see what the tests printed"),
        (-11, "failed: exit status -11"),
        (4, "no verdict: pytest ended with 4"),
        (None, "stopped after"),
    ],
)
def test_a_verdict_of_tests(toy: Run, monkeypatch: pytest.MonkeyPatch, status: int | None, verdict: str) -> None:
    class Ended:
        def __init__(self, *arguments: Any, **keywords: object) -> None:
            if status == 1:
                arguments[3].write(b"1 failed\nFAILED tests/a.py::test_b[0-1.5] - AssertionError: 0 - 1\n")

        def wait(self, limit: float) -> int | None:
            assert limit > 0
            return status

    monkeypatch.setattr(gate, "Command", Ended)
    assert gate.Tests(toy, ["tests/test_nothing.py"]).row(10.0)["status"].startswith(verdict)


def test_each_job_is_done_once(toy: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []

    def fail() -> None:
        raise RuntimeError("no compiler")

    jobs = {"inference": [("a", lambda: done.append("a")), ("b", fail)], "steps": [("a", fail), ("c", done.clear)]}
    for module, its in ((inference, jobs["inference"]), (steps, jobs["steps"])):
        monkeypatch.setattr(module, "ahead", lambda run, its=its: its)
    ahead.work(toy, ["inference", "steps", "layers"])
    assert done == []
    ahead.work(toy, ["inference", "steps", "layers"])
    said = capsys.readouterr().out
    assert "ahead, 2 of 3: b: failed: RuntimeError: no compiler" in said
    assert said.count("ahead, ") == 3


def test_a_rival_that_fails_costs_the_others_nothing(
    toy: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sampled(rivals: list[cases.Prepared], *arguments: object) -> list[list[float]]:
        if any(rival.implementation == "aten" for rival in rivals):
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            finally:
                raise ValueError("capture ended")
        return [[1.0, 2.0, 3.0] for _ in rivals]

    monkeypatch.setattr(cases, "_sampled", sampled)
    rows = [row for row in operators.rows(toy) if row["dtype"] == "float32"]
    assert [row["median_us"] for row in rows if row["implementation"] == "reference"] == [2e6] * 4
    status = (
        "failed: ValueError: capture ended; at first RuntimeError: operation not permitted when stream is capturing"
    )
    assert [row.get("status") for row in rows if row["implementation"] == "aten"] == [status] * 4
    assert f"forward of stage2: sampled one by one, because together they {status}" in capsys.readouterr().out


def test_a_layer_that_fails_costs_the_others_nothing(toy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wall_seconds(call: object, samples: int) -> list[float]:
        begun.append(call)
        if len(begun) == 3:
            raise RuntimeError("capture failed")
        return [1.0] * samples

    begun: list[object] = []
    monkeypatch.setattr(layers, "wall_seconds", wall_seconds)
    rows = list(layers.rows(toy))
    assert [(row["case"], row["mode"]) for row in rows] == list(layer_modes("digits"))
    assert [(row["case"], row["mode"]) for row in rows[3:7]] == [
        ("stage1", "backward"), ("conv2", "forward"), ("conv2", "input_gradient"), ("conv2", "weight_gradient"),
    ]  # fmt: skip
    assert all("gflop_per_s" in row for row in rows if "status" not in row)
    assert [number for number, row in enumerate(rows) if "status" in row] == [2]
    assert (rows[2]["case"], rows[2]["mode"], rows[2]["status"]) == (
        "stage1", "forward", "failed: RuntimeError: capture failed",
    )  # fmt: skip
    assert rows[-1]["case"] == "input preparation"


def test_a_strategy_and_a_choice_that_fail_cost_the_others_nothing(toy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(strategy: str, *arguments: object) -> Row:
        if strategy == "tower":
            raise RuntimeError("no second device")
        return {"suite": "parallel", "case": "update of one rank", "implementation": strategy, "median_us": 1.0}

    def check(prepared: cases.Prepared, *arguments: object) -> None:
        if config.SEGMENT_ROWS == 5:
            raise cases.WrongResultError("output differs")

    monkeypatch.setattr(ranks, "alone", alone)
    monkeypatch.setattr(choices, "check", check)
    monkeypatch.setattr(choices, "CAPS", (None,))
    monkeypatch.setattr(choices, "SEGMENTS", (4, 5))
    statuses = {row["implementation"]: row.get("status") for row in ranks.rows(toy)}
    assert statuses.pop("tower") == "failed: RuntimeError: no second device"
    assert statuses == {"none": None, "data": None, "hybrid": None}
    rows = list(choices.rows(toy))
    assert [row["implementation"] for row in rows if "status" in row] == ["5 rows"]
    assert sum(row["implementation"] == "4 rows" for row in rows) == 3


def test_steps_and_inference(toy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails costs the others nothing; what is compared with limits has them."""
    for case, dtype, rate in (("copy", "float32", 1.0), ("matrix product", "float32", 10.0)):
        add_row(
            toy.folder,
            {"suite": "ceilings", "case": case, "dtype": dtype, "median_us": 1, "gb_per_s": rate, "gflop_per_s": rate},
        )

    def broken(*arguments: Any) -> object:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(subjects, "update_step", broken)
    rows = [*steps.rows(toy), *inference.rows(toy)]
    assert [row.get("status") for row in rows] == [None, "failed: RuntimeError: out of memory", None, None]
    assert [row["mode"] for row in rows] == ["train_step"] * 2 + ["inference"] * 2
    for row in (rows[0], rows[2], rows[3]):
        assert row["limit_us"] > 0
        assert row["images_per_s"] == pytest.approx(2e6 / row["median_us"], abs=0.06)


def test_batches_are_timed(toy: Run) -> None:
    (row,) = loading.rows(toy)
    assert row["images_per_s"] > 0


def test_choices_are_what_is_launched() -> None:
    def launched() -> tuple[object, int]:
        _, launch, _ = next(aot.launches(aot.CASES[0], torch.bfloat16, torch.channels_last))
        return launch.options(9)["maxnreg"], launch.arguments["segment_rows"]

    before = launched()
    with choices.chosen(dict.fromkeys(config.REGISTERS, 80), 3):
        assert launched() == (80, 3)
    assert launched() == before != (80, 3)


def test_refusals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        device_suite.main(["--parts", "everything"])
    said = capsys.readouterr().err
    assert "invalid choice: 'everything'" in said
    assert said.count("\n") == 1
    for flag, value, least in (("--batch-size", "0", 1), ("--budget-s", "-1", 0), ("--budget-s", "nan", 0)):
        one_line(run_here("bench.device_suite", flag, value), 2, f"{flag} must be at least {least}; got {value}")

    def start(*arguments: object, **keywords: object) -> None:
        raise AssertionError("nothing begins without a commit")

    monkeypatch.setattr(device_suite, "commit", lambda: "")
    monkeypatch.setattr(device_suite.Suite, "start", start)
    with pytest.raises(SystemExit):
        device_suite.main([])
    assert "or set SOURCE_COMMIT" in capsys.readouterr().err


def test_the_command_starts_without_torch() -> None:
    code = "import sys, bench.device_suite; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr


def test_a_step_with_all_of_cudnn_s_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one after it has deterministic ones again."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    for how, deterministic in (("recorded", True), ("nondeterministic, recorded", False), ("unrecorded", True)):
        step = subjects.Step("update", "digits", "reference", how, "float32", 2)
        assert step.mode == ""
        subjects.prepared(step, torch.device("cpu"))
        assert torch.backends.cudnn.deterministic is deterministic
    gpu = cells.Scale("cuda", 128, "paper")
    assert "nondeterministic, recorded" in {step.how for step in cells.updates(gpu)}
