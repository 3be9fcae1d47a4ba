"""From JPEG files to an evaluated network, through the commands."""

import json
import time
from pathlib import Path

import pytest

from net.training import runs
from tests.commands import one_line, run_here, start, wait_for
from tests.pictures import image_folder

TRAIN = (
    "--network", "digits", "--image-size", 20, "--recipe", "paper", "-b", 30, "--epochs", 9, "--seed", 4,
)  # fmt: skip


def test_images_to_an_evaluated_network(tmp_path: Path) -> None:
    """270 JPEG files: prepare, train, SIGKILL, resume, evaluate, and average with an earlier state of the run."""
    images = image_folder(tmp_path / "images", train=80, val=10)
    assert len(list(images.rglob("*.jpg"))) == 270
    done = run_here("net.prepare", images, tmp_path / "store", "--size", 24)
    assert done.returncode == 0, done.stderr
    assert "packed 240 training and 30 validation images" in done.stdout
    arguments = ["--data-path", tmp_path / "store", *TRAIN, "--checkpoint-every", 9, "--log-every", 6]
    process = start("net.train", *arguments, "--output-dir", tmp_path / "killed")
    wait_for(process, "step 18/72")
    time.sleep(0.2)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    resumed = run_here("net.train", "--resume", tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    earlier = tmp_path / "killed" / "checkpoints" / "step_00000063.pt"
    evaluated = run_here("net.evaluate", tmp_path / "killed", earlier)
    assert evaluated.returncode == 0, evaluated.stderr
    results = json.loads((tmp_path / "killed" / "evaluation.json").read_text())["results"]
    assert [row["crops"] for row in results] == [1, 1, 1, 10, 10, 10]
    assert {row["images"] for row in results} == {30}
    # Guessing has an error of two thirds.
    assert results[0]["top1_error_percent"] < 45
    assert results[0]["top1_error_percent"] == pytest.approx(
        runs.read_metrics(tmp_path / "killed")[-1]["top1_error_percent"]
    )


def test_an_image_folder_is_trained_on_at_once(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images", train=20, val=4)
    arguments = ("--data-path", images, *TRAIN, "--max-steps", 2)
    done = run_here("net.train", *arguments, "--output-dir", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    assert f"packing 72 images of 3 classes from {images} into {images}.23x23.packed" in done.stdout
    again = run_here("net.train", *arguments, "--output-dir", tmp_path / "two")
    assert "images.23x23.packed is prepared already" in again.stdout
    assert run_here("net.evaluate", tmp_path / "one").returncode == 0
    # The image folder is no longer needed once it is packed.
    assert run_here("net.evaluate", tmp_path / "one", "--data-path", f"{images}.23x23.packed").returncode == 0


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda images: (images / "val").rename(images / "holdout"), "has no folder val"),
        (lambda images: (images / "val" / "ellipse").mkdir(), "val/ellipse holds no files"),
        (lambda images: (images / "train" / "cross").rename(images / "cross"), "class 'cross' is in"),
        (lambda images: [file.write_bytes(b"") for file in images.glob("train/*/*.jpg")], "no image for train in"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, spoil, says: str) -> None:  # type: ignore[no-untyped-def]
    images = image_folder(tmp_path / "images", train=2, val=1)
    spoil(images)
    one_line(run_here("net.train", "--data-path", images, *TRAIN), 1, says)


def test_a_damaged_store(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images", train=20, val=4)
    assert run_here("net.prepare", images, tmp_path / "store", "--size", 32).returncode == 0
    with open(tmp_path / "store" / "train_images.npy", "r+b") as file:
        file.seek(5000)
        file.write(b"\x00\x01\x02")
    for module, *arguments in (
        ("net.train", "--data-path", tmp_path / "store", *TRAIN),
        ("net.prepare", "--verify", tmp_path / "store"),
    ):
        one_line(
            run_here(module, *arguments), 1, "train_images.npy is damaged: the checksum of images 0 to 59 is wrong"
        )
