"""The synthetic shapes: how the classes differ, the folder, and that a network learns them."""

import colorsys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from net.data.config import SHAPES
from net.data.rendering import render
from net.training import runs
from tests.commands import one_line, run_here, start

SMALL = ("--train", 3, "--val", 2, "--size", 24)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_depends_on_the_seed_alone(tmp_path: Path) -> None:
    for name, flags in (("one", ("-j", 1)), ("two", ("-j", 2)), ("other", ("--seed", 1))):
        done = run_here("net.data.shapes", tmp_path / name, *SMALL, *flags)
        assert done.returncode == 0, done.stderr
        assert "rendered 60 synthetic images of 12 classes" in done.stdout
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "two"]
    assert one == two
    assert one.keys() == other.keys()
    assert len({*one.values(), *other.values()}) == 120, "every image is another one"
    assert sum(name.startswith("train/red_striped_disc/") for name in one) == 3
    with Image.open(tmp_path / "one" / "val" / "blue_chequered_triangle" / "00001.jpg") as picture:
        assert (picture.format, picture.size, picture.mode) == ("JPEG", (24, 24), "RGB")


@pytest.fixture(scope="module")
def samples() -> np.ndarray:  # type: ignore[type-arg]
    """Thirty images of each class: float64 [classes, 30, 48, 48, 3]."""
    return np.stack([[render(label, 48, (9, number)) for number in range(30)] for label in range(len(SHAPES))]) / 255.0


def test_only_colours_tell_the_colours_apart(samples: np.ndarray) -> None:  # type: ignore[type-arg]
    """The image's centre lies in the shape: its hue depends on the class, its brightness does not."""
    middle = samples[:, :, 20:28, 20:28].mean((2, 3))
    hues = {"red": 0.0, "green": 1 / 3, "blue": 2 / 3}
    brightness: dict[str, list[float]] = {colour: [] for colour in hues}
    for name, pixels in zip(SHAPES, middle, strict=True):
        colour = name.split("_")[0]
        for pixel in pixels:
            away = abs(colorsys.rgb_to_hsv(*pixel)[0] - hues[colour])
            assert min(away, 1 - away) < 0.12, (name, pixel)
            brightness[colour].append(float(pixel @ [0.299, 0.587, 0.114]))
    means = [np.mean(values) for values in brightness.values()]
    assert max(means) - min(means) < 0.02
    assert min(np.std(values) for values in brightness.values()) > 0.02


def test_textures_and_shapes_differ(samples: np.ndarray) -> None:  # type: ignore[type-arg]
    """Stripes are straight: along some direction nothing changes. Discs are equally wide in every direction."""
    gray = samples @ [0.299, 0.587, 0.114]
    patches = gray[:, :, 18:30, 18:30]
    down, across = np.gradient(patches, axis=(2, 3))
    tensor = np.array([[(a * b).mean((2, 3)) for b in (down, across)] for a in (down, across)])
    weakest, strongest = np.moveaxis(np.linalg.eigvalsh(np.moveaxis(tensor, (0, 1), (2, 3))), 2, 0)
    straight = (1 - weakest / strongest).mean(1)
    striped = np.array(["striped" in name for name in SHAPES])
    assert straight[striped].min() > straight[~striped].max() + 0.3


def test_discs_fill_their_circle_and_triangles_do_not(samples: np.ndarray) -> None:  # type: ignore[type-arg]
    """Fraction of the smallest enclosing circle in the class's colour: 1, except for noise, and 0.41 for a triangle."""
    angles = {"red": 0.0, "green": 2 * np.pi / 3, "blue": -2 * np.pi / 3}
    for name, images in zip(SHAPES, samples, strict=True):
        angle, filled = angles[name.split("_")[0]], []
        for pixels in images:
            red, green, blue = np.moveaxis(pixels, 2, 0)
            away = np.angle(np.exp(1j * (np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) - angle)))
            inside = (np.abs(away) < 0.7) & (pixels.max(2) - pixels.min(2) > 0.3 * pixels.max(2))
            rows, columns = np.nonzero(inside)
            radius = np.quantile(np.hypot(rows - rows.mean(), columns - columns.mean()), 0.99)
            filled.append(inside.sum() / (np.pi * radius**2))
        disc = name.endswith("disc")
        assert (np.median(filled) > 0.65) == disc, (name, np.median(filled))


def test_what_cannot_be_rendered_costs_one_line(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    one_line(run_here("net.data.shapes", tmp_path / "full", *SMALL), 1, "full is there already")
    one_line(run_here("net.data.shapes", tmp_path / "full" / "x", *SMALL), 1, "x is there already")
    one_line(run_here("net.data.shapes", tmp_path / "new", "--train", 0), 2, "--train must be at least 1; got 0")
    one_line(run_here("net.data.shapes", tmp_path / "new", "--size", 4), 2, "--size must be at least 8; got 4")
    (tmp_path / "empty").mkdir()
    assert run_here("net.data.shapes", tmp_path / "empty", *SMALL).returncode == 0
    done = run_here("net.data.shapes", tmp_path / "my shapes", *SMALL)
    assert f"net.train --data-path '{tmp_path}/my shapes' --network" in done.stdout, "as a shell takes it"


def test_stopped_it_leaves_nothing(tmp_path: Path) -> None:
    process = start("net.data.shapes", tmp_path / "shapes", "--train", 20_000)
    deadline = time.monotonic() + 200
    while not list(tmp_path.rglob("*.jpg")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=200)
    assert (process.returncode, errors) == (143, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_network_learns_them(tmp_path: Path) -> None:
    """With the flags that the command prints."""
    assert run_here("net.data.shapes", tmp_path / "shapes").returncode == 0
    done = run_here(
        "net.train", "--data-path", tmp_path / "shapes", "--network", "digits", "--image-size", 32,
        "--epochs", 10, "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "12 classes, synthetic" in done.stdout
    assert runs.read_metrics(tmp_path / "run")[-1]["top1_error_percent"] < 30
