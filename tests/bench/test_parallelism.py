"""The comparison's arithmetic: time in a trace, bytes by formula, the cost model."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import parallelism
from bench.measure.records import read
from bench.parallelism import (
    ALL_CORES,
    CASE,
    common,
    cores_per_process,
    length,
    main,
    split,
    union,
)
from bench.predict.cost_model import STRATEGIES, Link, message_seconds, predict, published
from bench.predict.messages import Message, expected
from bench.report.parallelism import page
from bench.report.parallelism_figures import ROUNDING
from bench.subjects import parallel_losses
from bench.subjects.one_rank import alone, usable
from bench.subjects.parallel_losses import REORDERED, learn
from net.common.device import peak_memory_mib
from net.data import digits
from net.data.images import Split
from net.model.config import network
from tests.commands import ROOT, one_line, run_here


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
    titles = [table.title for section in page(rows).sections for table in section.tables]
    assert titles[:2] == ["Update of cifar10, 4x3x32x32", "Messages and memory, cifar10, 4x3x32x32"]
    assert "One rank by itself, cifar10, 4x3x32x32, float32, eager" in titles
    assert "The cost model against these measurements" in titles


def test_what_is_measured_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cores of a CPU's processes; with fewer GPUs than ranks no strategy; with one core no second row of none."""

    def names(variants: list[str], ranks: int = 2) -> list[str]:
        return [job.job for job in parallelism.plan(variants, None, 1, ranks)]

    losses = [f"losses {dtype}: {name}" for dtype in ROUNDING for name in ("none", REORDERED, *STRATEGIES)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cores, ranks, each in ((2, 2, 1), (8, 2, 4), (8, 4, 2), (2, 4, 1)):
        monkeypatch.setattr(parallelism, "available_cores", lambda cores=cores: cores)
        assert cores_per_process("none", ranks) == cores_per_process("data", ranks) == each
        assert cores_per_process(ALL_CORES, ranks) == cores
    assert names(["paper"]) == ["none", ALL_CORES, *STRATEGIES, "alone", "link"]
    assert names(["digits"]) == ["none", ALL_CORES, *STRATEGIES, "alone", "link", *losses]
    monkeypatch.setattr(parallelism, "available_cores", lambda: 1)
    assert names(["paper"]) == ["none", *STRATEGIES, "alone", "link"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert names(["paper", "digits"]) == ["none", "alone", "none", "alone", "link"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert names(["digits"]) == ["none", *STRATEGIES, "alone", "link", *losses]


def test_only_what_was_asked_for_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[str, int]] = []
    row = {"suite": "parallel", "case": CASE, "implementation": "hybrid", "median_us": 1.0}
    monkeypatch.setattr(parallelism, "started", lambda job, ranks, arguments: started.append((job, ranks)) or row)
    main(["--network", "paper", "--only", "hybrid", "none", "--output", str(tmp_path)])
    assert started == [("none", 1), ("hybrid", 2)]
    for wrong, said in (
        (["--batch-size", "3"], "--batch-size 3 cannot be shared equally by 2 processes"),
        (["--batch-size", "0"], "--batch-size must be at least 1; got 0"),
        (["--batch-size", "-2"], "--batch-size must be at least 1; got -2"),
        (["--updates", "0"], "--updates must be at least 1; got 0"),
        (["--ranks", "1"], "--ranks must be at least 2; got 1"),
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        (["--network", "paper", "--ranks", "5"], "--batch-size 32 cannot be shared equally by 5 processes"),
    ):
        one_line(run_here("bench.parallelism", *wrong, "--output", tmp_path), 2, said)
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


def test_a_job_that_fails_says_why() -> None:
    with pytest.raises(SystemExit, match="error: tower in 2 processes failed") as failed:
        parallelism.started("tower", 2, ("--network", "none of ours"))
    assert "invalid choice: 'none of ours'" in str(failed.value)


@pytest.mark.slow
def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    held = np.ones(2**27)
    code = "import torch; from net.common.device import peak_memory_mib; print(peak_memory_mib(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 10 < float(done.stdout) < 1024 < peak_memory_mib(torch.device("cpu"))
    assert held[-1] == 1
