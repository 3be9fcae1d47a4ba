"""Records and the tables made from them."""

import json
from pathlib import Path

import pandas as pd
import pytest

from bench import records, report
from bench.environment import ROOT, describe


def rows() -> list[dict[str, object]]:
    return [
        {"case": "loader, 2 reading", "shape": "a", "median_us": 25_000.0, "images_per_s": 80_000.0},
        {"case": "prepare, one process", "shape": "b", "median_us": 130_000.0, "images_per_s": 490.0},
        {"case": "loader, 2 reading", "shape": "a", "median_us": 20_000.0, "images_per_s": 100_000.0},
    ]


def test_rows_carry_the_machine(tmp_path: Path) -> None:
    path = records.write(rows(), tmp_path)
    assert records.write(rows()[:1], tmp_path) == path
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert {"machine", "torch", "triton", "commit", "dirty", "date", "threads"} <= set(line)
    frame = records.read(tmp_path)
    assert len(frame) == 4
    assert set(frame["record"]) == {path.name}


def test_rows_are_in_the_order_of_time(tmp_path: Path) -> None:
    """The names of one day's records end in commits, which are in no order."""
    for name, moment in (
        ("2026-01-02-cpu-b", {"time": "09:00:00"}),
        ("2026-01-02-cpu-a", {"time": "11:00:00"}),
        ("2026-01-02-cpu-c", {}),
    ):
        line = json.dumps({"case": name[-1], "date": "2026-01-02", **moment})
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
    (tmp_path / "2026-01-01-cpu-z.jsonl").write_text(
        json.dumps({"case": "z", "date": "2026-01-01", "time": "23:00:00"}) + "\n"
    )
    assert list(records.read(tmp_path)["case"]) == ["z", "c", "b", "a"]


def test_percentiles() -> None:
    assert records.time_columns([2e-3]) == {"median_us": 2000.0}
    assert records.time_columns([1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3]) == {
        "median_us": 3500.0,
        "p20_us": 2000.0,
        "p80_us": 5000.0,
    }


def test_tables_show_the_newest_row_of_a_case_and_its_record(tmp_path: Path) -> None:
    path = records.write(rows(), tmp_path / "data")
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(tmp_path, tmp_path / "README.md", records.read(tmp_path / "data"))
    text = (tmp_path / "input_pipeline.md").read_text()
    assert "| loader, 2 reading    | a       | 20.00" in text
    assert "100,000" in text
    assert "80,000" not in text
    assert f"`reports/data/{path.name}`" in text
    assert describe()["torch"] in text
    assert (tmp_path / "training.md").read_text().endswith("Not measured.\n")
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "old" not in readme
    assert "490" in readme


def test_without_records_nothing_is_shown(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"{report.BEGIN}{report.END}")
    report.write(tmp_path, tmp_path / "README.md", records.read(tmp_path / "data"))
    assert "Not measured." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["README.md", *(f"reports/{table}" for table in report.TABLES)])
def test_committed_figures_are_those_of_the_records(tmp_path: Path, name: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    report.write(tmp_path, readme, records.read())
    assert (tmp_path / Path(name).name).read_text() == (ROOT / name).read_text()


def test_committed_accuracy_is_that_of_the_results(tmp_path: Path) -> None:
    written = report.write_accuracy(tmp_path, records.DATA)
    assert len(written) > 1
    assert (tmp_path / "accuracy.md").read_text() == (ROOT / "reports" / "accuracy.md").read_text()
    for path in written[1:]:
        assert (ROOT / "reports" / path.name).is_file()


def test_every_case_of_the_records_is_in_a_table() -> None:
    shown = {case for _, cases in report.TABLES.values() for case in cases}
    frame = records.read()
    assert isinstance(frame, pd.DataFrame)
    assert set(frame["case"]) <= shown
