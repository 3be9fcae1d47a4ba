"""The suite for GPUs, at toy sizes on a CPU."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import cases, device_suite
from kernels import aot, triton_stage
from tests.commands import run


def test_every_part_runs(tmp_path: Path) -> None:
    done = run("bench.device_suite", "--output", str(tmp_path), OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for file in tmp_path.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert {row.get("suite") for row in rows} == {None, "ceilings", "kernels", "layers", "steps", "input"}
    layers = {row["case"]: row for row in rows if row.get("suite") == "layers" and row["mode"] == "training"}
    assert list(layers)[:3] == ["conv1", "stage1", "conv2"]
    assert layers["whole step"]["sum_of_layers_us"] > 0
    choices = {row["implementation"] for row in rows if row["case"] == "choice: stage2"}
    assert {"any registers", "72 registers", "3 rows", "6 rows"} < choices
    for row in rows:
        assert row["machine"].startswith("CPU: ")
        assert "status" in row or row["median_us"] > 0
    failed = {(row["implementation"], row["dtype"]) for row in rows if "status" in row}
    assert failed == {("aten", "bfloat16")}, "PyTorch's own normalization on a CPU"
    assert json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    assert f"recorded {len(rows)} rows" in done.stdout


def test_it_keeps_to_its_budget(tmp_path: Path) -> None:
    assert device_suite.main(["--output", str(tmp_path), "--budget-s", "0"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_fails_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(suite: device_suite.Suite) -> Iterator[dict[str, object]]:
        yield {"case": "copy", "shape": "1 MiB", "median_us": 1.0}
        raise RuntimeError("out of memory")

    monkeypatch.setattr(device_suite.Suite, "ceilings", broken)
    assert device_suite.main(["--output", str(tmp_path), "--parts", "ceilings", "gate"]) == 1
    (file,) = tmp_path.iterdir()
    assert [json.loads(line)["case"] for line in file.read_text().splitlines()] == ["the kernels' tests", "copy"]
    said = capsys.readouterr().err
    assert "RuntimeError: out of memory" in said
    assert said.splitlines()[-1] == "error: failed, see above: ceilings"


def test_a_rival_that_fails_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sampled(rivals: list[cases.Prepared], *arguments: object) -> list[list[float]]:
        if any(rival.implementation == "aten" for rival in rivals):
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            finally:
                raise ValueError("capture ended")
        return [[1.0, 2.0, 3.0] for _ in rivals]

    monkeypatch.setattr(cases, "_sampled", sampled)
    suite = device_suite.Suite(torch.device("cpu"), 2, "digits", toy=True)
    rows = [row for row in suite.kernels() if row["dtype"] == "float32"]
    assert [row["median_us"] for row in rows if row["implementation"] == "reference"] == [2e6] * 4
    status = (
        "failed: ValueError: capture ended; at first RuntimeError: operation not permitted when stream is capturing"
    )
    assert [row.get("status") for row in rows if row["implementation"] == "aten"] == [status] * 4
    assert f"forward of stage2: sampled one by one, because together they {status}" in capsys.readouterr().out


def test_a_layer_that_fails_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(rivals: list[object], device: torch.device, samples: int) -> list[list[float]]:
        begun.append(rivals)
        if len(begun) == 3:
            raise RuntimeError("capture failed")
        return [[1.0] * samples]

    begun: list[object] = []
    monkeypatch.setattr(device_suite, "seconds", seconds)
    rows = list(device_suite.Suite(torch.device("cpu"), 2, "digits", toy=True).layers())
    assert [number for number, row in enumerate(rows) if "status" in row] == [2]
    assert (rows[2]["case"], rows[2]["status"]) == ("stage1", "failed: RuntimeError: capture failed")
    assert rows[-1]["case"] == "whole step"
    assert "percent_explained" not in rows[-1], "of a sum that one layer is missing from"


def test_a_strategy_and_a_choice_that_fail_cost_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(strategy: str, *arguments: object) -> dict[str, object]:
        if strategy == "tower":
            raise RuntimeError("no second device")
        return {"case": "update of one rank", "implementation": strategy, "median_us": 1.0}

    def check(prepared: cases.Prepared, *arguments: object) -> None:
        if triton_stage.SEGMENT_ROWS == 5:
            raise cases.WrongResultError("output differs")

    monkeypatch.setattr(device_suite, "alone", alone)
    monkeypatch.setattr(device_suite, "check", check)
    suite = device_suite.Suite(torch.device("cpu"), 2, "digits", toy=True)
    statuses = {row["implementation"]: row.get("status") for row in suite.parallel()}
    assert statuses.pop("tower") == "failed: RuntimeError: no second device"
    assert statuses == {"none": None, "data": None, "hybrid": None}
    rows = list(suite.choices())
    assert [row["implementation"] for row in rows if "status" in row] == ["5 rows"]
    assert sum(row["implementation"] == "4 rows" for row in rows) == 3


def test_what_is_compared_with_limits_has_them(tmp_path: Path) -> None:
    assert device_suite.main(["--output", str(tmp_path), "--parts", "inference"]) == 0
    (file,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["suite"] for row in rows} == {"ceilings", "steps"}
    assert all(row["limit_us"] > 0 for row in rows if row["suite"] == "steps")


def test_what_takes_too_long_is_stopped_with_all_it_has_started(tmp_path: Path) -> None:
    file = tmp_path / "process"
    script = f"sleep 60 & echo $! > {file}; wait"
    assert device_suite._exit_status(["bash", "-c", script], dict(os.environ), 1.0) is None
    state = Path("/proc") / file.read_text().strip() / "stat"
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert device_suite._exit_status(["bash", "-c", "exit 9"], dict(os.environ), 10.0) == 9


def test_a_step_that_fails_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: object, forward: object, images: torch.Tensor, labels: object, dtype: str) -> None:
        raise RuntimeError("" if dtype == "float32" else "out of memory")

    monkeypatch.setattr(device_suite, "update_step", broken)
    suite = device_suite.Suite(torch.device("cpu"), 2, "digits", toy=True)
    rows = {row["dtype"]: row["status"] for row in suite.steps()}
    assert rows == {"bfloat16": "failed: RuntimeError: out of memory", "float32": "failed: RuntimeError: "}


def test_choices_are_what_is_launched() -> None:
    def launched() -> tuple[object, int]:
        _, launch, _ = next(aot.launches(aot.CASES[0], torch.bfloat16, torch.channels_last))
        return launch.options(9)["maxnreg"], launch.arguments["segment_rows"]

    before = launched()
    with device_suite.chosen(dict.fromkeys(triton_stage.REGISTERS, 80), 3):
        assert launched() == (80, 3)
    assert launched() == before != (80, 3)


def test_refusals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        device_suite.main(["--parts", "everything"])
    said = capsys.readouterr().err
    assert "invalid choice: 'everything'" in said
    assert said.count("\n") == 1
    monkeypatch.setattr(device_suite, "describe_machine", lambda: {"commit": ""})
    with pytest.raises(SystemExit):
        device_suite.main([])
    assert "or set SOURCE_COMMIT" in capsys.readouterr().err
