"""Transfer learning: a trained network is fine-tuned on other classes (the paper's starred rows)."""

from pathlib import Path

import pytest
import torch

from net.model import weights
from net.model.alexnet import alexnet
from net.parallel.process_group import World
from net.training import checkpoint, runs
from net.training.config import TrainConfig
from net.training.trainer import Trainer
from tests.commands import one_line, run_here

FROZEN = ("conv1", "conv4", "fc6")


@pytest.fixture(scope="module")
def flags(shapes_run: Path) -> list[object]:
    """Flags to transfer from twelve synthetic classes to ten digits."""
    source = shapes_run / "model.safetensors"
    return [
        "--image-size", 28, "-b", 24, "--init-from", source, "--new-head", "--freeze", *FROZEN, "--lr", 0.001,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tuned(flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run fine-tuned for four updates."""
    folder = tmp_path_factory.mktemp("transfer") / "run"
    done = run_here("net.train", *flags, "--max-steps", 4, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    assert "14 tensors, fc8 reinitialized for 10 classes" in done.stdout
    return folder


def test_frozen_layers_stay_and_the_others_learn(shapes_run: Path, tuned: Path) -> None:
    before, _ = weights.read(shapes_run / "model.safetensors")
    after, metadata = weights.read(tuned / "model.safetensors")
    assert metadata["classes"] == list("0123456789")
    assert after["fc8.weight"].shape == (10, 256)
    for name in after:
        if name.startswith("fc8"):
            continue
        assert torch.equal(before[name], after[name]) == (name.split(".")[0] in FROZEN), name
        # Fine-tuned, not reinitialized.
        assert (before[name] - after[name]).abs().max() < 0.02


def test_from_a_run_folder(shapes_run: Path, flags: list[object], tuned: Path, tmp_path: Path) -> None:
    """Equals starting from the weights in it."""
    changed = [shapes_run if item == shapes_run / "model.safetensors" else item for item in flags]
    done = run_here("net.train", *changed, "--max-steps", 4, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    states = [checkpoint.newest(folder / "checkpoints") for folder in (tuned, tmp_path / "run")]
    first, second = (found[1]["model"] for found in states if found is not None)
    assert all(torch.equal(first[name], second[name]) for name in first)
    (tmp_path / "empty").mkdir()
    done = run_here("net.train", "--init-from", tmp_path / "empty", "--output-dir", tmp_path / "other")
    one_line(done, 1, "empty holds no intact checkpoint")


def test_the_sixth_convolution_before_and_after(shapes_run: Path, tmp_path: Path) -> None:
    """The paper's starred rows on a small scale, as in reports/paper.md: pre-train sixth_conv, then fine-tune it."""
    # Narrow dense layers: with 4096 features they would take most of a minute.
    narrow = 'hidden=[{name="fc6", features=32}, {name="fc7", features=32}]'
    sizes = (
        "--preset",
        "imagenet",
        "--network",
        "sixth_conv",
        "--image-size",
        67,
        "-b",
        8,
        "--max-steps",
        2,
        "--architecture",
        narrow,
    )
    shapes = ("--data-path", shapes_run.parent / "shapes", "--store", tmp_path / "packed")
    done = run_here("net.train", *shapes, *sizes, "--output-dir", tmp_path / "before")
    assert done.returncode == 0, done.stderr
    start = ("--init-from", tmp_path / "before", "--new-head", "--freeze", "conv1", "conv2")
    other = ("--data-path", "synthetic:40", *sizes, "--output-dir", tmp_path / "fine tuned")
    done = run_here("net.train", *start, *other)
    assert done.returncode == 0, done.stderr
    assert "16 tensors, fc8 reinitialized for 1000 classes" in done.stdout
    assert f"python -m net.evaluate '{tmp_path}/fine tuned'" in done.stdout, "as a shell takes it"
    assert run_here("net.evaluate", tmp_path / "fine tuned").returncode == 0


def test_frozen_layers_have_no_optimizer_state(tuned: Path) -> None:
    found = checkpoint.newest(tuned / "checkpoints")
    assert found is not None
    state = found[1]
    kept = sorted(tuple(values["momentum_buffer"].shape) for values in state["optimizer"]["state"].values())
    learning = [tensor for name, tensor in state["model"].items() if name.split(".")[0] not in FROZEN]
    assert kept == sorted(tuple(tensor.shape) for tensor in learning)
    assert sum(len(group["params"]) for group in state["optimizer"]["param_groups"]) == len(learning) == 10


def test_frozen_layers_get_no_gradient(shapes_run: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        network="digits", image_size=28, batch_size=24, init_from=str(shapes_run / "model.safetensors"),
        new_head=True, freeze=FROZEN,
    )  # fmt: skip
    trainer = Trainer(config, tmp_path, None, torch.device("cpu"), World())
    loss = trainer.model(torch.zeros(2, 3, 28, 28)).square().sum()
    loss.backward()
    for name, parameter in trainer.model.named_parameters():
        assert (parameter.grad is None) == (name.split(".")[0] in FROZEN), name


def test_a_new_head_is_drawn_anew(shapes_run: Path) -> None:
    torch.manual_seed(5)
    model = alexnet("digits", image_size=28, classes=12)
    start = model.get_parameter("fc8.weight").detach().clone()
    report = weights.load_weights(model, shapes_run / "model.safetensors", without=["fc8"])
    assert len(report.loaded) == 14
    assert torch.equal(model.get_parameter("fc8.weight"), start), "although the source's would fit"
    assert report.problems() == ""


def test_resumed_it_ends_with_the_same_bits(flags: list[object], tuned: Path, tmp_path: Path) -> None:
    done = run_here("net.train", *flags, "--max-steps", 2, "--output-dir", tmp_path / "half")
    assert done.returncode == 0, done.stderr
    done = run_here("net.train", "--resume", tmp_path / "half", "--max-steps", 4)
    assert done.returncode == 0, done.stderr
    assert "starting from" not in done.stdout
    assert runs.read_config(tmp_path / "half")["freeze"] == FROZEN
    files = [folder / "model.safetensors" for folder in (tuned, tmp_path / "half")]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = run_here("net.train", "--resume", tmp_path / "half", "--freeze", "conv2")
    one_line(other, 2, "--freeze cannot change when resuming")


def test_what_does_not_fit_costs_one_line(shapes_run: Path, tuned: Path, tmp_path: Path) -> None:
    start = ("--init-from", shapes_run / "model.safetensors")
    names = "conv1, conv2, conv3, conv4, conv5, fc6, fc7, fc8"
    for status, says, *arguments in (
        (2, "--new-head needs --init-from", "--new-head"),
        (2, "--freeze needs --init-from", "--freeze", "conv1"),
        (2, f"--freeze conv9: the layers of digits are {names}", *start, "--freeze", "conv9"),
        (2, f"--freeze stage1: the layers of digits are {names}", *start, "--freeze", "stage1"),
        (2, "--freeze fc8: --new-head reinitializes it", *start, "--new-head", "--freeze", "fc8"),
        (2, "--freeze names every layer", *start, "--freeze", *names.split(", ")),
        (2, "use one of them", *start, "--resume", tuned),
        (1, "fc8.weight is [12, 256] instead of [10, 256]", *start, "--image-size", 28),
        (1, "weights do not fit variant cifar10", *start, "--network", "cifar10", "--new-head"),
        (1, "fc6.weight is", *start, "--new-head", "--image-size", 20),
    ):
        one_line(run_here("net.train", *arguments, "--output-dir", tmp_path / "run"), status, says)
        assert not (tmp_path / "run").exists()
