"""Unusable input to the commands that take a trained network: each prints a one-line error before any work is done."""

from pathlib import Path
from typing import Any

import pytest
import torch

from net.common.errors import UsageError
from net.common.files import atomic_write, check_writable
from net.data import digits
from net.model.alexnet import alexnet
from net.training import checkpoint
from tests.commands import one_line, run_here

#: The commands with their arguments; NETWORK stands for the network.
NETWORK = "NETWORK"
COMMANDS: dict[str, tuple[str, ...]] = {
    "evaluate": ("net.evaluate", NETWORK),
    # The network is checked first, before this invalid image.
    "predict": ("net.predict", NETWORK, __file__),
    "filters": ("net.figures", "filters", NETWORK),
    "predictions": ("net.figures", "predictions", NETWORK),
    "neighbours": ("net.figures", "neighbours", NETWORK),
    "hashing": ("net.hashing", NETWORK),
    "export": ("net.export", NETWORK, "a.onnx"),
}
#: Commands that write an output file, and the flag for it.
OUTPUTS = {
    "evaluate": ("--output", "a.json"),
    "predict": ("--features", "a.npy"),
    "filters": ("--output", "a.png"),
    "predictions": ("--output", "a.png"),
    "neighbours": ("--output", "a.png"),
    "hashing": ("--output", "a.json"),
}


def save(path: Path, spoilt: bool = False, **fields: object) -> Path:
    """Save a checkpoint of an untrained network, as from a run on the embedded digits."""
    model = alexnet("digits", image_size=28, **fields)
    if spoilt:
        with torch.no_grad():
            model.get_parameter("conv3.weight")[1, 0] = float("nan")
    data = digits.load()
    metadata = {"network": model.config.to_dict(), "classes": list(data.classes), "data_path": None}
    mean = torch.from_numpy(data.mean)
    checkpoint.save(path, {"model": dict(model.state_dict()), "metadata": metadata, "mean_image": mean})
    return path


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    whole = save(folder / "whole.pt")
    save(folder / "nan.pt", spoilt=True)
    save(folder / "gray.pt", image_channels=1)
    (folder / "cut.pt").write_bytes(whole.read_bytes()[:50_000])
    (folder / "notes.txt").write_text("no network")
    (folder / "empty").mkdir()
    return folder


def command(name: str, network: Path) -> list[Any]:
    return [network if part is NETWORK else part for part in COMMANDS[name]]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("network", "says"),
    [
        ("nan.pt", "nan.pt: conv3.weight holds infinite or NaN weights"),
        ("cut.pt", "cut.pt is damaged or not a checkpoint: truncated, or not written by torch.save"),
        ("notes.txt", "notes.txt is damaged or not a checkpoint: truncated, or not written by torch.save"),
        ("empty", "empty holds no intact checkpoint"),
        ("nowhere.pt", "nowhere.pt does not exist"),
    ],
)
def test_what_is_no_network(
    networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, network: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    one_line(run_here(*command(name, networks / network)), 1, says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["evaluate", "predict", "predictions", "neighbours", "hashing"])
def test_a_network_of_gray_images(networks: Path, name: str) -> None:
    done = run_here(*command(name, networks / "gray.pt"))
    one_line(done, 1, "gray.pt: its first layer reads images with 1 channels, not 3 (RGB)")


@pytest.mark.parametrize("name", OUTPUTS)
def test_where_nothing_can_be_written(networks: Path, tmp_path: Path, name: str) -> None:
    flag, file = OUTPUTS[name]
    (tmp_path / file).mkdir()
    # Checked before the network is opened.
    arguments = command(name, networks / "nowhere.pt")
    one_line(run_here(*arguments, flag, tmp_path / file), 2, f"{flag} {tmp_path / file} is a folder; give a file")
    # Nobody can create files there, not even root.
    done = run_here(*arguments, flag, f"/proc/{file}")
    one_line(done, 2, f"{flag} /proc/{file} cannot be written: ")


def test_a_file_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable("--output", None)
    check_writable("--output", "a.json")
    (tmp_path / "a.json").write_text("old")
    check_writable("--output", str(tmp_path / "a.json"))
    assert (tmp_path / "a.json").read_text() == "old"
    with pytest.raises(UsageError, match=r"--output no/a\.json: folder no does not exist"):
        check_writable("--output", "no/a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError) as failed, atomic_write(tmp_path / "a") as file:
        file.write(b"new")
    assert failed.value.filename == str(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
