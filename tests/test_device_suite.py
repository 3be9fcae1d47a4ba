"""The suite for GPUs, at toy sizes on a CPU."""

import gzip
import json
from pathlib import Path

import pytest

from bench import device_suite
from tests.commands import run


def test_every_part_runs(tmp_path: Path) -> None:
    done = run("bench.device_suite", "--output", str(tmp_path), OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for file in tmp_path.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert {row.get("suite") for row in rows} == {None, "ceilings", "kernels", "layers", "steps", "input"}
    layers = {row["case"]: row for row in rows if row.get("suite") == "layers" and row["mode"] == "training"}
    assert list(layers)[:3] == ["conv1", "stage1", "conv2"]
    assert layers["whole step"]["sum_of_layers_us"] > 0
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


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        device_suite.main(["--parts", "everything"])
    said = capsys.readouterr().err
    assert "invalid choice: 'everything'" in said
    assert said.count("\n") == 1
