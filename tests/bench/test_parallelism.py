"""The comparison's arithmetic: time in a trace, bytes by formula, the cost model, and the report made of them."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import parallel_losses, parallelism, parallelism_report
from bench.cost_model import STRATEGIES, Link, message_seconds, predict, published
from bench.messages import Message, expected
from bench.one_rank import alone, usable
from bench.parallel_losses import LOSSES_CASE, REORDERED, learn
from bench.parallelism import (
    ALL_CORES,
    CASE,
    LINK_CASE,
    common,
    cores_per_process,
    length,
    main,
    split,
    union,
)
from bench.parallelism_figures import ROUNDING
from bench.records import Row, read
from net.common.device import peak_memory_mib
from net.data import digits
from net.data.images import Split
from net.model.config import network
from tests.commands import ROOT


def test_time_in_a_trace_against_counted_ticks() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        parts = []
        for count in (12, 7):
            starts = torch.randint(0, 100, (count,), generator=generator).tolist()
            lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
            parts.append([(start, start + size) for start, size in zip(starts, lengths, strict=True)])
        ticks = [{tick for start, end in part for tick in range(start, end)} for part in parts]
        a, b = (union(part) for part in parts)
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(a))
        assert length(a) == len(ticks[0])
        assert length(common(a, b)) == len(ticks[0] & ticks[1])


def test_a_trace_without_messages_is_all_compute() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        torch.randn(300, 300) @ torch.randn(300, 300)
    found = split(trace)
    assert found["compute_us"] > 0
    assert found["exposed_us"] == found["hidden_us"] == 0


def test_messages_of_the_papers_towers() -> None:
    """Per image 128 maps of 13x13 and of 6x6 and 2048 features twice from each tower, there and back; 500 logits."""
    messages = expected(network("paper"), "tower", 2, 128)
    assert len(messages) == 9
    assert sum(message.sent for message in messages) == 4 * 128 * (2 * (128 * 13**2 + 128 * 6**2 + 2048 + 2048) + 500)


def test_bytes_of_data_parallelism_are_the_parameters() -> None:
    messages = expected(network("paper"), "data", 2, 128)
    # Two ranks: half the gradients out to be added, and half the sums.
    assert sum(message.sent for message in messages) == 4 * 60_965_224
    assert sum(message.sent for message in expected(network("paper"), "data", 8, 128)) == 4 * 60_965_224 * 7 / 4


def test_bytes_of_the_hybrid() -> None:
    """On 4 ranks, 32 images each: 9216 features and two times 4096, there and back; 1000 logits; conv gradients."""
    sent = sum(message.sent for message in expected(network("paper"), "hybrid", 4, 128))
    convolutions = 34_944 + 307_456 + 885_120 + 663_936 + 442_624
    features = 128 * (9216 + 4096 + 4096) * 3 / 4
    logits = 128 * 250 * 3 / 4
    assert sent == 4 * (2 * features + 2 * logits + 2 * convolutions * 3 / 4)


def test_a_message_takes_its_rounds_and_its_bytes() -> None:
    link = Link("test", 1e6, 0.5, "")
    assert message_seconds(Message("", "all_reduce", 1_000_000, 4), link) == 2 * 2 * 0.5 + 2 * 0.75
    assert message_seconds(Message("", "all_gather", 1_000_000, 2), link) == 0.5 + 0.5
    assert message_seconds(Message("", "all_gather", 1_000_000, 1), link) == 0


def test_gradients_hide_behind_the_backward_pass_and_nowhere_else() -> None:
    link = Link("test", 4 * 60_965_224, 0.0, "")
    paper = network("paper")
    slow = predict(paper, "data", 2, 128, 0.75 / 64, link)
    assert (slow.compute_s, slow.hidden_s) == (0.75, 0.5)
    assert slow.seconds == pytest.approx(0.75 + 0.5)
    assert predict(paper, "data", 2, 128, 3 / 64, link).seconds == pytest.approx(3)
    assert predict(paper, "tower", 2, 128, 3 / 64, link).hidden_s == 0


def test_published_figures() -> None:
    """The model ranks the nets of 2012 as the paper does, and is near the speed-ups of 2014 on few devices."""
    two_gpu, *speed_ups = published()
    assert 0.8 < float(str(two_gpu["model"])) < 1
    assert [row["published"] for row in speed_ups] == [1.95, 3.74, 6.25]
    assert abs(float(str(speed_ups[0]["error_percent"]))) < 5
    assert abs(float(str(speed_ups[1]["error_percent"]))) < 10


def test_one_rank_by_itself() -> None:
    """Every strategy that can; the group is gone afterwards."""
    device = torch.device("cpu")
    assert usable("digits", 2) == ["none", "data", "tower", "hybrid"]
    assert usable("cifar10", 2) == usable("digits", 3) == ["none", "data", "hybrid"]
    for strategy in usable("digits", 2):
        row = alone(strategy, "digits", 4, 2, "float32", "eager", device, 2)
        assert row["ranks"] == (1 if strategy == "none" else 2)
        assert row["median_us"] > 0
        assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_comparison_ends_in_a_report(tmp_path: Path) -> None:
    """Every measurement of a small network in processes of its own; then the tables of them alone."""
    main(["--network", "cifar10", "--batch-size", "4", "--updates", "2", "--output", str(tmp_path / "data")])
    rows = read(tmp_path / "data")
    runs = {row["implementation"]: row for row in rows if row["case"] == CASE}
    one, every = cores_per_process("none", 2), cores_per_process(ALL_CORES, 2)
    assert list(runs) == ["none", *([ALL_CORES] if every != one else []), "data", "hybrid"]
    for name, row in runs.items():
        assert row["cores_per_process"] == row["threads"] == (every if name == ALL_CORES else one)
        assert row["ranks"] == (2 if name in ("data", "hybrid") else 1)
    for strategy in ("data", "hybrid"):
        row = runs[strategy]
        assert row["messages"] == row["formula_messages"] > 0
        assert row["sent_mib"] == row["formula_sent_mib"] > 0
        assert row["compute_us"] > 0
        assert row["exposed_us"] + row["hidden_us"] > 0
    assert runs["hybrid"]["parameters_mib"] < runs["data"]["parameters_mib"]
    titles = [part.table.title for part in parallelism_report.parts(rows)]
    assert titles[:2] == ["Update of cifar10, 4x3x32x32", "Messages and memory, cifar10, 4x3x32x32"]
    assert "One rank by itself, cifar10, 4x3x32x32, float32, eager" in titles
    assert "The cost model against these measurements" in titles


def test_what_is_measured_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cores of a CPU's processes; with fewer GPUs than ranks no strategy; with one core no second row of none."""

    def names(variants: list[str], ranks: int = 2) -> list[str]:
        return [job.job for job in parallelism.plan(variants, None, 1, ranks)]

    losses = [f"losses {dtype}: {name}" for dtype in ROUNDING for name in ("none", REORDERED, *STRATEGIES)]
    alone = [f"alone: {strategy}" for strategy in ("none", *STRATEGIES)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cores, ranks, each in ((2, 2, 1), (8, 2, 4), (8, 4, 2), (2, 4, 1)):
        monkeypatch.setattr(parallelism, "available_cores", lambda cores=cores: cores)
        assert cores_per_process("none", ranks) == cores_per_process("data", ranks) == each
        assert cores_per_process(ALL_CORES, ranks) == cores
    assert names(["paper"]) == ["none", ALL_CORES, *STRATEGIES, *alone, "link"]
    assert names(["digits"]) == ["none", ALL_CORES, *STRATEGIES, *alone, "link", *losses]
    monkeypatch.setattr(parallelism, "available_cores", lambda: 1)
    assert names(["paper"]) == ["none", *STRATEGIES, *alone, "link"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert names(["paper", "digits"]) == ["none", *alone, "none", *alone, "link"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert names(["digits"]) == ["none", *STRATEGIES, *alone, "link", *losses]


def test_only_what_was_asked_for_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[str, int]] = []
    row = {"case": CASE, "implementation": "hybrid", "median_us": 1.0}
    monkeypatch.setattr(parallelism, "started", lambda job, ranks, arguments: started.append((job, ranks)) or row)
    main(["--network", "paper", "--only", "hybrid", "none", "--output", str(tmp_path)])
    assert started == [("none", 1), ("hybrid", 2)]
    for wrong in (
        ["--batch-size", "3"],
        ["--ranks", "1"],
        ["--only", "nothing"],
        ["--network", "paper", "--ranks", "5"],
    ):
        with pytest.raises(SystemExit):
            main([*wrong, "--output", str(tmp_path)])
    assert len(started) == 2


@pytest.mark.slow
def test_the_order_of_a_batch_changes_losses_by_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digits.load()
    train = Split(whole.train.images[::12], whole.train.labels[::12])
    few = dataclasses.replace(whole, train=train, val=Split(whole.val.images[:20], whole.val.labels[:20]))
    monkeypatch.setattr(parallel_losses.digits, "load", lambda: few)
    cpu = torch.device("cpu")
    rows = {(name, dtype): learn(name, dtype, cpu, 1) for name in ("none", REORDERED) for dtype in ROUNDING}
    for dtype, bound in ROUNDING.items():
        plain, reordered = (rows[name, dtype]["losses"] for name in ("none", REORDERED))
        assert len(plain) == rows["none", dtype]["updates"] == 3
        assert plain != reordered
        assert plain == pytest.approx(reordered, abs=bound)
    double, single = (rows["none", dtype] for dtype in ("float64", "float32"))
    assert 0 < abs(double["losses"][0] - single["losses"][0]) < 1e-5
    assert double["top1_error_percent"] * 20 / 100 == pytest.approx(round(double["top1_error_percent"] * 20 / 100))
    assert double["validation_images"] == 20


@pytest.mark.slow
def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    held = np.ones(2**27)
    code = "import torch; from net.common.device import peak_memory_mib; print(peak_memory_mib(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 10 < float(done.stdout) < 1024 < peak_memory_mib(torch.device("cpu"))
    assert held[-1] == 1


MACHINE = {"machine": "CPU: Some", "torch": "2.13", "commit": "abc", "date": "2026-01-02", "record": "a.jsonl"}


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


def loss_row(strategy: str, dtype: str, losses: list[float], error: float, **columns: Any) -> Row:
    row: Row = {"case": LOSSES_CASE, "implementation": strategy, "network": "digits", "shape": "32x3x32x32"}
    row |= {"dtype": dtype, "ranks": 1 if strategy.startswith("none") else 2, "epochs": 2, "updates": len(losses)}
    row |= {"losses": losses, "validation_images": 200, "validation_loss": 0.5, "top1_error_percent": error}
    return {**row, "data": "some digits", "cores_per_process": 1, **MACHINE, **columns}


GPU = {
    **{"case": "update of paper", "implementation": "triton, reduce-overhead", "shape": "128x3x224x224"},
    **{"dtype": "bfloat16", "median_us": 6400.0, **MACHINE, "machine": "NVIDIA First", "record": "g.jsonl"},
}


def tables_of(rows: list[Row]) -> dict[str, list[dict[str, str]]]:
    """Every table's rows by title, a cell's text by its column."""
    return {
        part.table.title: [
            {title: cell.text for title, cell in zip(part.table.columns, line, strict=True)} for line in part.table.rows
        ]
        for part in parallelism_report.parts(rows)
    }


def test_tables_say_the_cores_and_compare_with_one_process_on_all_of_them() -> None:
    rows = [
        update("data", 80.0, cores_per_process=1),
        update("none", 120.0, cores_per_process=1),
        update(ALL_CORES, 60.0, cores_per_process=2),
    ]
    lines = tables_of(rows)["Update of digits, 64x3x32x32"]
    assert [line["strategy"] for line in lines] == ["none", "none", "data"]
    assert [(line["world size"], line["cores per process"]) for line in lines] == [("1", "1"), ("1", "2"), ("2", "1")]
    assert [line["speed-up"] for line in lines] == ["0.50", "1.00", "0.75"]
    assert (lines[2]["exposed ms"], lines[2]["overlapped ms"]) == ("3.000", "4.000")
    # What older records do not say is not guessed.
    old = tables_of([update("none", 120.0, threads=2), update("data", 80.0, threads=2)])
    assert {(line["cores per process"], line["speed-up"]) for line in old["Update of digits, 64x3x32x32"]} == {
        ("-", "-")
    }


def test_the_newest_row_of_a_strategy_counts_and_a_failed_one_says_why() -> None:
    failed = update("data", 1.0, status="failed: no memory")
    del failed["median_us"], failed["images_per_s"]
    rows = [update("none", 120.0), update("none", 100.0, record="b.jsonl"), failed]
    lines = tables_of(rows)["Update of digits, 64x3x32x32"]
    assert [line["update ms"] for line in lines] == ["100.0", "failed: no memory"]


def test_the_model_is_held_against_the_same_machine_s_link() -> None:
    """64 MiB in 1 s here, and in 0.001 s on another machine, which is newer."""
    other = {"machine": "CPU: Other", "date": "2026-01-03"}
    rows = [
        *(update("none", 100.0), update("tower", 200.0), *links(1.0)),
        *(update("none", 100.0, **other), update("tower", 200.0, **other), *links(0.001, **other)),
    ]
    found = [part for part in parallelism_report.parts(rows) if "against these" in part.table.title]
    assert [part.machine for part in found] == ["CPU: Other", "CPU: Some"]
    for part, bandwidth in zip(found, (64 * 2**20 / 0.001, 64 * 2**20), strict=True):
        link = Link("", bandwidth, 100e-6, "")
        seconds = predict(network("digits", dropout=0.0), "tower", 2, 64, 0.1 / 64, link).seconds
        line = part.table.rows[0]
        assert line[2].value == pytest.approx(1e3 * seconds)
        assert line[4].value == pytest.approx(100 * (seconds / 0.2 - 1))


def test_what_is_modelled_comes_last_and_names_its_gpu() -> None:
    slower = {**GPU, "implementation": "triton, eager", "median_us": 9000.0}
    second = {**GPU, "machine": "NVIDIA Second", "median_us": 3200.0, "date": "2026-01-05", "record": "h.jsonl"}
    rows = [update("none", 120.0), GPU, slower, second, {**GPU, "machine": "CPU: Some"}]
    parts = parallelism_report.parts(rows)
    flags = [part.modelled for part in parts]
    assert flags == sorted(flags)
    assert all(part.table.title.startswith("Modelled, not measured") == part.modelled for part in parts)
    (title,) = [title for title in tables_of(rows) if "1024 devices" in title]
    lines = tables_of(rows)[title]
    assert list(dict.fromkeys(line["device"] for line in lines)) == ["GTX 580", "NVIDIA Second", "NVIDIA First"]
    one = {line["device"]: line["1"] for line in lines if line["strategy"] == "data"}
    assert (one["NVIDIA First"], one["NVIDIA Second"]) == ("20,000", "40,000")
    picture = parallelism_report.figures(rows)[-1]
    assert picture.modelled
    assert picture.alt.startswith("Modelled, not measured")
    assert "NVIDIA Second" in picture.alt
    text = parallelism_report.text(rows)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## CPU: Some", "## Modelled, not measured"]
    assert "- `reports/data/h.jsonl`: 2026-01-05, commit abc;\n  NVIDIA Second, torch 2.13\n" in text


def test_losses_are_told_and_drawn_as_they_are(tmp_path: Path) -> None:
    """Differences by hand; the text beside the figure says what it shows."""
    plain = [2.0, 1.0, 0.5, 0.25]
    rows = [
        *(loss_row("none", "float64", plain, 10.0), loss_row("none", "float32", plain, 10.0)),
        loss_row("data", "float64", [2.0, 1.0 + 2**-50, 0.5, 0.25], 10.0),
        loss_row("data", "float32", [2.0, 1.5, 0.75, 0.25], 12.5),
    ]
    tables = tables_of(rows)
    double = tables["Losses, float64, digits, 32x3x32x32"][1]
    single = tables["Losses, float32, digits, 32x3x32x32"][1]
    # Of the first epoch, two updates.
    assert (double["difference"], single["difference"]) == ("8.9e-16", "5.0e-01")
    assert (single["loss of the last epoch"], single["top-1 error %"]) == ("0.5000", "12.50 (25 of 200)")
    (picture,) = parallelism_report.figures(rows)
    assert "at most 9e-16, inside the band" in picture.alt
    assert "none 10.0 %, data 12.5 %" in picture.alt
    assert picture.png() == picture.png()
    wide = [*rows, loss_row("data", "float64", [2.0, 1.0, 0.5, 0.3], 10.0)]
    assert "at most 0.05, above the band" in parallelism_report.figures(wide)[0].alt
    assert parallelism_report.figures(rows[:2]) == []
    # A newer record of one strategy alone has nothing to be compared with.
    later = loss_row("data", "float64", [9.0] * 4, 10.0, record="b.jsonl", date="2026-01-09")
    assert parallelism_report.figures([*rows, later])[0].alt == picture.alt
    readme = tmp_path / "README.md"
    readme.write_text(f"before {parallelism_report.BEGIN} old {parallelism_report.END} after")
    written = parallelism_report.write(tmp_path, readme, [*rows, update("none", 50.0), GPU])
    names = {"parallelism.md", "parallelism.png", "parallelism-modelled.png", "README.md"}
    assert {path.name for path in written} == names
    report = (tmp_path / "parallelism.md").read_text()
    assert report.index("(parallelism.png)") < report.index("## CPU: Some") < report.index("(parallelism-modelled.png)")
    # The first screen has the paper's network, of which there is nothing here.
    assert readme.read_text() == f"before {parallelism_report.BEGIN}\nNot measured.\n{parallelism_report.END} after"
    paper = [update("none", 50.0, network="paper", shape="32x3x224x224", date="2026-01-04")]
    text = parallelism_report.headline([*rows, update("none", 50.0), *paper, GPU])
    assert text.startswith("Update of paper, 32x3x224x224, measured:")
    assert text.count("| strategy") == 1


def test_nothing_measured_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no marks")
    assert [path.name for path in parallelism_report.write(tmp_path, tmp_path / "README.md", [])] == ["parallelism.md"]
    assert [part.modelled for part in parallelism_report.parts([])] == [True]
