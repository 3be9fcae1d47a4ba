"""The installed package: a wheel in a fresh environment, used from another folder."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import kernels
from net import __main__ as commands
from net import pretrained
from net.common import cli, extras
from net.common.errors import UsageError
from net.data.cifar10 import CLASSES
from tests.commands import ROOT, one_line, run
from tests.pictures import picture


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel installed and takes its dependencies from this one."""
    folder = tmp_path_factory.mktemp("installed")
    checkout = folder / "checkout"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "dist", "*.egg-info", ".*_cache", "reports", "tests"
    )
    shutil.copytree(ROOT, checkout, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, checkout], check=True
    )
    shutil.rmtree(checkout)
    (wheel,) = folder.glob("alexnet_fused-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "theirs.pth").write_text(sysconfig.get_path("purelib"))
    result = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", result, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    return result


def output(folder: Path, *command: object) -> str:
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.slow
def test_a_wheel_in_an_environment_of_its_own(python: Path, tmp_path: Path) -> None:
    code = """
import importlib.metadata, importlib.resources, kernels, net, torch
print(kernels.__file__, net.__file__)
assert kernels.__version__ == importlib.metadata.version("alexnet-fused")
for package in (kernels, net):
    assert importlib.resources.files(package).joinpath("py.typed").is_file(), package
print(kernels.max_pool2d(torch.ones(1, 1, 3, 3), 3).item())
from net.common import extras
print(extras.install("onnx"))
import numpy as np
from net.pretrained import names
print([(name, len(net.load(name).predict([np.zeros((50, 40, 3), np.uint8)])[0])) for name in names()])
"""
    imported, one, extra, shipped = output(tmp_path, python, "-c", code).splitlines()
    assert [Path(path).parents[1] for path in imported.split()] == [python.parents[1] / python_library(python)] * 2
    assert one == "1.0"
    wheel = next(python.parents[2].glob("*.whl"))
    assert shipped == str([(name, 5) for name in pretrained.names()])
    output(tmp_path, python, "-m", "net.evaluate", "digits")
    (row,) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    # As the file says of itself; another processor may round one of the 355 images to another class.
    assert (row["network"], row["images"]) == ("digits", 355)
    assert row["top1_error_percent"] == pytest.approx(1.69, abs=0.3)
    for split, count in (("train", 2), ("test", 1)):
        for label, name in enumerate(CLASSES):
            (tmp_path / "photographs" / split / name).mkdir(parents=True)
            for number in range(count):
                shown = picture(label % 3, 10 * label + number, 32, 32)
                shown.save(tmp_path / "photographs" / split / name / f"{number}.png")
    evaluated = output(tmp_path, python, "-m", "net.evaluate", "alexnet32", "--data-path", "photographs")
    assert "10 validation images of" in evaluated
    assert (tmp_path / "photographs.32x32.packed").is_dir()
    assert extra == f"pip install 'alexnet-fused[onnx] @ {wheel.as_uri()}'"
    trained = output(tmp_path, python, "-m", "net.train", "--max-steps", 2, "--output-dir", "run")
    assert "trained 2 updates" in trained
    alexnet = python.with_name("alexnet")
    assert "top-5" in output(tmp_path, alexnet, "evaluate", "run")
    assert "trained 3 updates" in output(tmp_path, alexnet, "train", "--resume", "run", "--max-steps", 3)
    (tmp_path / "reports").mkdir()
    shutil.copytree(ROOT / "reports" / "data", tmp_path / "reports" / "data")
    assert "reports/kernels.md" in output(tmp_path, python, "-m", "bench.report").splitlines()
    assert (tmp_path / "reports" / "index.html").is_file()
    assert not (python.parents[1] / python_library(python) / "reports").exists()


def python_library(python: Path) -> Path:
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    return site.relative_to(python.parents[1])


@pytest.mark.slow
def test_a_report_without_records_says_so(python: Path, tmp_path: Path) -> None:
    done = subprocess.run([python, "-m", "bench.report"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path}/reports/data does not exist: benchmarks write records there, and this command reads them\n"
    )


def test_every_command_has_a_name() -> None:
    """All modules that end with the lines of a command are listed."""
    ending = 'if __name__ == "__main__":\n    cli.run(main)\n'
    found = {
        ".".join(path.relative_to(ROOT / "net").with_suffix("").parts)
        for path in (ROOT / "net").rglob("*.py")
        if path.read_text().endswith(ending)
    }
    assert set(commands.COMMANDS) == found


def test_one_name_for_all_commands() -> None:
    done = run("net", "evaluate", "nowhere")
    one_line(done, 1, "error: ", "nowhere")
    assert "{train,evaluate," in run("net", "--help").stdout
    assert run("net", "--help").stdout.count("\n  ") >= len(commands.COMMANDS)


def test_the_version_is_said_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", kernels.__version__)
    assert 'version = { attr = "kernels.__version__" }' in (ROOT / "pyproject.toml").read_text()


def test_the_other_package_of_this_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either may shadow the other: Hugging Face's is expected and ours imported, or the reverse."""
    with pytest.raises(ImportError, match=re.escape(f"the one that is imported, {ROOT}/kernels, is alexnet-fused's")):
        from kernels import get_kernel  # noqa: F401
    assert not hasattr(kernels, "no_such_thing")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(): ...")
    done = run("net.train", "--max-steps", 1, PYTHONPATH=f"{tmp_path}:{ROOT}", cwd=tmp_path)
    one_line(done, 2, f"import kernels finds {tmp_path}/kernels/__init__.py, not the package of alexnet-fused")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="import kernels finds nothing"):
        cli._check_kernels()


@pytest.mark.parametrize(
    ("noted", "says"),
    [
        ({"url": "file:///src/x.whl", "archive_info": {}}, "'alexnet-fused[onnx] @ file:///src/x.whl'"),
        (
            {"url": "git@host:repo.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "'alexnet-fused[onnx] @ git+git@host:repo.git@abc'",
        ),
        (None, "'alexnet-fused[onnx]'"),
        ({}, "'alexnet-fused[onnx]'"),
    ],
)
def test_where_an_extra_comes_from(
    noted: dict[str, object] | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extras.install("onnx") == f"pip install -e '{ROOT}[onnx]'"

    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if noted is None else json.dumps(noted)

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "net" / "common" / "extras.py"))
    assert extras.install("onnx") == f"pip install {says}"
