"""net.load in a user's program gives the same results as the commands."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import net
from net.analysis import classifier as classifier_module
from net.common import device
from net.common.errors import DataError, UsageError
from net.training import evaluation
from tests.commands import ROOT, run_here


@pytest.fixture(scope="module")
def files(shapes_run: Path) -> list[Path]:
    found = [path for path in sorted((shapes_run.parent / "shapes" / "val").rglob("*")) if path.is_file()][:6]
    assert len(found) == 6
    return found


def test_answers_are_the_command_s(shapes_run: Path, files: list[Path]) -> None:
    classifier = net.load(shapes_run)
    done = run_here("net.predict", shapes_run, *files, "--json")
    assert done.returncode == 0, done.stderr
    predictions = json.loads(done.stdout)["predictions"]
    for batch_size in (128, 4):
        answers = classifier.predict(files, batch_size=batch_size)
        for answer, prediction in zip(answers, predictions, strict=True):
            assert [name for name, _ in answer] == [item["class"] for item in prediction["top"]]
            expected = [item["probability"] for item in prediction["top"]]
            assert [value for _, value in answer] == pytest.approx(expected, rel=1e-4)
    assert [len(answer) for answer in classifier.predict(files, top=2)] == [2] * len(files)
    assert repr(classifier).startswith(f"Classifier('{shapes_run}")


def test_every_reader_computes_in_the_precision_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has it: here every device does."""
    run, image = tmp_path / "run", tmp_path / "grey.png"
    Image.new("RGB", (20, 20), (128, 128, 128)).save(image)
    flags = ("--preset", "imagenet", "--network", "digits", "--data-path", "synthetic:16", "--image-size", 20, "-b", 8)
    done = run_here("net.train", *flags, "--max-steps", 1, "--precision", "bf16", "--output-dir", run)
    assert done.returncode == 0, done.stderr

    def resolve(wanted: str, device: torch.device, trained: str | None = None) -> str | None:
        assert wanted == "auto"
        return trained

    used: list[str] = []

    def probabilities(model: torch.nn.Module, crops: torch.Tensor, precision: str, *rest: object) -> torch.Tensor:
        used.append(precision)
        return evaluation_probabilities(model, crops, precision, *rest)  # type: ignore[arg-type]

    evaluation_probabilities = evaluation.probabilities
    monkeypatch.setattr(device, "resolve_precision", resolve)
    monkeypatch.setattr(classifier_module, "resolve_precision", resolve)
    for module in (evaluation, classifier_module):
        monkeypatch.setattr(module, "probabilities", probabilities)
    for command in (("net.evaluate", run), ("net.predict", run, image)):
        done = run_here(*command)
        assert done.returncode == 0, done.stderr
    net.load(run).predict([image])
    assert len(used) >= 3
    assert set(used) == {"bf16"}


def test_images_may_come_in_any_form(shapes_run: Path, files: list[Path]) -> None:
    classifier = net.load(str(shapes_run), device="cpu")
    exact = classifier.preprocess(files[:1])
    assert exact.shape == (1, 3, 28, 28)
    image = Image.open(files[0])
    pixels = np.asarray(image.convert("RGB"))
    for form in (str(files[0]), image, pixels, torch.from_numpy(pixels.copy())):
        assert torch.equal(classifier.preprocess([form]), exact)
    assert not classifier.model.training
    logits = classifier.model(exact)
    assert classifier.classes[int(logits.argmax())] == classifier.predict([image])[0][0][0]
    # Of any size and shape.
    assert classifier.preprocess([Image.new("L", (90, 40)), Image.new("RGBA", (7, 300))]).shape == (2, 3, 28, 28)


def test_what_is_no_image_is_named(shapes_run: Path, tmp_path: Path) -> None:
    classifier = net.load(shapes_run)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(DataError, match=r"text\.png cannot be read as an image"):
        classifier.predict([tmp_path / "text.png"])
    with pytest.raises(
        ValueError, match=r"images\[0\] must be a file, a Pillow image or uint8 \[H, W, 3\]; got float64"
    ):
        classifier.predict([np.zeros((8, 8, 3))])
    with pytest.raises(TypeError, match="give a list of one"):
        classifier.predict("cat.jpg")
    with pytest.raises(ValueError, match="top must be at least 1; got 0"):
        classifier.predict([tmp_path], top=0)
    assert classifier.predict([]) == []


def test_what_is_no_network_is_named(tmp_path: Path, shapes_run: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        net.load(tmp_path / "none")
    with pytest.raises(DataError, match="holds no mean image"):
        net.load(shapes_run / "model.safetensors")
    with pytest.raises(UsageError, match="--device"):
        net.load(shapes_run, device="tpu")


def test_importing_net_imports_no_torch() -> None:
    code = "import sys, net; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
