"""The five most probable classes against direct inference, and errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from net.data.augmentation import ten_crops
from net.data.decode import decode
from net.model.alexnet import AlexNet, alexnet
from net.model.config import AlexNetConfig
from net.training import checkpoint
from tests.commands import one_line, run_here


def images_of(run: Path) -> list[Path]:
    return sorted((run.parent / "shapes" / "val").rglob("*.jpg"))[:7]


def network_of(run: Path) -> tuple[AlexNet, torch.Tensor, list[str]]:
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    state = found[1]
    model = AlexNet(AlexNetConfig.from_dict(state["metadata"]["network"]))
    model.load_state_dict(state["model"])
    return model.eval(), state["mean_image"], state["metadata"]["classes"]


@pytest.mark.parametrize("crops", [1, 10])
def test_top_five_and_features(shapes_run: Path, tmp_path: Path, crops: int) -> None:
    images = images_of(shapes_run)
    flags = ["--ten-crops"] if crops == 10 else []
    done = run_here(
        "net.predict", shapes_run, *images, "--json", "-b", 3, "--features", tmp_path / "f.npy", *flags
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["crops"] == crops
    assert [item["image"] for item in answer["predictions"]] == list(map(str, images))
    model, mean, classes = network_of(shapes_run)
    assert mean.shape[0] == 32
    pixels = torch.stack([torch.from_numpy(decode(path, 32)) for path in images])
    # The centre 28x28 of 32x32, by hand.
    centre = (pixels - mean)[:, 2:30, 2:30].permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        if crops == 1:
            output = F.softmax(model(centre), 1)
        else:
            views = ten_crops(pixels, mean, 28)
            output = torch.stack([F.softmax(model(views[:, number]), 1) for number in range(10)]).mean(0)
        wanted = model.features(centre)
    for item, row in zip(answer["predictions"], output, strict=True):
        order = row.argsort(descending=True)[:5].tolist()
        assert [entry["class"] for entry in item["top"]] == [classes[label] for label in order]
        assert [entry["probability"] for entry in item["top"]] == pytest.approx(row[order].tolist(), rel=1e-4)
    features = np.load(tmp_path / "f.npy")
    assert (features.dtype, features.shape) == (np.float32, (7, 256))
    assert np.allclose(features, wanted.numpy(), atol=1e-4)


def test_the_table_names_classes(shapes_run: Path) -> None:
    image = images_of(shapes_run)[0]
    done = run_here("net.predict", shapes_run, image)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["image", "class", "probability"]
    assert len(lines) == 5
    assert lines[0].startswith(str(image))
    assert sum(float(line.split()[-2]) for line in lines) <= 100.01


def save(path: Path, names: list[str] | None, **fields: object) -> Path:
    """Save a checkpoint of an untrained network."""
    model = alexnet("digits", **fields)
    metadata = {"network": model.config.to_dict(), "classes": names, "data_path": None}
    checkpoint.save(
        path, {"model": dict(model.state_dict()), "metadata": metadata, "mean_image": torch.zeros(32, 32, 3)}
    )
    return path


def test_few_classes_and_classes_without_names(tmp_path: Path) -> None:
    Image.new("L", (40, 30), 99).save(tmp_path / "gray.png")
    few = save(tmp_path / "few.pt", ["cat", "dog", "sheep"], classes=3)
    done = run_here("net.predict", few, tmp_path / "gray.png", "--json")
    top = json.loads(done.stdout)["predictions"][0]["top"]
    assert {item["class"] for item in top} == {"cat", "dog", "sheep"}
    nameless = save(tmp_path / "nameless.pt", None)
    done = run_here("net.predict", nameless, tmp_path / "gray.png", "--json")
    assert done.returncode == 0
    assert "nameless.pt holds no class names: showing class indices" in done.stderr
    assert {item["class"] for item in json.loads(done.stdout)["predictions"][0]["top"]} <= set("0123456789")


def test_what_cannot_be_predicted_costs_one_line(shapes_run: Path, tmp_path: Path) -> None:
    image = images_of(shapes_run)[0]
    text = tmp_path / "notes.jpg"
    text.write_text("no image")
    whole = save(tmp_path / "whole.pt", list("abcdefghij"))
    wrong = save(tmp_path / "wrong.pt", list("abc"))
    state = checkpoint.load(whole)
    del state["digest"], state["metadata"]["classes"]
    checkpoint.save(tmp_path / "silent.pt", state)
    features = tmp_path / "features.npy"
    for status, says, *arguments in (
        (
            1,
            f"{text} cannot be read as an image: no image in a raster format",
            shapes_run,
            image,
            text,
            "--features",
            features,
        ),
        (1, f"{tmp_path} cannot be read as an image: is a folder", shapes_run, tmp_path),
        (1, "nowhere.png cannot be read as an image: does not exist", shapes_run, tmp_path / "nowhere.png"),
        (1, "model.safetensors holds no mean image to subtract", shapes_run / "model.safetensors", image),
        (2, "whole.pt holds the mean image of its training", whole, image, "--mean-rgb", 1, 2, 3),
        (2, "--mean-rgb must be three numbers in 0..255; got 1.0 2.0 300.0", whole, image, "--mean-rgb", 1, 2, 300),
        (1, "nowhere does not exist", tmp_path / "nowhere", image),
        (1, "is damaged or not a checkpoint", text, image),
        (1, "names 3 classes, but its network has 10", wrong, image),
        (1, "silent.pt cannot be used: metadata: classes is missing", tmp_path / "silent.pt", image),
        (2, "was trained on uncropped 32x32 images", whole, image, "--ten-crops"),
        (2, "--features must end in .npy; got x.txt", shapes_run, image, "--features", "x.txt"),
        (2, "no does not exist", shapes_run, image, "--features", tmp_path / "no" / "x.npy"),
        (2, "the following arguments are required: images", shapes_run),
    ):
        done = run_here("net.predict", *arguments)
        one_line(done, status, says)
        assert done.stdout == ""
    assert not features.exists()
