"""The page of parallel strategies: what its tables and captions say of given rows."""

from typing import Any

import pytest

from bench.measure.records import Row
from bench.parallelism import ALL_CORES, CASE, LINK_CASE
from bench.predict.cost_model import Link, predict
from bench.report import parallelism
from bench.report.tables import Cell
from net.model.config import network
from tests.bench.test_report import loss_row

MACHINE: Row = {
    **{"suite": "parallel", "machine": "CPU: Some", "threads": 1, "torch": "2.13"},
    **{"commit": "abc", "date": "2026-01-02", "record": "a.jsonl"},
}


def update(strategy: str, median_ms: float, **columns: Any) -> Row:
    """A measured update of the digits network."""
    ranks = 1 if strategy.startswith("none") else 2
    row: Row = {"case": CASE, "implementation": strategy, "network": "digits", "shape": "64x3x32x32", "ranks": ranks}
    row |= {"dtype": "float32", "median_us": 1e3 * median_ms, "images_per_s": 64e3 / median_ms, "compute_us": 2000.0}
    row |= {"exposed_us": 3000.0, "hidden_us": 4000.0, "messages": 2, "formula_messages": 2, "sent_mib": 1.5}
    return {**row, "formula_sent_mib": 1.5, "process_peak_mib": 400, **MACHINE, **columns}


def links(seconds: float, **columns: Any) -> list[Row]:
    """All-reduces between two processes that send so many bytes a second as there are seconds."""
    row = {"case": LINK_CASE, "implementation": "gloo", **MACHINE, **columns}
    return [
        {**row, "shape": "1", "median_us": 200.0, "sent_mib": 0.0},
        {**row, "shape": str(2**24), "median_us": seconds * 1e6, "sent_mib": 64.0},
    ]


GPU = {
    **{"case": "update of paper", "implementation": "triton, reduce-overhead", "shape": "128x3x224x224"},
    **{"dtype": "bfloat16", "median_us": 6400.0, **MACHINE, "machine": "NVIDIA First", "record": "g.jsonl"},
}


def tables_of(rows: list[Row]) -> dict[str, list[dict[str, Cell]]]:
    """Every table's rows by title, its cells by their column."""
    return {
        table.title: [
            {column.title: cell for column, cell in zip(table.columns, line, strict=True)} for line in table.rows
        ]
        for section in parallelism.page(rows).sections
        for table in section.tables
    }


def texts(lines: list[dict[str, Cell]], title: str) -> list[str]:
    return [line[title].text for line in lines]


def test_tables_say_the_cores_and_compare_with_one_process_on_all_of_them() -> None:
    rows = [
        update("data", 80.0, cores_per_process=1),
        update("none", 120.0, cores_per_process=1),
        update(ALL_CORES, 60.0, cores_per_process=2),
    ]
    lines = tables_of(rows)["Update of digits, 64x3x32x32"]
    assert texts(lines, "strategy") == ["none", "none", "data"]
    assert list(zip(texts(lines, "world size"), texts(lines, "cores per process"), strict=True)) == [
        ("1", "1"), ("1", "2"), ("2", "1"),
    ]  # fmt: skip
    assert texts(lines, "speedup") == ["0.50", "1.00", "0.75"]
    assert (lines[2]["exposed ms"].text, lines[2]["overlapped ms"].text) == ("3.000", "4.000")
    # What older records do not say is not guessed, from the number of threads for one.
    old = tables_of([update("none", 120.0, threads=2), update("data", 80.0, threads=2)])
    assert not {"speedup", "cores per process"} & set(old["Update of digits, 64x3x32x32"][0])


def test_the_newest_row_of_a_strategy_counts_and_a_failed_one_says_why() -> None:
    failed = update("data", 1.0, status="failed: no memory")
    del failed["median_us"], failed["images_per_s"]
    rows = [update("none", 120.0), update("none", 100.0, record="b.jsonl"), failed]
    lines = tables_of(rows)["Update of digits, 64x3x32x32"]
    assert texts(lines, "update ms") == ["100.0", "-"]
    assert lines[1]["update ms"].why == "failed: no memory"


def test_the_model_is_held_against_the_same_machine_s_link() -> None:
    """64 MiB in 1 s here, and in 0.001 s on another machine, which is newer."""
    other = {"machine": "CPU: Other", "date": "2026-01-03"}
    rows = [
        *(update("none", 100.0), update("tower", 200.0), *links(1.0)),
        *(update("none", 100.0, **other), update("tower", 200.0, **other), *links(0.001, **other)),
    ]
    sections = parallelism.page(rows).sections
    assert [section.title for section in sections] == ["CPU: Other", "CPU: Some", "Modelled, not measured"]
    for section, bandwidth in zip(sections, (64 * 2**20 / 0.001, 64 * 2**20), strict=False):
        link = Link("", bandwidth, 100e-6, "")
        seconds = predict(network("digits", dropout=0.0), "tower", 2, 64, 0.1 / 64, link).seconds
        (held,) = [table for table in section.tables if "against these" in table.title]
        values = {column.title: cell.value for column, cell in zip(held.columns, held.rows[0], strict=True)}
        assert values["modelled ms"] == pytest.approx(1e6 * seconds)
        assert values["error %"] == pytest.approx(100 * (seconds / 0.2 - 1))


def test_what_is_modelled_comes_last_and_names_its_gpu() -> None:
    slower = {**GPU, "implementation": "triton, eager", "median_us": 9000.0}
    second = {**GPU, "machine": "NVIDIA Second", "median_us": 3200.0, "date": "2026-01-05", "record": "h.jsonl"}
    rows = [update("none", 120.0), GPU, slower, second, {**GPU, "machine": "CPU: Some"}]
    page = parallelism.page(rows)
    *measured, modelled = page.sections
    assert [section.title for section in measured] == ["CPU: Some"]
    for section in (*measured, modelled):
        for table in section.tables:
            assert table.title.startswith("Modelled, not measured") == (section is modelled)
    (title,) = [title for title in tables_of(rows) if "1024 devices" in title]
    lines = tables_of(rows)[title]
    assert list(dict.fromkeys(texts(lines, "device"))) == ["GTX 580", "NVIDIA Second", "NVIDIA First"]
    one = {line["device"].text: line["1"].text for line in lines if line["strategy"].text == "data"}
    assert (one["NVIDIA First"], one["NVIDIA Second"]) == ("20,000", "40,000")
    assert modelled.tables[0].sources == [
        "`reports/data/h.jsonl`: 2026-01-05, commit abc; NVIDIA Second, 1 thread, torch 2.13",
        "`reports/data/g.jsonl`: 2026-01-02, commit abc; NVIDIA First, 1 thread, torch 2.13",
    ]
    (figure,) = modelled.figures
    assert figure.about.startswith("Modelled, not measured")
    assert "NVIDIA Second" in figure.about
    assert [section.title for section in parallelism.page([]).sections] == ["Modelled, not measured"]


def test_losses_are_told_as_they_are() -> None:
    """Differences by hand; the text beside the figure says what it shows."""
    plain = [2.0, 1.0, 0.5, 0.25]
    rows = [
        *(loss_row("none", dtype, plain, record="a.jsonl") for dtype in ("float64", "float32")),
        loss_row("data", "float64", [2.0, 1.0 + 2**-50, 0.5, 0.25], record="a.jsonl"),
        loss_row("data", "float32", [2.0, 1.5, 0.75, 0.25], 12.5, record="a.jsonl"),
    ]
    tables = tables_of(rows)
    double = tables["Losses, float64, digits, 32x3x32x32"][1]
    single = tables["Losses, float32, digits, 32x3x32x32"][1]
    # Of the first epoch, two updates.
    assert (double["difference"].text, single["difference"].text) == ("8.9e-16", "5.0e-01")
    assert (single["loss in the last epoch"].text, single["top-1 error %"].text) == ("0.5000", "12.50 (25 of 200)")

    def about(rows: list[Row]) -> list[str]:
        return [figure.about for figure in parallelism.page(rows).figures]

    (said,) = about(rows)
    assert "at most 9e-16, inside the band" in said
    assert "none 10.0 %, data 12.5 %" in said
    wide = loss_row("data", "float64", [2.0, 1.0, 0.5, 0.3], record="a.jsonl")
    assert "at most 0.05, above the band" in about([*rows, wide])[0]
    assert about(rows[:2]) == []
    # A newer record of one strategy alone has nothing to be compared with.
    later = loss_row("data", "float64", [9.0] * 4, record="b.jsonl", date="2027-01-09")
    assert about([*rows, later]) == [said]
