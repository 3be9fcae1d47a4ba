"""What each ablation changes, the command with tiny runs, resuming, and the statistics."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from net import ablations
from net.ablations import AblationsConfig
from net.analysis import ablation_cases, ablation_report
from net.analysis.ablation_report import Change, error_interval, paired, student_t
from net.common.errors import UsageError
from net.data import digits, synthetic
from net.data.images import ImageData
from net.data.processes import available_cores
from net.model.config import VARIANTS, AlexNetConfig, network
from net.readers.metrics import read_results
from net.training.config import TrainConfig
from net.training.setup import architecture
from net.training.trainer import Trainer
from tests.commands import Done, one_line, run_here

TINY = """
network = "digits"
recipe = "paper"
image_size = 32
epochs = 1
batch_size = 16
max_steps = 2
log_every = 1
"""


def until(done: Callable[[], bool]) -> None:
    """Poll ``done`` for minutes: on a busy machine a process takes one to start."""
    deadline = time.monotonic() + 200
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def ablate(tiny: Path, folder: Path, *arguments: object) -> Done:
    return run_here("net.ablations", *arguments, *flags(tiny, folder), "--workers", 1)


def flags(tiny: Path, folder: Path) -> list[object]:
    return ["--data-path", "synthetic:64", "--baseline", tiny, "--seeds", 3, "--output-dir", folder]


def results(folder: Path) -> list[dict[str, Any]]:
    """The sorted rows, without columns that depend on the clock and the machine."""
    _, rows = read_results(folder / "results.jsonl")
    learned = ("ablation", "seed", "loss", "top1_error_percent", "updates")
    return sorted(({key: row[key] for key in learned} for row in rows), key=lambda row: (row["ablation"], row["seed"]))


def by_name(name: str) -> ablation_cases.Ablation:
    return next(item for item in ablation_cases.ABLATIONS if item.name == name)


def changed(name: str, data: ImageData | None = None, **flags: Any) -> AlexNetConfig:
    config = TrainConfig(preset="imagenet", network="paper", recipe="paper", **flags)
    data = data or synthetic.load(16, 256, 1000)
    result = ablations.ablated(by_name(name), config, data)
    assert isinstance(result, TrainConfig), result
    return architecture(result, data)


def test_the_half_net_and_the_order_are_those_of_2012() -> None:
    assert replace(changed("half"), variant="half") == VARIANTS["half"]
    theirs = [layer.then for layer in VARIANTS["original_code"].convolutions]
    ours = [layer.then for layer in changed("program_order").convolutions]
    # The second normalization of stage 2 does not change the order.
    assert [tuple(item for item in then if item != "map_norm") for then in theirs] == ours


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("no_lrn", {"lrn": False}),
        ("no_overlap", {"overlapping_pooling": False}),
        ("no_dropout", {"dropout": 0.0}),
        ("one_tower", {"towers": 1}),
        ("no_exchange", {"exchange": False}),
        ("tanh", {"activation": "tanh"}),
        ("without_conv3", {"without": ("conv3",)}),
    ],
)
def test_what_an_ablation_changes(name: str, fields: dict[str, Any]) -> None:
    assert changed(name) == network("paper", **fields)


def test_what_data_or_network_cannot_show_is_said() -> None:
    def said(name: str, data: ImageData, **flags: Any) -> str:
        result = ablations.ablated(by_name(name), TrainConfig(preset="imagenet", recipe="paper", **flags), data)
        assert isinstance(result, str)
        return result

    gray, random = digits.load(), synthetic.load(16, 37, 10)
    assert said("no_colour", gray, network="digits") == "not shown by this data: its images are gray"
    assert "not shown by this data" in said("no_crops", gray, network="digits")
    assert said("no_colour", random, network="digits", colour_noise=0.0) == "the whole network is without it"
    assert said("no_lrn", random, network="digits", architecture={"lrn": False}) == "the whole network is without it"
    assert said("no_exchange", random, network="cifar10") == "the whole network is without it"
    assert said("without_conv5", random, network="cifar10").startswith("cannot be built: without: 'conv5'")
    plain = TrainConfig(preset="imagenet", network="digits", recipe="paper", image_size=32)
    for name in ("no_colour", "no_crops"):
        less = ablations.ablated(by_name(name), plain, random)
        assert isinstance(less, TrainConfig)
        assert (less.colour_noise, less.crop) == ((0.0, True) if name == "no_colour" else (0.1, False))


def test_the_baseline_suits_the_images() -> None:
    config, data = ablations.baseline(AblationsConfig())
    assert (config.network, config.image_size, config.recipe, data.size) == ("digits", 28, "digits", 32)
    quick, _ = ablations.baseline(AblationsConfig(quick=True))
    assert (quick.epochs, config.epochs) == (1, 6)
    assert quick.lr_milestones != config.lr_milestones
    assert not config.time_budget
    small, _ = ablations.baseline(AblationsConfig(data_path="synthetic:64"))
    assert (small.network, small.image_size, small.recipe) == ("digits", 32, "paper")


def test_the_command_and_how_it_goes_on(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ablate(tiny, tmp_path / "whole", "no_lrn")
    assert whole.returncode == 0, whole.stderr
    rows = results(tmp_path / "whole")
    assert [(row["ablation"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("baseline", "no_lrn") for seed in range(3)
    ]
    assert {row["updates"] for row in rows} == {2}
    assert len({row["loss"] for row in rows}) == 6
    assert "6/6  no_lrn, seed 2" in whole.stdout
    text = (tmp_path / "whole" / "accuracy.md").read_text()
    assert text.startswith("# Accuracy without each part: ")
    assert "| no response normalization | 3 " in text
    assert "](accuracy.png)" in text
    assert (tmp_path / "whole" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "whole").glob("*/checkpoints"))

    # Stopped by a signal in the middle of the fourth run.
    update, count = Trainer._update, 0

    def stopping(self: Trainer, batch: Any) -> None:
        nonlocal count
        update(self, batch)
        count += 1
        if count == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_update", stopping)
    stopped = ablate(tiny, tmp_path / "killed", "no_lrn")
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "stopped in no_lrn, seed 1" in stopped.stdout
    assert len(results(tmp_path / "killed")) == 3
    # A power cut while a line was being written.
    with open(tmp_path / "killed" / "results.jsonl", "a") as file:
        file.write('{"ablation": "no_l')
    again = ablate(tiny, tmp_path / "killed", "no_lrn")
    assert again.returncode == 0, again.stderr
    assert "6 runs of 1 epoch, 3 of them already done" in again.stdout
    assert count == 12, "the fourth training goes on after its first update"
    assert results(tmp_path / "killed") == rows

    # Runs with other settings are rejected.
    tiny.write_text(TINY.replace("max_steps = 2", "max_steps = 3"))
    refused = ablate(tiny, tmp_path / "whole", "no_lrn")
    one_line(refused, 2, "whole holds results of other settings: they differ in max_steps")


def test_results_are_of_data_not_of_its_place(tmp_path: Path) -> None:
    """A moved folder goes on, and other images do not; where the data is stays out of the results."""
    config, data = ablations.baseline(AblationsConfig())
    here, there = (
        ablations._settings(
            replace(config, data_path=str(tmp_path / place)),
            replace(data, path=str(tmp_path / place)),
        )
        for place in ("here/x", "there/x.packed")
    )
    assert str(tmp_path) not in json.dumps(here)
    assert here == there
    assert here["data"] == "x"
    path = tmp_path / "results.jsonl"
    rows = [{"ablation": "baseline", "seed": 0, "top1_error_percent": 1.0}]
    earlier = {**{name: value for name, value in here.items() if name != "checksums"}, "data_path": "/x", "tune": "off"}
    for before in (here, {**here, "data": "y"}, earlier):
        path.write_text("".join(json.dumps(line) + "\n" for line in ({"settings": before}, *rows)))
        assert ablations._read(path, there) == rows
    images = data.train.images.copy()
    images[-1] ^= 1
    other = ablations._settings(config, replace(data, train=replace(data.train, images=images)))
    path.write_text(json.dumps({"settings": here}) + "\n")
    with pytest.raises(UsageError, match=r"they differ in checksums$"):
        ablations._read(path, other)


@pytest.mark.slow
def test_side_by_side_the_results_are_the_same(tiny: Path, tmp_path: Path, threads: None) -> None:
    """Each run has one thread, and there are as many at a time as workers."""
    torch.set_num_threads(1)
    alone = ablate(tiny, tmp_path / "alone", "no_lrn")
    assert alone.returncode == 0, alone.stderr
    # More processes than cores, so that each has one thread on any machine.
    workers = available_cores() + 1
    together = run_here("net.ablations", "no_lrn", "--workers", workers, *flags(tiny, tmp_path / "together"))
    assert together.returncode == 0, together.stderr
    assert f"0 of them already done, {min(6, workers)} in parallel" in together.stdout
    assert "6/6  " in together.stdout
    assert results(tmp_path / "together") == results(tmp_path / "alone")
    _, rows = read_results(tmp_path / "together" / "results.jsonl")
    assert {row["device"] for row in rows} == {"CPU with 1 thread"}


def test_a_signal_stops_the_runs_side_by_side(tiny: Path, tmp_path: Path) -> None:
    # Wait for the first of 1000 updates, then send a signal to the command alone.
    tiny.write_text(TINY.replace("epochs = 1", "epochs = 1000").replace("max_steps = 2", "max_steps = 1000"))
    logs = [tmp_path / "killed" / f"{name}-seed0" / "log.txt" for name in ("baseline", "no_lrn")]

    def interrupt() -> None:
        until(lambda: all(log.exists() and "step 1/" in log.read_text() for log in logs))
        os.kill(os.getpid(), signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    stopped = run_here("net.ablations", "no_lrn", "--workers", 2, *flags(tiny, tmp_path / "killed"))
    other.join()
    assert (stopped.returncode, stopped.stderr) == (128 + signal.SIGINT, "")
    assert "stopped in baseline, seed 0" in stopped.stdout
    for log in logs:
        assert "SIGTERM: saved update" in log.read_text()
        assert list((log.parent / "checkpoints").glob("step_*.pt"))


def test_a_training_that_cannot_go_on_ends_all(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "no_lrn-seed0").mkdir(parents=True)
    (tmp_path / "a" / "no_lrn-seed0" / "checkpoints").write_text("in the way")
    done = run_here("net.ablations", "no_lrn", "--workers", 2, *flags(tiny, tmp_path / "a"))
    one_line(done, 1, "no_lrn-seed0/checkpoints")


def test_a_training_that_diverges_is_told_and_not_repeated(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(TINY + "lr = 1e30\n")
    done = ablate(tiny, tmp_path / "a", "no_dropout")
    assert done.returncode == 0, done.stderr
    assert "diverged" in done.stdout
    assert "| no dropout        | 0 " in done.stdout
    assert "6 of them already done" in ablate(tiny, tmp_path / "a", "no_dropout").stdout


def test_what_cannot_be_done_costs_one_line(tiny: Path, tmp_path: Path) -> None:
    one_line(ablate(tiny, tmp_path / "a", "no_lnr"), 2, "unknown ablation 'no_lnr'; did you mean no_lrn?")
    done = run_here("net.ablations", "--seeds", 2, "--output-dir", tmp_path / "a")
    one_line(done, 2, "--seeds must be at least 3; got 2")
    done = run_here("net.ablations", "--workers", 0, "--output-dir", tmp_path / "a")
    one_line(done, 2, "--workers must be at least 1; got 0")
    tiny.write_text("seed = 3\n")
    one_line(ablate(tiny, tmp_path / "a"), 2, "--baseline: ", "seed is set by net.ablations itself")
    tiny.write_text("epoch = 3\n")
    one_line(ablate(tiny, tmp_path / "a"), 2, "--baseline: ", "unknown flag 'epoch'; did you mean epochs?")
    (tmp_path / "file").write_text("")
    one_line(ablate(tiny, tmp_path / "file"), 1, "file is a file")
    assert not (tmp_path / "a").exists()
    for number, content in enumerate((b"", b"5\n", b"\xff\n", b'{"loss": 1}\n')):
        tiny.write_text(TINY)
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "results.jsonl").write_bytes(content)
        one_line(ablate(tiny, folder), 1, "results.jsonl is not a results file of net.ablations")


@pytest.mark.parametrize(("degrees", "value"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (29, 2.04523)])
def test_student_s_t(degrees: int, value: float) -> None:
    """Against published tables."""
    assert student_t(degrees) == pytest.approx(value, rel=1e-5)


def test_paired_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        # What a seed does to both networks cancels.
        both = generator.normal(40, 10, 5)
        change = paired(list(both + generator.normal(0.7, 1, 5)), list(both))
        assert change is not None
        assert change.interval is not None
        held += change.interval[0] <= 0.7 <= change.interval[1]
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_no_interval_leaves_what_is_possible() -> None:
    """With seeds that disagree as much as possible, and against the unclipped interval."""
    low = paired([0.0, 0.5, 9.0], [6.0, 6.0, 6.0])
    high = paired([90.0, 90.0, 50.0], [6.0, 6.0, 6.0])
    assert low is not None
    assert high is not None
    # t(2) = 4.303: -2.83 +- 4.303 * 5.058 / sqrt(3), and 70.67 +- 4.303 * 23.09 / sqrt(3).
    assert low.interval == pytest.approx((-6, 9.73), abs=0.01)
    assert high.interval == pytest.approx((13.30, 94), abs=0.01)
    two = paired([1.0, 3.0], [2.0, 2.0])
    assert two == Change(2, 0.0, None)
    assert paired([], []) is None


def test_intervals_of_an_error() -> None:
    # Log odds of 3.5, 6.5 and 8.5 in 101: mean -2.797, standard deviation 0.4814; +- 4.303 * 0.4814 / sqrt(3).
    assert error_interval([3.0, 6.0, 8.0], 100) == pytest.approx((1.811, 16.781), abs=0.001)
    for errors in ([0.0, 0.0, 100.0], [0.0, 1.0, 30.0], [99.0, 100.0, 60.0]):
        found = error_interval(errors, 100)
        assert found is not None
        assert 0 < found[0] < np.mean(errors) < found[1] < 100
    assert error_interval([1.0, 2.0], 100) is None


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-0.1, 1.1), "no clear difference"),
        ((0.1, 0.9), "worse"),
        ((-0.9, -0.1), "better"),
        (None, "fewer than three seeds"),
    ],
)
def test_verdicts(interval: tuple[float, float] | None, verdict: str) -> None:
    assert Change(5, 0.5, interval).verdict == verdict


def test_the_table_by_hand(tmp_path: Path) -> None:
    settings = {"network": "digits", "recipe": "digits", "epochs": 3, "batch_size": 32, "data": "some images"}
    settings |= {"train_images": 1000, "val_images": 200}
    machine = {"device": "CPU", "torch": "2.13", "commit": "abc", "date": "2026-01-01"}
    rows: list[dict[str, Any]] = [{"settings": settings}]
    errors = {"baseline": (3.0, 4.0, 5.0), "no_lrn": (5.0, 5.0, 8.0), "tanh": (3.0, 4.0, 5.5)}
    for name, values in errors.items():
        rows += [
            {"ablation": name, "seed": seed, "top1_error_percent": value, **machine}
            for seed, value in enumerate(values)
        ]
    rows += [{"ablation": "no_colour", "not_shown": "not shown by this data: its images are gray"}]
    rows += [{"ablation": "half", "seed": seed, "diverged": "loss", **machine} for seed in range(3)]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = ablation_report.report(path)
    assert {len(row) for row in report.rows} == {len(report.headers)}
    cells = {row[0]: row[1:] for row in report.rows}
    # Log odds of 6.5, 8.5 and 10.5 in 201: mean -3.139, standard deviation 0.2507; t(2) = 4.303.
    assert cells["the whole network"][:3] == ["3", "4.00", "2.27 to 7.47"]
    # Differences 2, 1 and 3: mean 2, standard deviation 1; +- 4.303 / sqrt(3).
    assert cells["no response normalization"][:2] == ["3", "6.00"]
    assert cells["no response normalization"][3:6] == ["+2.00", "-0.48 to +4.48", "no clear difference"]
    assert cells["no response normalization"][6:] == ["+1.4 / +1.2", "+1.37 / +1.15"]
    assert cells["tanh in place of ReLU"][3:5] == ["+0.17", "-0.55 to +0.88"]
    assert cells["no colour noise"][5] == "not shown by this data: its images are gray"
    assert cells["the half net"][:6] == ["0", "", "", "", "", "3 diverged"]
    text = ablation_report.table(path)
    assert "CPU, torch 2.13, commit abc, 2026-01-01: `some.jsonl`" in text
    assert "-0.48 to +4.48" in text


def test_the_figure_shows_what_its_text_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors on an axis of 0 to 100 %, changes on a linear axis; changes beyond it are written, not drawn."""
    errors = {"baseline": (5.0, 6.0, 7.0), "no_lrn": (90.0, 60.0, 90.0), "tanh": (4.0, 6.0, 5.0), "half": (9.0, 8.0)}
    settings = {"network": "digits", "epochs": 2, "data": "some images", "val_images": 200}
    rows = [
        {"ablation": name, "seed": seed, "top1_error_percent": value}
        for name, values in errors.items()
        for seed, value in enumerate(values)
    ]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"settings": settings}, *rows]))
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    assert ablation_report.picture(path) == ablation_report.picture(path)
    left, right = drawn[0].axes
    assert left.get_xlim() == (0, 100)
    assert (left.get_xscale(), right.get_xscale()) == ("linear", "linear")
    low, high = right.get_xlim()
    points = [float(x) for line in right.lines for x in np.atleast_1d(line.get_xdata())]
    assert all(low <= point <= high for point in points)
    assert [label.get_text() for label in left.get_yticklabels()] == [
        *("the whole network", "no response normalization", "the half net", "tanh in place of ReLU")
    ]
    written = [text.get_text() for text in right.texts]
    assert written == ["+74.0 (+30.9 to +94.0)"]
    assert "Worse: no response normalization +74.0" in ablation_report.alt(path)
    assert "Fewer than three seeds: the half net +3.0" in ablation_report.alt(path)
    assert "No clear difference: tanh in place of ReLU -1.0" in ablation_report.alt(path)


def test_held_out_images_are_named_as_what_errors_are_of(tmp_path: Path) -> None:
    """What is held out is neither trained on nor the validation images."""
    record = Path(__file__).parents[2] / "reports" / "data" / "ablations" / "2026-11-21-digits-6-epochs.jsonl"
    settings, *rows = record.read_text().splitlines()
    assert "1,442 training images and 355 validation images" in " ".join(ablation_report.table(record).split())
    changed = {"settings": {**json.loads(settings)["settings"], "hold_out": 442}}
    held = tmp_path / "results.jsonl"
    held.write_text("\n".join([json.dumps(changed), *rows]))
    assert "1,000 training images and 442 held-out images" in " ".join(ablation_report.table(held).split())
