"""The page of the paper's claims: its times follow from its record, its figures from what was published."""

import json
import math
import re

import numpy as np
from safetensors.torch import load_file

from net.ablations import AblationsConfig
from net.analysis.ablation_cases import ABLATIONS
from net.analysis.ablation_report import change_of
from net.analysis.published import PUBLISHED
from net.figures import colour_selectivity
from net.model.config import VARIANTS
from net.readers.metrics import read_results
from tests.commands import ROOT

SEEDS, NETWORKS = AblationsConfig().seeds, len(ABLATIONS) + 1
FALL_2011 = 15_000_000 / 1_281_167
REPORTS = ROOT / "reports"
PAGE = (REPORTS / "paper.md").read_text()
#: The page without its line breaks.
TEXT = " ".join(PAGE.split())
TRAINING = "data/trainings/2026-11-27-alexnet32/run.json"
FOUR_LAYERS = REPORTS / "data/ablations/2026-11-28-cifar10-4-layers.jsonl"


def test_modelled_times_follow_from_the_record() -> None:
    record = re.search(r"`(reports/data/[\w.-]+\.jsonl)`", PAGE)
    assert record is not None
    rows = [json.loads(line) for line in (ROOT / record[1]).read_text().splitlines()]
    rates = [row["images_per_s"] for row in rows if row["case"] == "update of paper"]
    assert f"{max(rates):,} images/s" in PAGE
    seconds = 90 * 1_281_167 / max(rates)
    assert f"take {seconds:,.0f} s" in TEXT
    if any(row["dirty"] for row in rows):
        assert f"with uncommitted changes on top of commit {rows[0]['commit']}" in TEXT
    for count, written in (
        (1, "**1 h 13 min, modelled**"),
        (5, "5 T = 6 h 6 min, modelled"),
        (2 * SEEDS, f"{2 * SEEDS} T = 7 h 19 min, modelled"),
        (SEEDS * NETWORKS, f"{NETWORKS} networks of three seeds, {SEEDS * NETWORKS} T = 2 days 10 h 32 min, modelled"),
        # Ninety epochs of a release of ImageNet are so many of 1,281,167 images, T each.
        (FALL_2011 + 1, "at least 15 h 30 min, modelled"),
        (2 * (FALL_2011 + 1) + 5, "at least 37 h 6 min, modelled"),
        (8_900_000 / 1_281_167, "at least 8 h 28 min, modelled"),
    ):
        assert written in TEXT
        minutes = round(count * seconds / 60)
        days, hours = divmod(minutes // 60, 24) if "days" in written else (0, minutes // 60)
        said = re.findall(r"(\d+) (days|h|min)\b", written)
        exact = {"days": days, "h": hours, "min": minutes % 60}
        assert all(int(number) == exact[unit] for number, unit in said), (written, exact)


def test_errors_are_the_published_ones() -> None:
    for row in PUBLISHED:
        digits = 1 if row.source.startswith("paper") else 2
        if row.variant != "half":
            assert f"{row.top1:.{digits}f} / {row.top5:.{digits}f}" in PAGE, row
    for item in ABLATIONS:
        for change in (item.paper, item.program):
            if change.startswith("+"):
                # There the change without the part, here that with it.
                assert change.replace("+", "-") in PAGE, item.name


def test_the_rate_of_preparing_is_of_photographs() -> None:
    (record,) = re.findall(r"`(data/[\w.-]+-cpu-[\w.-]+\.jsonl)`", PAGE.replace("`reports/", "`"))
    rows = [json.loads(line) for line in (REPORTS / record).read_text().splitlines()]
    (rate,) = [row["images_per_s"] for row in rows if row["case"] == "prepare photographs, pixels"]
    assert f"once; {rate:.0f} images/s per core, measured" in PAGE


def test_what_alexnet32_shows_is_the_record_s() -> None:
    one, ten = json.loads((REPORTS / TRAINING).read_text())["test"]
    assert (one["crops"], ten["crops"]) == (1, 10)
    assert f"({TRAINING})" in PAGE
    errors = [(run["top1_error_percent"], run["top5_error_percent"]) for run in (one, ten)]
    for crops, (top1, top5) in zip(("central crop", "ten crops"), errors, strict=True):
        assert f"| {crops} | {top1:.2f} / {top5:.2f} |" in PAGE
    assert "{:.2f} / {:.2f}".format(*(after - before for before, after in zip(*errors, strict=True))) in PAGE
    weights = load_file(ROOT / one["network"])["conv1.weight"].float().numpy()
    found = [colour_selectivity(tower).mean() for tower in np.split(weights, 2)]
    for page in (PAGE, (REPORTS / "README.md").read_text(), (REPORTS / "LOG.md").read_text()):
        assert "colour selectivity of {:.2f} and {:.2f}".format(*found) in " ".join(page.split())


def test_what_photographs_show_is_the_records() -> None:
    folder = (REPORTS / TRAINING).parent
    figures, codes = (json.loads((folder / name).read_text()) for name in ("figures.json", "hashing.json"))
    assert "labels {right} of {images} test images".format(**figures["predictions"]) in TEXT
    assert "{same_class_percent} % have its class".format(**figures["neighbours"]) in TEXT
    ours, random = (
        [100 * codes[name][f"recall_at_{count}"] for count in (10, 100)]
        for name in ("autoencoder", "random_hyperplanes")
    )
    assert "{:.1f} % are among the 10 nearest codes and {:.1f} % among the 100 nearest".format(*ours) in TEXT
    assert "with random hyperplanes {:.1f} and {:.1f} %".format(*random) in TEXT
    runs = [
        json.loads(line)
        for line in (REPORTS / "data/trainings/2026-11-27-alexnet32-6-epochs/runs.jsonl").read_text().splitlines()
    ]
    (apart,) = [run["colour_selectivity"] for run in runs if run["towers_differ"]]
    assert "two standard errors: {:.2f} and {:.2f}".format(*apart) in TEXT
    errors = {
        store: [run["top1_error_percent"] for run in runs if run["store"] == store] for store in ("pixels", "jpeg")
    }
    readme = " ".join((ROOT / "net" / "README.md").read_text().split())
    assert "two seeds err by {:.1f} and {:.1f} % from pixels".format(*errors["pixels"]) in readme
    assert "by {:.1f} and {:.1f} % from JPEG".format(*errors["jpeg"]) in readme


def test_transfer_is_the_record_s() -> None:
    lines = (REPORTS / "data/trainings/2026-11-27-transfer/runs.jsonl").read_text().splitlines()
    errors = {run["run"]: run["top1_error_percent"] for run in map(json.loads, lines)}
    for name, images in (("50", "50, 100"), ("500", "500, 30"), ("all", "4,500, 6")):
        scratch, transfer = errors[f"{name}-scratch"], errors[f"{name}-transfer"]
        assert f"| {images} epochs | {scratch:.2f} | {transfer:.2f} |" in PAGE


def test_figure_1_is_the_record_s() -> None:
    runs = [
        json.loads(line)
        for line in (REPORTS / "data/trainings/2026-11-27-figure-1/runs.jsonl").read_text().splitlines()
    ]
    fastest = {
        (activation, seed): min(
            run["epochs_to_target"]
            for run in runs
            if (run["activation"], run["seed"]) == (activation, seed) and run["epochs_to_target"] is not None
        )
        for activation in ("relu", "tanh")
        for seed in (0, 1)
    }
    for activation, name in (("relu", "ReLU"), ("tanh", "tanh")):
        assert "{} after {:.2f} and {:.2f} epochs".format(name, *(fastest[activation, seed] for seed in (0, 1))) in TEXT
    ratios = [fastest["tanh", seed] / fastest["relu", seed] for seed in (0, 1)]
    (ratio,) = {f"{ratio:.1f}" for ratio in ratios}
    assert f"a factor of {ratio} with both of two seeds" in TEXT


def test_figure_1_on_all_images_is_the_record_s() -> None:
    lines = (REPORTS / "data/trainings/2026-11-28-figure-1-50000/runs.jsonl").read_text().splitlines()
    relu, tanh = map(json.loads, lines)
    assert (relu["activation"], tanh["activation"]) == ("relu", "tanh")
    reached, stopped = relu["epochs_to_target"], tanh["stopped_after_epochs"]
    assert tanh["epochs_to_target"] is None
    assert min(tanh["errors"]) > 25 >= relu["errors"][-1]
    assert f"more than {int(10 * stopped / reached) / 10} on all 50,000 images" in TEXT
    assert f"ReLU after {reached} epochs at learning rate {relu['rate']}" in TEXT
    assert f"at {tanh['rate']}, errs by {tanh['error_percent']} % after {stopped} epochs" in TEXT


def test_normalization_in_the_4_layer_network_is_the_record_s() -> None:
    settings, rows = read_results(FOUR_LAYERS)
    found = change_of(rows, "no_lrn")
    assert found is not None
    assert found.interval is not None
    errors = {
        name: np.mean([row["top1_error_percent"] for row in rows if row["ablation"] == name])
        for name in ("no_lrn", "baseline")
    }
    assert "{no_lrn:.1f} -> {baseline:.1f} % of".format(**errors) in TEXT
    assert f"without it {found.mean:+.2f} points ({found.interval[0]:+.2f} to {found.interval[1]:+.2f}, " in TEXT
    trained = settings["train_images"] - settings["hold_out"]
    assert f"{settings['hold_out']:,} held-out images after {settings['epochs']} epochs of {trained:,} images" in TEXT
    lines = (REPORTS / "data/trainings/2026-11-28-cifar10-4-layers-rates/runs.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    for name in errors:
        best = min((run for run in runs if run["ablation"] == name), key=lambda run: run["top1_error_percent"])
        assert best["lr"] == settings["lr"]
    tried = sorted({run["lr"] for run in runs}, reverse=True)
    assert f"the best of {', '.join(map(str, tried))} for both" in TEXT


def test_the_network_s_size() -> None:
    layers = VARIANTS["paper"].layers()
    neurons = sum(math.prod(layer.output_shape) for layer in layers if layer.kind != "stage")
    assert f"{VARIANTS['paper'].parameters:,} parameters, {neurons:,} neurons" in PAGE


def test_what_each_part_is_worth_is_the_record_s() -> None:
    folder = ROOT / "reports" / "data" / "ablations"
    photographs, digits = folder / "2026-11-27-cifar10-20-epochs.jsonl", folder / "2026-11-21-digits-6-epochs.jsonl"
    assert {photographs, digits, FOUR_LAYERS} == set(folder.glob("*.jsonl"))
    lines = PAGE[PAGE.index("## What each part") : PAGE.index("## CIFAR-10")].splitlines()
    for record in (photographs, digits):
        settings, rows = read_results(record)
        for ablation in ABLATIONS:
            line = next(line for line in lines if line.startswith("|") and f"`{ablation.name}`" in line.split("|")[1])
            found = change_of(rows, ablation.name)
            if found is None:
                assert record == photographs or "not shown by this data" in line
                continue
            interval = f" ({found.interval[0]:+.2f} to {found.interval[1]:+.2f})" if found.interval else ""
            assert f"{found.mean:+.2f}{interval}, {found.verdict}" in line
    assert (settings["data"], settings["epochs"]) == ("the embedded digits", 6)
    settings, _ = read_results(photographs)
    trained = settings["train_images"] - settings["hold_out"]
    assert f"{trained:,} images of CIFAR-10 re-encoded as JPEG, {settings['epochs']} epochs" in TEXT
    assert f"judged on {settings['hold_out']:,} held-out images" in TEXT
    assert "after {} and {}".format(*settings["lr_milestones"]) in TEXT
