"""The comparison's arithmetic: time in a trace, bytes by formula, the cost model, and the report made of them."""

import itertools
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench import parallelism, parallelism_report
from bench.cost_model import Link, message_seconds, predict, published
from bench.messages import Message, expected
from bench.one_rank import alone, usable
from bench.parallelism import CASE, common, length, main, split, union
from bench.records import read
from net.config import network


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
    """Two strategies and the link in processes of their own; then tables and the plot of them alone."""
    main(["--network", "cifar10", "--batch-size", "4", "--updates", "2", "--output", str(tmp_path / "data")])
    rows = pd.DataFrame(read(tmp_path / "data"))
    runs = rows[rows["case"] == CASE].set_index("implementation")
    assert list(runs.index) == ["none", "data", "hybrid"]
    for strategy in ("data", "hybrid"):
        row = runs.loc[strategy]
        assert row["messages"] == row["formula_messages"] > 0
        assert row["sent_mib"] == row["formula_sent_mib"] > 0
        assert row["compute_us"] > 0
        assert row["exposed_us"] + row["hidden_us"] > 0
        assert row["losses"] == pytest.approx(runs.loc["none"]["losses"], rel=1e-3)
    assert runs.loc["hybrid"]["parameters_mib"] < runs.loc["data"]["parameters_mib"]
    readme = tmp_path / "README.md"
    readme.write_text(f"before {parallelism_report.BEGIN} old {parallelism_report.END} after")
    parallelism_report.write(tmp_path, readme, rows)
    report = (tmp_path / "parallelism.md").read_text()
    assert "Measured: cifar10" in report
    assert "one rank by itself, cifar10, 4x3x32x32, float32, eager" in report
    assert "error %" in report
    assert (tmp_path / "parallelism.png").stat().st_size > 10_000
    assert "old" not in readme.read_text()
    assert "Modelled" not in readme.read_text()
    assert json.loads((next((tmp_path / "data").glob("*.jsonl"))).read_text().splitlines()[0])["ranks"] == 1


def test_fewer_gpus_than_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[str] = []
    every = ["none", "data", "tower", "hybrid"]
    monkeypatch.setattr(parallelism, "started", lambda job, ranks, arguments: started.append(job) or [])
    for gpus, strategies in ((0, every), (1, ["none"]), (2, every)):
        started.clear()
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        list(parallelism.compare("paper", 4, 1, 2))
        assert sorted(started) == sorted([*strategies, "link", "alone"])
        assert ("fewer GPUs than 2" in capsys.readouterr().out) == (gpus == 1)
