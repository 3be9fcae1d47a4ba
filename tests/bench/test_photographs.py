"""Stores of photographs: sizes, and what is left out or refused."""

from pathlib import Path

import numpy as np
import pytest

from bench import photographs
from bench.subjects import stores
from net.readers.image import encode_jpeg
from tests.commands import one_line, run_here
from tests.pictures import image_folder


def test_a_store_has_every_image_at_its_place(tmp_path: Path) -> None:
    split = stores.pixels(tmp_path / "images.npy", 5, 4)
    assert [set(np.unique(image)) for image in split.images] == [{0}, {1}, {2}, {3}, {4}]
    flat = [np.full((8, 8, 3), value, np.uint8) for value in (10, 200, 90)]
    images = stores.jpegs(tmp_path / "images.jpegs", [encode_jpeg(image, 90) for image in flat], 8)
    assert [round(float(images[number].mean())) for number in range(3)] == [10, 200, 90]


def test_rows_are_of_the_images_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SIZE", 16), ("TURNS", 1), ("QUALITIES", (photographs.JPEG_QUALITY,))):
        monkeypatch.setattr(photographs, name, value)
    image_folder(tmp_path, 2, 1)
    first = min((tmp_path / "train").rglob("*.jpg"))
    first.write_bytes(b"no image")
    done = run_here("bench.photographs", tmp_path, "--images", "4")
    assert done.returncode == 0, done.stderr
    assert "photographs, pixels                              0.77 KB, ImageNet   1.0 GB\n" in done.stdout
    # Four are asked for, of which three can be read.
    found = photographs.rows(tmp_path, 4)
    assert {row["photographs"] for row in found} == {3}
    sizes = {row["case"]: row["kb_per_image"] for row in found if "kb_per_image" in row}
    assert sizes["photographs, pixels"] == round(16 * 16 * 3 / 1e3, 2)
    assert sizes["photographs, JPEG of quality 80"] > 0
    assert sum("images_per_s" in row for row in found) == 5
    # The first of them is the damaged one.
    one_line(run_here("bench.photographs", tmp_path, "--images", "1"), 1, "none of the first 1 training images")


def test_refusals(tmp_path: Path) -> None:
    one_line(run_here("bench.photographs", tmp_path / "missing"), 1, "missing does not exist")
    one_line(run_here("bench.photographs", tmp_path), 1, "has no folder train")
    (tmp_path / "a.tar").write_bytes(b"")
    one_line(run_here("bench.photographs", tmp_path / "a.tar"), 1, "a.tar is no folder; extract an archive first")
    one_line(run_here("bench.photographs", tmp_path, "--images", "0"), 2, "--images must be at least 1; got 0")
    one_line(run_here("bench.contention", "--images", "0"), 2, "--images must be at least 1; got 0")
