"""Published errors shown for comparison: the right ones, and only where they apply."""

import json
import re
from pathlib import Path

import pytest
import torch

from net.analysis.published import is_ilsvrc, published
from net.model.alexnet import alexnet
from net.training import checkpoint
from tests.commands import run_here

WORDNET = tuple(f"n{1440764 + number:08d}" for number in range(1000))


def test_which_networks_are_compared_with_which() -> None:
    def pairs(variants: list[str], crops: int) -> list[tuple[str, float, float]]:
        return [(row.data, row.top1, row.top5) for row in published(variants, crops)]

    assert ("2012 validation", 40.7, 18.2) in pairs(["paper"], 10)
    assert {data for data, _, _ in pairs(["paper"], 1)} == {"2010 test"}
    assert pairs(["paper"] * 5, 10) == [("2012 validation", 38.1, 16.4)]
    assert pairs(["paper"] * 4, 10) == []
    assert pairs(["sixth_conv"], 10) == [("2012 validation", 39.0, 16.6)]
    assert pairs(["half"], 1) == []


def test_the_effects_in_the_paper_follow_from_the_program_s_nets() -> None:
    """Section 3.2: the half net is worse by 1.7 % and 1.2 %."""
    (half,) = published(["half"], 10)
    (whole,) = [row for row in published(["paper"], 10) if (row.source, row.data) == ("program", half.data)]
    assert (round(half.top1 - whole.top1, 1), round(half.top5 - whole.top5, 1)) == (1.7, 1.2)


def test_only_a_thousand_of_wordnet_s_classes_are_ilsvrc() -> None:
    assert is_ilsvrc(WORDNET)
    assert not is_ilsvrc(WORDNET[:-1])
    assert not is_ilsvrc(tuple(str(number) for number in range(1000)))


def test_evaluate_prints_them_beside_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = alexnet("digits", classes=1000)
    metadata = {
        "network": model.config.to_dict(),
        "classes": [str(number) for number in range(1000)],
        "data_path": "synthetic:80",
    }
    state = {"model": dict(model.state_dict()), "metadata": metadata, "mean_image": torch.zeros(37, 37, 3)}
    path = checkpoint.path_of(tmp_path / "checkpoints", 1)
    checkpoint.save(path, state)

    def lines() -> list[str]:
        done = run_here("net.evaluate", path, *[path] * 4)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert not any("published" in line or "paper" in line for line in lines())
    # The classes of random images have numbers as names.
    monkeypatch.setattr("net.analysis.published._WORDNET", re.compile(r"\d+"))
    shown = [line for line in lines() if " %  " in line]
    assert len(shown) == 12
    assert "paper 39.0 / 18.3 (2010 test); program 39.0 / 18.3 (2010 test)" in shown[0]
    assert "paper" not in shown[5]
    assert "paper 40.7 / 18.2 (2012 validation)" in shown[6]
    assert shown[11].endswith("paper 38.1 / 16.4 (2012 validation)")
    rows = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert [item["top1"] for item in rows[11]["published"]] == [38.1]
