"""Errors against manual counts, and the evaluate command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from net.data import digits
from net.data.augmentation import centre_crop, ten_crops
from net.data.images import Split
from net.data.loader import Loader
from net.model import weights
from net.model.alexnet import alexnet
from net.training import checkpoint
from net.training.evaluation import evaluate
from tests.commands import one_line, run_here

CPU = torch.device("cpu")


class Lookup(nn.Module):
    """Returns the row of logits indexed by the image's first pixel."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[images[:, 0, 0, 0].round().long()]


def run(models: list[nn.Module], labels: Tensor, batch_size: int = 4) -> list:  # type: ignore[type-arg]
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    loader = Loader(Split(images, labels.numpy()), batch_size, CPU, shuffle=False)
    means = [torch.zeros(2, 2, 3)] * len(models)
    results = evaluate(models, loader, means, [2] * len(models), centre_crop)
    assert results is not None
    return results


def test_errors_counted_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 12, generator=generator)
    labels = torch.randint(0, 12, (50,), generator=generator)
    (errors,) = run([Lookup(logits)], labels)
    order = logits.argsort(1, descending=True)
    assert errors.images == 50
    assert errors.top1_error_percent == pytest.approx(100 * (order[:, 0] != labels).double().mean().item())
    inside = (order[:, :5] == labels[:, None]).any(1)
    assert errors.top5_error_percent == pytest.approx(100 * (~inside).double().mean().item())
    assert errors.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_softmax_outputs_are_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(50, 12, generator=generator) * 3 for _ in range(3)]
    labels = torch.randint(0, 12, (50,), generator=generator)
    *single, average = run([Lookup(item) for item in logits], labels)
    assert len(single) == 3
    assert single[1] == run([Lookup(logits[1])], labels)[0]
    mean = torch.stack([F.softmax(item, 1) for item in logits]).mean(0)
    assert average.top1_error_percent == pytest.approx(100 * (mean.argmax(1) != labels).double().mean().item())


def test_saying_the_same_of_every_class_is_never_right() -> None:
    (errors,) = run([Lookup(torch.zeros(20, 12))], torch.zeros(20, dtype=torch.int64))
    assert (errors.top1_error_percent, errors.top5_error_percent) == (100, 100)
    (errors,) = run([Lookup(torch.full((20, 12), float("nan")))], torch.zeros(20, dtype=torch.int64))
    assert (errors.top1_error_percent, errors.top5_error_percent) == (100, 100)


def test_five_classes_have_no_top_5_error() -> None:
    (errors,) = run([Lookup(torch.eye(5).repeat(4, 1))], torch.arange(5).repeat(4))
    assert errors.top1_error_percent == 0
    assert errors.top5_error_percent is None
    (errors,) = run([Lookup(torch.eye(6).repeat(4, 1))], torch.arange(6).repeat(4))
    assert errors.top5_error_percent == 0


def test_crops_are_averaged_as_probabilities() -> None:
    torch.manual_seed(0)
    model = alexnet("digits", image_size=28)
    with torch.no_grad():
        # An untrained network's outputs hardly differ between crops, so that it would not matter what is averaged.
        model.get_parameter("fc8.weight").mul_(30)
    data = digits.load()
    images, mean = torch.from_numpy(data.val.images[:6]), torch.from_numpy(data.mean)
    loader = Loader(Split(data.val.images[:6], data.val.labels[:6]), 4, CPU, shuffle=False)
    results = evaluate([model], loader, [mean], [28], ten_crops)
    assert results is not None
    assert model.training
    crops = ten_crops(images, mean, 28)
    with torch.no_grad():
        model.eval()
        logits = torch.stack([model(crops[:, number]) for number in range(10)])
        output = F.softmax(logits, 2).mean(0)
    assert (F.softmax(logits.mean(0), 1) - output).abs().max() > 0.01
    of_label = output.gather(1, torch.from_numpy(data.val.labels[:6])[:, None])
    assert results[0].loss == pytest.approx(-of_label.log().mean().item(), rel=1e-4)


def test_gives_up_when_told() -> None:
    labels = torch.zeros(20, dtype=torch.int64)
    images = np.zeros((20, 2, 2, 3), np.uint8)
    loader = Loader(Split(images, labels.numpy()), 4, CPU, shuffle=False)
    seen: list[int] = []
    model = Lookup(torch.zeros(1, 12))
    results = evaluate(
        [model], loader, [torch.zeros(2, 2, 3)], [2], centre_crop, stop=lambda: len(seen) == 2, progress=seen.append
    )
    assert results is None
    assert seen == [4, 4]


def save(folder: Path, seed: int, **fields: object) -> Path:
    """Save a checkpoint of an untrained digits network, as a run does."""
    torch.manual_seed(seed)
    model = alexnet("digits", **fields)
    data = digits.load()
    metadata = {"network": model.config.to_dict(), "classes": list(data.classes), "data_path": None}
    path = checkpoint.path_of(folder / "checkpoints", 5)
    mean = torch.from_numpy(data.mean)
    checkpoint.save(path, {"model": dict(model.state_dict()), "metadata": metadata, "mean_image": mean})
    weights.save(folder / "model.safetensors", model.state_dict(), metadata)
    return path


def test_the_command_writes_a_table_and_json(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 0, image_size=28), save(tmp_path / "b", 1, image_size=28)
    done = run_here("net.evaluate", tmp_path / "a", second)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "a" / "evaluation.json").read_text())["results"]
    assert [(row["network"], row["crops"]) for row in results] == [
        (str(first), 1),
        (str(second), 1),
        ("average", 1),
        (str(first), 10),
        (str(second), 10),
        ("average", 10),
    ]
    assert all(row["images"] == 355 for row in results)
    lines = [line for line in done.stdout.splitlines() if line.startswith("average")]
    assert len(lines) == 2
    assert f"{results[2]['top1_error_percent']:.2f} %" in lines[0]


def test_weights_alone_take_the_data_s_mean(tmp_path: Path) -> None:
    save(tmp_path, 0)
    done = run_here("net.evaluate", str(tmp_path / "model.safetensors"), "--output", str(tmp_path / "e.json"))
    assert done.returncode == 0, done.stderr
    assert "holds no mean image" in done.stdout
    assert "ten crops need images larger" in done.stdout
    by_checkpoint = run_here("net.evaluate", str(tmp_path))
    assert by_checkpoint.returncode == 0
    rows = [json.loads((tmp_path / name).read_text())["results"][0] for name in ("e.json", "evaluation.json")]
    assert rows[0]["top1_error_percent"] == rows[1]["top1_error_percent"]


def test_what_cannot_be_evaluated_costs_one_line(tmp_path: Path) -> None:
    path = save(tmp_path / "a", 0)
    damaged = checkpoint.path_of(tmp_path / "b" / "checkpoints", 5)
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(path.read_bytes()[:1000])
    state = checkpoint.load(path)
    del state["digest"]
    state["metadata"]["classes"] = list("abcdefghij")
    letters = checkpoint.path_of(tmp_path / "c" / "checkpoints", 5)
    checkpoint.save(letters, state)
    state["metadata"]["network"]["towers"] = "two"
    strange = checkpoint.path_of(tmp_path / "d" / "checkpoints", 5)
    checkpoint.save(strange, state)
    (tmp_path / "empty").mkdir()
    for arguments, says in (
        ([str(tmp_path / "nowhere")], "nowhere does not exist"),
        ([str(damaged)], "is damaged or not a checkpoint"),
        ([str(tmp_path / "b")], "holds no intact checkpoint"),
        ([str(tmp_path / "empty")], "holds no intact checkpoint"),
        ([str(path), "--data-path", str(tmp_path / "empty")], "is empty"),
        ([str(path), "--data-path", "synthetic:100"], "was trained on stored images of 32x32"),
        ([str(strange)], "network: towers must be of type int; got 'two'"),
        ([str(letters)], "the classes of the embedded digits differ"),
        ([str(path), str(letters)], "their outputs cannot be averaged"),
    ):
        done = run_here("net.evaluate", *arguments)
        one_line(done, 1, says)
