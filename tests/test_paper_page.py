"""The page of the paper's claims: its times follow from its record, its figures from what was published."""

import json
import re

from net.ablations import ABLATIONS
from net.published import PUBLISHED
from tests.commands import ROOT

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
        (8, "8 T =\n9 h 45 min, modelled"),
        (4 * (len(ABLATIONS) + 1), f"{4 * (len(ABLATIONS) + 1)} T\n= 3 days 6 h 3 min, modelled"),
    ):
        assert written in PAGE
        minutes = round(count * seconds / 60)
        days, hours = divmod(minutes // 60, 24)
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
