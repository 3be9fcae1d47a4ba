"""Simulated systems: without Triton, without a compiler, without Unix-only modules, and with an Apple GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import kernels
from kernels import dispatch
from net.common import device, files
from net.common.errors import UsageError
from net.data import synthetic
from net.data.loader import cache_that_fits
from net.model.config import network
from net.parallel.launch import Launch
from net.parallel.process_group import join
from net.training.config import TrainConfig
from net.training.evaluation import sum_dtype
from net.training.setup import compile_wanted
from tests.commands import environment

#: Removes what a system lacks, before this project is imported.
WITHOUT = """
import builtins, io, os, signal, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *arguments):
        return None if name.partition(".")[0] in {modules!r} else self.finder.find_spec(name, *arguments)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
for name in {modules!r}:
    sys.modules.pop(name, None)
for module, name in {attributes!r}:
    if hasattr(sys.modules[module], name):
        delattr(sys.modules[module], name)
if {windows!r}:
    real_open, real_os_open = io.open, os.open

    def no_proc(file, *arguments, **options):
        if str(file).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", file)
        return real_open(file, *arguments, **options)

    def no_folders(path, *arguments, **options):
        if os.path.isdir(path) and not (arguments and arguments[0] & 0o20000000):
            raise PermissionError(13, "Permission denied", path)
        return real_os_open(path, *arguments, **options)

    builtins.open = io.open = no_proc
    os.open = no_folders
    import multiprocessing

    multiprocessing.get_all_start_methods = lambda: ["spawn"]
"""
#: Python's Unix-only modules.
UNIX = ("fcntl", "resource", "pwd", "grp", "termios", "readline")
UNIX_NAMES = (
    *(("os", name) for name in ("fork", "forkpty", "sched_getaffinity", "getuid", "O_DIRECTORY")),
    *(("signal", name) for name in ("SIGPIPE", "SIGHUP")),
)


def python(folder: Path, *arguments: object, modules: tuple[str, ...] = ("triton",), windows: bool = False) -> str:
    """Run Python without ``modules``, a compiler and, if ``windows``, Unix-only modules; returns the output."""
    attributes = UNIX_NAMES if windows else ()
    text = WITHOUT.format(modules=(*modules, *(UNIX if windows else ())), attributes=attributes, windows=windows)
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(text)
    variables = environment(CXX=str(folder / "no compiler"), TRITON_INTERPRET="0")
    variables["PYTHONPATH"] = f"{folder / 'site'}:{variables['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=variables, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


EVERYTHING = """
import torch, kernels
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(3), nn.MaxPool2d(3, 2))
images = torch.randn(2, 3, 12, 12)
kernels.fuse(model, images)(images).sum().backward()
with kernels.implementation("inductor"):
    kernels.max_pool2d(torch.ones(1, 1, 4, 4), 2)
try:
    with kernels.implementation("triton"):
        kernels.max_pool2d(torch.ones(1, 1, 4, 4), 2)
except ValueError as error:
    print(error)
import net.evaluate, net.train
net.train.main(["--max-steps", "2", "--compile", "--image-size", "20", "--output-dir", "run"])
net.train.main(["--resume", "run", "--max-steps", "3"])
net.evaluate.main(["run", "--no-ten-crops"])
import sys
print("torch.compile was imported" if "torch._dynamo" in sys.modules else "torch.compile was not imported")
"""


@pytest.mark.parametrize(
    "windows", [pytest.param(False, marks=pytest.mark.slow), True], ids=["without Triton", "as on Windows"]
)
def test_training_evaluation_and_fuse(tmp_path: Path, windows: bool) -> None:
    printed = python(tmp_path, "-c", EVERYTHING, windows=windows)
    assert "0.bias, 1, 2, 3 -> relu_lrn_max_pool2d" in printed
    assert "the implementation 'triton' needs the package triton, which is not installed" in printed
    assert printed.count("running eager, torch.compile is not usable here: no C++ compiler") == 2
    assert "trained 2 updates" in printed
    assert "trained 3 updates" in printed
    assert "top-5" in printed.partition("trained 3 updates")[2]
    # It takes as long as importing torch.
    assert "torch.compile was not imported" in printed


@pytest.mark.slow
def test_images_are_packed_where_there_is_no_fork(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number in range(4):
            path = tmp_path / "images" / split / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(path)
    printed = python(tmp_path, "-m", "net.prepare", "images", "store", "--size", 32, "--workers", 2, windows=True)
    assert "store" in printed
    assert (tmp_path / "store" / "meta.json").is_file()


def test_folders_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_OPENS_FOLDERS", False)
    monkeypatch.setattr(os, "open", None)
    with files.locked(tmp_path), files.atomic_write(tmp_path / "file") as file:
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_an_apple_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--device mps: PyTorch finds no usable Apple GPU"):
        device.choose("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    mps = device.choose("mps")
    assert mps == torch.device("mps")
    assert device.choose(None).type == "cpu", "only where it is asked for"
    for name in ("mps:0", "cpu:0", "tpu", ""):
        if name:
            with pytest.raises(UsageError, match=f"--device must be cpu, cuda, cuda:N or mps; got '{name}'"):
                device.choose(name)
    with pytest.raises(UsageError, match="--device mps runs in one process"):
        join(Launch(0, 2, 0, 2), TrainConfig(device="mps", parallel="data"))


def test_on_an_apple_gpu_nothing_is_asked_for_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = torch.device("mps")
    assert sum_dtype(mps) == torch.float32
    assert sum_dtype(torch.device("cpu")) == torch.float64
    assert not compile_wanted(TrainConfig(), network("paper"), 900_000, mps)
    assert device.describe(mps) == "Apple GPU (mps)"
    with pytest.raises(UsageError, match="--precision tf32 needs an NVIDIA GPU"):
        device.set_precision("tf32", mps)
    assert cache_that_fits(synthetic.load(4, 32, 2).train, "device", mps) == "device", "its memory is the host's"
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: told.append(state.item()))
    told: list[int] = []
    state = device.random_state(mps)
    assert set(state) == {"cpu", "cuda", "mps"}
    device.set_random_state(mps, state)
    device.set_random_state(torch.device("cpu"), state)
    device.set_random_state(mps, device.random_state(torch.device("cpu")))
    assert told == [7]


@pytest.mark.parametrize(
    ("kind", "runs"), [("cpu", "reference"), ("mps", "aten"), ("cuda", "triton"), ("xpu", "reference")]
)
def test_what_auto_runs(kind: str, runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Somewhere:
        device = torch.device(kind)
        dtype = torch.float32

    monkeypatch.setattr(dispatch, "_selected", "auto")
    assert dispatch.named(Somewhere(), None) == runs  # type: ignore[arg-type]
    monkeypatch.delitem(dispatch.MODULES, "triton")
    assert dispatch.named(Somewhere(), None) == ("reference" if runs == "triton" else runs)  # type: ignore[arg-type]


def test_what_apple_gpus_have_kernels_for() -> None:
    """There the chain consists only of PyTorch's operators, with groups and bias too."""
    input = torch.randn(2, 8, 9, 9, requires_grad=True)
    with kernels.implementation("aten"):
        output = kernels.relu_lrn_max_pool2d(input, 3, groups=2, bias=torch.ones(8))
    assert "Stage" not in type(output.grad_fn).__name__
