"""The weights that ship with the package: what is in the files, and that a name goes where a run goes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import net
from net import evaluate, pretrained
from net.analysis import drawings
from net.analysis.trained import Trained, open_trained
from net.common import cli
from net.common.errors import DataError, UsageError
from net.data.cifar10 import CLASSES
from net.data.packing import Packing
from net.export import RECIPE, _recipe
from net.model.alexnet import AlexNet
from net.model.config import AlexNetConfig, network
from net.training import runs
from net.training.config import PRESETS, TrainConfig
from tests.commands import one_line, run_here
from tests.pictures import picture as drawn
from tests.stores import packed_here

CPU = torch.device("cpu")
#: Bytes of a file: what may be in a package that people install.
MOST_BYTES = 4 * 2**20
#: What alexnet32 was trained on, as every figure of it has to say.
REENCODED = "CIFAR-10 re-encoded as JPEG"
#: What of a recipe tells presets apart.
TOLD_APART = ("lr", "epochs", "batch_size", "lr_milestones", "weight_decay", "reflect", "colour_noise")


@pytest.mark.parametrize("name", pretrained.names())
def test_a_file_says_all_of_its_network_in_few_bytes(name: str) -> None:
    path = pretrained.find(name)
    assert path.stat().st_size <= MOST_BYTES
    with safe_open(path, framework="pt") as file:
        assert set(file.metadata()) == {"alexnet"}
        metadata = json.loads(file.metadata()["alexnet"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    mean = tensors.pop("mean_image")
    assert (mean.dtype, mean.shape) == (torch.float32, (32, 32, 3))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    network = AlexNetConfig.from_dict(metadata["network"])
    assert sum(tensor.numel() for tensor in tensors.values()) == network.parameters < 2_000_000
    assert network.variant == PRESETS[name]["network"]
    assert len(metadata["classes"]) == network.classes
    # It was trained by the preset of its name, as that is now.
    preset = runs.settings(cli.resolve({"preset": name}, TrainConfig))
    assert {key: metadata["recipe"][key] for key in TOLD_APART} == json.loads(
        json.dumps({key: preset[key] for key in TOLD_APART})
    )
    assert set(metadata["recipe"]) <= RECIPE
    # Nothing of the machine that it was trained on.
    assert metadata["data_path"] == {"alexnet32": REENCODED}.get(name)
    assert [row["crops"] for row in metadata["errors"]] == ([1, 10] if network.image_size < 32 else [1])
    assert all(row["top1_error_percent"] < 20 for row in metadata["errors"])


def test_the_digits_error_is_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here("net.evaluate", "digits")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    with safe_open(pretrained.find("digits"), framework="pt") as file:
        (said,) = json.loads(file.metadata()["alexnet"])["errors"]
    assert row["network"] == "digits"
    assert row["images"] == said["images"] == 355
    # One image is 0.28 %; another processor may round one of them over to another class.
    assert row["top1_error_percent"] == pytest.approx(said["top1_error_percent"], abs=0.3)
    assert row["loss"] == pytest.approx(said["loss"], rel=1e-3)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph's size and shape, of no class at all."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.linear_gradient("L").resize((120, 70)).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("name", pretrained.names())
def test_a_name_names_what_is_on_a_picture(
    name: str, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    classifier = net.load(name, device="cpu")
    (answer,) = classifier.predict([picture])
    assert {item for item, _ in answer} <= set(classifier.classes)
    assert {parameter.dtype for parameter in classifier.model.parameters()} == {torch.float32}
    done = run_here("net.predict", name, picture, "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["network"] == name
    assert [item["class"] for item in result["predictions"][0]["top"]] == [item for item, _ in answer]


def test_what_is_made_of_it_is_written_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here("net.figures", "filters", "digits")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "written to filters.png"
    assert (tmp_path / "filters.png").is_file()
    assert runs.results_folder(tmp_path / "run" / "model.safetensors") == tmp_path / "run"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of 32x32 with CIFAR-10's classes, packed already."""
    root = tmp_path_factory.mktemp("photographs") / "mine"
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                shown = drawn(label % 3, 10 * label + number, 32, 32)
                shown.save(root / split / name / f"{split}-{number}.png")
    packed_here(root, root.with_name("mine.32x32.packed"), Packing(32))
    return root


def test_figures_of_photographs_by_name(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said: dict[str, tuple[Any, ...]] = {}
    for name in ("filters", "predictions", "neighbours"):
        draw = getattr(drawings, name)

        def noted(path: Path, title: str, *rest: Any, name: str = name, draw: Any = draw, **options: Any) -> None:
            said[name] = title, *rest
            draw(path, title, *rest, **options)

        monkeypatch.setattr(drawings, name, noted)
        data = () if name == "filters" else ("--data-path", photographs)
        done = run_here("net.figures", name, "alexnet32", *data)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"written to {name}.png"
        assert (tmp_path / f"{name}.png").is_file()
    assert said["filters"][0] == f"conv1, 32 kernels, trained on {REENCODED}"
    assert {said[name][0].partition(":")[0] for name in ("predictions", "neighbours")} == {"mine"}
    # The bars are what net.load answers, though in float32 from other batches.
    _, images, _, bars = said["predictions"]
    for ours, theirs in zip(net.load("alexnet32").predict(list(images)), bars, strict=True):
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], abs=1e-4)
    assert said["neighbours"][3].shape == (5, 6, 32, 32, 3)


def test_photographs_are_evaluated_by_name(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here("net.evaluate", "alexnet32", "--data-path", photographs)
    assert done.returncode == 0, done.stderr
    row, ten = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    files = sorted(photographs.glob("test/*/*"))
    answers = net.load("alexnet32").predict(files, top=1)
    wrong = sum(answer[0][0] != file.parent.name for file, answer in zip(files, answers, strict=True))
    assert (row["images"], row["crops"], ten["crops"]) == (20, 1, 10)
    assert row["top1_error_percent"] == 5 * wrong
    one_line(run_here("net.evaluate", "alexnet32"), 1, f"alexnet32 was trained on {REENCODED}, which is not here")


def test_training_starts_from_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here("net.train", "--init-from", "digits", "--lr", 0, "--max-steps", 1, "--output-dir", "run")
    assert done.returncode == 0, done.stderr
    assert "starting from digits: 16 tensors" in done.stdout
    assert "top-1 98.31 %" in done.stdout
    # As it was given: it may be somewhere else tomorrow.
    assert runs.read_config(tmp_path / "run")["init_from"] == "digits"


def test_a_name_that_is_a_path_too_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    says = "digits is ambiguous: the existing path digits, or the pretrained weights of this name"
    with pytest.raises(UsageError, match=says):
        net.load("digits")
    one_line(run_here("net.predict", "digits", "a.png"), 2, says)
    one_line(run_here("net.train", "--init-from", "digits"), 2, f"--init-from {says}")
    # Said as a path it is one.
    assert pretrained.find("./digits") == Path("digits")
    assert pretrained.find(tmp_path / "digits") == tmp_path / "digits"
    with pytest.raises(DataError, match="holds no intact checkpoint"):
        net.load("./digits")


def test_a_name_that_is_nothing_lists_those_that_there_are() -> None:
    for command in (["net.predict", "nobody", "a.png"], ["net.evaluate", "nobody"], ["net.hashing", "nobody"]):
        one_line(run_here(*command), 1, "nobody does not exist, and is not the name of pretrained weights", "digits")


def test_weights_to_share_are_those_of_the_run(shapes_run: Path, tmp_path: Path) -> None:
    """In half precision, with the mean image, the recipe and the error of that very file."""
    path = tmp_path / "shapes.safetensors"
    done = run_here("net.export", shapes_run, path, "--format", "safetensors")
    assert done.returncode == 0, done.stderr
    theirs, ours = open_trained(str(shapes_run), CPU), open_trained(str(path), CPU)
    for (name, parameter), other in zip(theirs.model.named_parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(parameter.half().float(), other), name
    assert theirs.mean is not None
    assert ours.mean is not None
    assert torch.equal(theirs.mean, ours.mean)
    assert ours.classes == theirs.classes
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["alexnet"])
    assert metadata["data_path"] == Path(theirs.data_path or "").name
    assert metadata["recipe"]["lr"] == runs.read_config(shapes_run)["lr"]
    assert not {"data_path", "store", "output_dir"} & set(metadata["recipe"])
    done = run_here("net.evaluate", path, "--data-path", theirs.data_path, "--output", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "e.json").read_text())["results"]
    assert [row["top1_error_percent"] for row in found] == [row["top1_error_percent"] for row in metadata["errors"]]
    assert [row["loss"] for row in found] == [row["loss"] for row in metadata["errors"]]
    again = tmp_path / "again.safetensors"
    done = run_here("net.export", path, again, "--format", "safetensors", "--data-path", theirs.data_path)
    assert done.returncode == 0, done.stderr
    assert again.read_bytes() == path.read_bytes()
    # Where its images are is not known from the file alone.
    left = sorted(tmp_path.iterdir())
    says = f"was trained on {metadata['data_path']}, which is not here: give --data-path"
    one_line(run_here("net.export", path, tmp_path / "no.safetensors", "--format", "safetensors"), 1, says)
    assert sorted(tmp_path.iterdir()) == left
    one_line(run_here("net.evaluate", path), 1, f"was trained on {metadata['data_path']}, which is not here")


def test_a_file_to_share_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise DataError("an image cannot be decoded")

    monkeypatch.setattr(evaluate, "measured", fails)
    (tmp_path / "a.safetensors").write_bytes(b"earlier")
    one_line(run_here("net.export", "digits", tmp_path / "a.safetensors", "--format", "safetensors"), 1, "decoded")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"]


def test_a_recipe_says_what_a_run_learned_from(tmp_path: Path) -> None:
    """But not where that was, nor what changes nothing."""
    given = {"init_from": str(tmp_path / "imagenet-001"), "new_head": True, "freeze": ("conv1",), "max_steps": 7}
    config = cli.resolve({**given, "time_budget": 9.0, "workers": 5, "data_path": "somewhere"}, TrainConfig)
    runs.write_config(tmp_path, config)
    trained = Trained(tmp_path / "model.safetensors", AlexNet(network("digits")), None, None, None)
    recipe = _recipe(trained)
    assert set(recipe) <= RECIPE
    assert recipe["init_from"] == "imagenet-001"
    assert (recipe["new_head"], recipe["freeze"], recipe["max_steps"]) == (True, ("conv1",), 7)
    assert (recipe["time_budget"], recipe["lr"]) == (9.0, config.lr)
    # What a file says of itself counts more than what lies beside it.
    assert _recipe(replace(trained, recipe={"lr": 0.5, "workers": 5})) == {"lr": 0.5}
