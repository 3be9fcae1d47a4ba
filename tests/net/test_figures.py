"""The figures' numbers against independent computations, the files, and errors."""

import dataclasses
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from net.analysis import drawings
from net.analysis.activations import Curve, Results, crossing, fastest, outcome, train
from net.data import digits
from net.data.config import SHAPES
from net.data.images import ImageData, Split, short_name, statistics
from net.data.sources import open_data
from net.figures import colour_selectivity
from net.model.alexnet import alexnet
from net.training import checkpoint, curve
from tests.commands import ROOT, one_line, run_here


def colours_of(path: Path) -> tuple[tuple[int, int], bool]:
    """The size of a PNG on white, and whether it has any colour."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert (pixels[0] == 255).all()
    assert (pixels[-1] == 255).all()
    assert path.stat().st_size < 150_000
    return pixels.shape[:2], bool((pixels.max(2) - pixels.min(2) > 60).any())


def test_the_curve_names_the_data_as_the_other_figures_do(
    shapes_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles, figure = [], curve.figure

    def noted(rows: Any, title: str, judged_by: str) -> Figure:
        titles.append(title)
        return figure(rows, title, judged_by)

    monkeypatch.setattr(curve, "figure", noted)
    done = run_here("net.train", "--resume", shutil.copytree(shapes_run, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert titles == ["digits on synthetic shapes"]


def test_colour_selectivity_of_known_kernels() -> None:
    generator = np.random.default_rng(0)
    gray = np.repeat(generator.standard_normal((1, 1, 5, 5)), 3, axis=1)
    red_against_green = np.stack([gray[:, 0], -gray[:, 0], 0 * gray[:, 0]], 1)
    red = np.stack([gray[:, 0], 0 * gray[:, 0], 0 * gray[:, 0]], 1)
    found = colour_selectivity(np.concatenate([gray, red_against_green, red, 0 * red]).astype(np.float32))
    assert found == pytest.approx([0, 1, 2 / 3, 0], abs=1e-6)
    random = generator.standard_normal((200, 3, 11, 11)).astype(np.float32)
    assert colour_selectivity(random).mean() == pytest.approx(2 / 3, abs=0.01)


def test_filters_tower_by_tower(shapes_run: Path, tmp_path: Path) -> None:
    done = run_here("net.figures", "filters", shapes_run)
    assert done.returncode == 0, done.stderr
    assert f"written to {shapes_run / 'filters.png'}" in done.stdout
    assert colours_of(shapes_run / "filters.png")[1]
    found = checkpoint.newest(shapes_run / "checkpoints")
    assert found is not None
    kernels = found[1]["model"]["conv1.weight"].double()
    for number, tower in enumerate(kernels.chunk(2), 1):
        gray = tower.sum(1) / 3
        share = 1 - 3 * gray.square().sum((1, 2)) / tower.square().sum((1, 2, 3))
        assert f"tower {number}: colour selectivity {share.mean():.2f} on average, {share.min():.2f} to" in done.stdout
    assert "gray" not in done.stdout.splitlines()[-1]


def save(path: Path, **fields: object) -> Path:
    """Save a checkpoint of an untrained network, as from a run on the embedded digits."""
    model = alexnet("digits", **fields)
    data = digits.load()
    classes = list(data.classes)[: model.config.classes]
    metadata = {"network": model.config.to_dict(), "classes": classes, "data_path": None}
    mean = torch.from_numpy(data.mean)
    checkpoint.save(path, {"model": dict(model.state_dict()), "metadata": metadata, "mean_image": mean})
    return path


def test_gray_images_and_gray_networks(tmp_path: Path) -> None:
    done = run_here("net.figures", "filters", save(tmp_path / "digits.pt"), "--output", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert "training images are gray" in done.stdout
    assert short_name(None, tuple("0123456789")) == "embedded digits"
    for path in ("some/cats", "cats.packed", "cats.32x32.packed"):
        assert short_name(path, ("a", "b")) == "cats"
    assert short_name("x.packed", SHAPES) == "synthetic shapes"
    one = save(tmp_path / "one.pt", towers=1)
    assert "all kernels: colour" in run_here("net.figures", "filters", one, "--output", tmp_path / "b.png").stdout
    gray = save(tmp_path / "gray.pt", image_channels=1)
    done = run_here("net.figures", "filters", gray, "--output", tmp_path / "c.png")
    one_line(done, 1, "gray.pt: its first layer, conv1, reads 1 channels; Figure 3 needs a network that reads RGB")
    assert not (tmp_path / "c.png").exists()


def test_filters_of_several_networks(tmp_path: Path) -> None:
    """Random towers do not differ; a gray one does from a random one."""
    alike, apart = save(tmp_path / "alike.pt"), save(tmp_path / "apart.pt")
    state = checkpoint.load(apart)
    conv1 = state["model"]["conv1.weight"]
    half = len(conv1) // 2
    conv1[:half] = conv1[:half].mean(1, keepdim=True)
    checkpoint.save(apart, state)
    done = run_here("net.figures", "filters", alike, apart, "--output", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert f"{apart}, tower 1: colour selectivity 0.00 on average, 0.00 to 0.00" in done.stdout
    assert "the towers' averages differ by more than two standard errors in 1 of 2 networks" in done.stdout
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height
    other = save(tmp_path / "other.pt", towers=1)
    done = run_here("net.figures", "filters", alike, other, "--output", tmp_path / "b.png")
    one_line(done, 1, f"{other} and {alike} differ in towers or in the shape of conv1's kernels")


def test_predictions(shapes_run: Path, tmp_path: Path) -> None:
    done = run_here("net.figures", "predictions", shapes_run, "--output", tmp_path / "p.png")
    assert done.returncode == 0, done.stderr
    assert re.search(r"top-1 is correct for \d of these 8 validation images", done.stdout)
    assert colours_of(tmp_path / "p.png")[1]
    again = run_here("net.figures", "predictions", shapes_run, "--output", tmp_path / "q.png")
    assert again.returncode == 0
    assert (tmp_path / "p.png").read_bytes() == (tmp_path / "q.png").read_bytes()


def test_bars_are_red_for_the_true_label_alone(tmp_path: Path) -> None:
    def reds(truth: str) -> int:
        likely = [[("cat", 0.5), ("dog", 0.3), ("sheep", 0.2)]]
        drawings.predictions(tmp_path / "p.png", "", np.full((1, 9, 9, 3), 255, np.uint8), [truth], likely)
        with Image.open(tmp_path / "p.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        return int((abs(pixels - [0xE8, 0x68, 0x6A]).max(2) < 8).sum())

    cat, dog, neither = reds("cat"), reds("dog"), reds("horse")
    assert neither == 0
    assert 1.2 < cat / dog < 2.2, "a bar is as long as the label is probable"


def test_fewer_than_five_classes(tmp_path: Path) -> None:
    few = save(tmp_path / "few.pt", classes=3, image_size=28)
    for figure in ("predictions", "neighbours"):
        output = tmp_path / f"{figure}.png"
        done = run_here("net.figures", figure, few, "--data-path", "synthetic:40", "--output", output)
        assert done.returncode == 0, done.stderr
        colours_of(output)


def test_neighbours_by_features(shapes_run: Path) -> None:
    done = run_here("net.figures", "neighbours", shapes_run)
    assert done.returncode == 0, done.stderr
    assert colours_of(shapes_run / "neighbours.png")[1]
    found = checkpoint.newest(shapes_run / "checkpoints")
    assert found is not None
    model = alexnet("digits", classes=len(SHAPES), image_size=28).eval()
    model.load_state_dict(found[1]["model"])
    data = open_data(found[1]["metadata"]["data_path"], image_size=28, classes=len(SHAPES))
    assert (data.classes, data.short_name) == (SHAPES, "synthetic shapes")
    with torch.no_grad():
        val, train = (
            model.features(torch.from_numpy((split.images - data.mean)[:, 2:30, 2:30]).permute(0, 3, 1, 2)).numpy()
            for split in (data.val, data.train)
        )
    order = ((val[:, None] - train[None]) ** 2).sum(2).argsort(1)[:, :6]
    same = (data.train.labels[order] == data.val.labels[:, None]).mean()
    (percent,) = re.findall(r"([\d.]+) % of the 6 nearest training images", done.stdout)
    assert float(percent) == pytest.approx(100 * same, abs=0.5)


def test_where_a_curve_crosses_the_target() -> None:
    assert crossing([1, 2, 3], [90, 50, 10]) == pytest.approx(2 + 25 / 40)
    assert crossing([0.5], [20]) == 0.5
    assert crossing([1, 2], [90, 25]) == 2
    assert crossing([1, 2], [90, 26]) is None


@pytest.mark.slow
def test_relu_against_tanh(shapes_run: Path, tmp_path: Path) -> None:
    store = shapes_run.parent / "shapes.32x32.packed"
    flags = ("--data-path", store, "--rates", 0.01, 0.003, "-b", 24, "--max-epochs", 1)
    done = run_here("net.figures", "activations", *flags, "--output", tmp_path / "deep" / "a.png")
    assert done.returncode == 0, done.stderr
    assert "(synthetic shapes); the paper used CIFAR-10" in done.stdout
    assert re.findall(r"(relu|tanh) at learning rate (\S+), seed 0:", done.stdout) == [
        ("relu", "0.01"),
        ("relu", "0.003"),
        ("tanh", "0.01"),
        ("tanh", "0.003"),
    ]
    assert "ReLU did not reach 25 % in 1 epochs" in done.stdout
    assert "relu was fastest at an end of --rates" in done.stdout
    colours_of(tmp_path / "deep" / "a.png")
    again = run_here("net.figures", "activations", *flags, "--output", tmp_path / "deep" / "a.png")
    assert again.stdout.count(f"(from {tmp_path / 'deep' / 'a.curves.jsonl'})") == 4
    assert again.stdout.splitlines()[-2:] == done.stdout.splitlines()[-2:]


def dark_and_bright() -> ImageData:
    """Guessing has an error of a half, and learning takes a few updates."""
    labels = np.arange(16) % 2
    images = np.random.default_rng(0).integers(0, 100, (16, 32, 32, 3)) + 150 * labels[:, None, None, None]
    split = Split(images.astype(np.uint8), labels)
    return ImageData("x", split, split, ("dark", "bright"), *statistics(split.images))


def test_a_training_ends_at_the_target(tmp_path: Path) -> None:
    data = dark_and_bright()
    settings = {"batch_size": 8, "seed": 0, "device": torch.device("cpu")}
    curve = train(data, "relu", 0.001, max_epochs=12, **settings)
    assert curve.reached is not None
    assert curve.errors[-1] <= 25 < curve.errors[:-1].min()
    assert curve.epochs == pytest.approx(np.arange(1, len(curve.epochs) + 1) / 2)
    assert curve.epochs[-2] < curve.reached <= curve.epochs[-1] < 12
    assert train(data, "relu", 0.001, max_epochs=curve.epochs[-2], **settings).reached is None
    best = fastest(data, "relu", [1e-9, 0.001], max_epochs=12, results=Results(tmp_path / "r", data, 8), **settings)
    assert (best.rate, best.reached) == (0.001, curve.reached)


def test_finished_trainings_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dark_and_bright()
    trained = []

    def counted(data: ImageData, activation: Any, rate: float, *, max_epochs: float, seed: int, **rest: Any) -> Curve:
        trained.append((activation, rate, max_epochs, seed))
        return train(data, activation, rate, max_epochs=max_epochs, seed=seed, **rest)

    monkeypatch.setattr("net.analysis.activations.train", counted)

    def search(rates: Sequence[float], max_epochs: int, batch_size: int = 8, **changed: Any) -> list[Any]:
        trained.clear()
        fastest(
            data,
            changed.get("activation", "relu"),
            rates,
            max_epochs=max_epochs,
            batch_size=batch_size,
            seed=changed.get("seed", 0),
            device=torch.device("cpu"),
            results=Results(tmp_path / "curves.jsonl", data, batch_size),
        )
        return list(trained)

    assert search([0.001, 1e-9], 12)[0] == ("relu", 0.001, 12.0, 0)
    found = Results(tmp_path / "curves.jsonl", data, 8)
    first, slow = found.find("relu", 0.001, 0, 12), found.find("relu", 1e-9, 0, 1)
    assert first is not None
    assert slow is not None
    assert (first.reached is not None, slow.reached) == (True, None)
    direct = train(data, "relu", 0.001, max_epochs=12, batch_size=8, seed=0, device=torch.device("cpu"))
    assert first.epochs.tolist() == direct.epochs.tolist()
    assert first.errors.tolist() == direct.errors.tolist()
    # 12 epochs are no limit to one that reached the target. The other was stopped with the first.
    assert search([0.001, 1e-9], 30) == []
    assert search([1e-9], 13) == [("relu", 1e-9, 13.0, 0)]
    assert search([1e-9], 13) == search([1e-9], 12) == []
    # Another activation, seed, batch size or data set is another training.
    for changed in ({"activation": "tanh"}, {"seed": 1}, {"batch_size": 4}):
        assert len(search([0.001], 1, **changed)) == 1
    data = dataclasses.replace(data, path="y")
    assert len(search([0.001], 1)) == 1
    # A write that was interrupted leaves a truncated last line.
    with open(tmp_path / "curves.jsonl", "a") as file:
        file.write('{"activation": "relu", "rate"')
    assert search([0.001], 1) == []
    assert len(search([0.001], 1, seed=2)) == 1
    assert search([0.001], 1, seed=2) == []


def test_the_outcome_of_figure_1() -> None:
    def curves(*reached: float | None) -> list[Curve]:
        return [Curve("relu", 0.1, seed, np.zeros(0), np.zeros(0), time) for seed, time in enumerate(reached)]

    assert outcome(curves(2.0), curves(12.5), 60) == ("to 25 %: ReLU 2.00 epochs; tanh 12.50; ratio 6.2 (paper: 6)")
    assert "ReLU 2.00, 3.00 epochs; tanh 4.00, 3.30; ratio 1.1 to 2.0 (" in outcome(curves(2, 3), curves(4, 3.3), 60)
    assert "tanh 4.00, more than 60; ratio more than 2.0 (" in outcome(curves(2, 3), curves(4, None), 60)
    assert outcome(curves(2, None), curves(4, 5), 60) == "ReLU did not reach 25 % in 60 epochs: no ratio"


def test_what_cannot_be_drawn_costs_one_line(shapes_run: Path, tmp_path: Path) -> None:
    larger, few = save(tmp_path / "larger.pt"), save(tmp_path / "few.pt", classes=3, image_size=28)
    for status, says, *arguments in (
        (2, "invalid choice: 'kernels'", "kernels"),
        (2, "--output must end in .png; got x.jpg", "filters", shapes_run, "--output", "x.jpg"),
        (1, "nowhere does not exist", "filters", tmp_path / "nowhere"),
        (1, "was trained on stored images of 32x32, but", "predictions", larger, "--data-path", "synthetic:20"),
        (1, "the classes of synthetic:20 differ", "neighbours", shapes_run, "--data-path", "synthetic:20"),
        (
            1,
            "shows 6 neighbours; got 5 training images in synthetic:5",
            "neighbours",
            few,
            "--data-path",
            "synthetic:5",
        ),
        (2, "--rates must be more than 0; got -1.0", "activations", "--rates", -1),
        (2, "--batch-size 5000 is more than the 1442 training images", "activations", "-b", 5000),
    ):
        one_line(run_here("net.figures", *arguments), status, says)
    without = run_here("net.figures")
    assert (without.returncode, without.stdout) == (2, "")
    assert "Figure 3" in without.stderr


def test_the_committed_figures_are_small_and_listed() -> None:
    listed = (ROOT / "reports" / "README.md").read_text()
    figures = sorted((ROOT / "reports" / "figures").glob("*_*.png"))
    assert len(figures) >= 8
    for path in figures:
        colours_of(path)
        assert f"figures/{path.name}" in listed


def test_names_of_classes_are_text_and_no_formulas(tmp_path: Path) -> None:
    """Between dollar signs matplotlib parses TeX, and raises if it is invalid."""
    names = ["a$b^$", "cat\x1b[2J\nnewline"]
    images = np.zeros((2, 8, 8, 3), np.uint8)
    drawings.predictions(tmp_path / "a.png", "title $\\frac$", images, names, [[(name, 0.5) for name in names]] * 2)
    drawings.neighbours(tmp_path / "b.png", "title", images, names, images[:, None], [[name] for name in names])
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert (tmp_path / "b.png").stat().st_size > 1000
