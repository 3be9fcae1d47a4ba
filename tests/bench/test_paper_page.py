"""The page of the paper's claims: its times follow from its record, its figures from what was published."""

import json
import math
import re

from net.ablations import AblationsConfig
from net.analysis.ablation_cases import ABLATIONS
from net.analysis.ablation_report import change_of
from net.analysis.published import PUBLISHED
from net.doors.metrics import read_results
from net.model.config import VARIANTS
from tests.commands import ROOT

SEEDS, NETWORKS = AblationsConfig().seeds, len(ABLATIONS) + 1
FALL_2011 = 15_000_000 / 1_281_167
PAGE = (ROOT / "reports" / "paper.md").read_text()


def test_modelled_times_follow_from_the_record() -> None:
    record = re.search(r"`(reports/data/[\w.-]+\.jsonl)`", PAGE)
    assert record is not None
    rows = [json.loads(line) for line in (ROOT / record[1]).read_text().splitlines()]
    rates = [row["images_per_s"] for row in rows if row["case"] == "update of paper"]
    assert f"{max(rates):,} images/s" in PAGE
    seconds = 90 * 1_281_167 / max(rates)
    assert f"take {seconds:,.0f} s" in PAGE
    for count, written in (
        (1, "**1 h 13 min, modelled**"),
        (5, "5 T = 6 h 6 min, modelled"),
        (2 * SEEDS, f"{2 * SEEDS} T =\n7 h 19 min, modelled"),
        (SEEDS * NETWORKS, f"{NETWORKS} networks of three seeds, {SEEDS * NETWORKS} T\n= 2 days 10 h 32 min, modelled"),
        # Ninety epochs of a release of ImageNet are so many of 1,281,167 images, T each.
        (FALL_2011 + 1, "at least 15 h 30 min, modelled"),
        (2 * (FALL_2011 + 1) + 5, "at least 37 h 6 min, modelled"),
        (8_900_000 / 1_281_167, "at least 8 h 28 min, modelled"),
    ):
        assert written in PAGE
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


def test_the_network_s_size() -> None:
    layers = VARIANTS["paper"].layers()
    neurons = sum(math.prod(layer.output_shape) for layer in layers if layer.kind != "stage")
    assert f"{VARIANTS['paper'].parameters:,} parameters, {neurons:,} neurons" in PAGE


def test_what_each_part_is_worth_is_the_record_s() -> None:
    (record,) = (ROOT / "reports" / "data" / "ablations").glob("*.jsonl")
    settings, rows = read_results(record)
    assert (settings["data"], settings["epochs"]) == ("the embedded digits", 6)
    lines = PAGE[PAGE.index("## What each part") : PAGE.index("## CIFAR-10")].splitlines()
    for ablation in ABLATIONS:
        line = next(line for line in lines if line.startswith("|") and f"`{ablation.name}`" in line.split("|")[1])
        found = change_of(rows, ablation.name)
        if found is None:
            assert "not shown by this data" in line
            continue
        interval = f" ({found.interval[0]:+.2f} to {found.interval[1]:+.2f})" if found.interval else ""
        assert f"{found.mean:+.2f}{interval}, {found.verdict}" in line
