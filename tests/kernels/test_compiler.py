"""What stands in the way of torch.compile is found before it fails."""

import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from kernels import compiler
from tests.commands import Done, environment, run

HEADERS = sysconfig.get_path("include")


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_no_compiler(tmp_path: Path) -> None:
    said = compiler._obstacle(str(tmp_path / "c++"), HEADERS)
    assert said == f"no C++ compiler ({tmp_path}/c++); install one: apt install g++, on Debian and Ubuntu"


def test_no_headers(tmp_path: Path) -> None:
    """Debian's and Ubuntu's Python comes without them."""
    working = program(tmp_path / "c++", "exit 0")
    said = compiler._obstacle(working, str(tmp_path))
    assert said is not None
    version = ".".join(map(str, sys.version_info[:2]))
    assert said.startswith(f"no Python.h in {tmp_path}; install Python's headers: apt install python{version}-dev")
    (tmp_path / "Python.h").touch()
    assert compiler._obstacle(working, str(tmp_path)) is None


def test_a_compiler_that_does_not_work(tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    broken = program(
        tmp_path / "c++", "echo 'In file included'; echo 'trial.cpp:4: fatal error: no vector' >&2; exit 1"
    )
    said = compiler._obstacle(f"{broken} -O2", str(tmp_path))
    assert said == f"{broken} cannot compile a small library: trial.cpp:4: fatal error: no vector"
    silent = program(tmp_path / "silent", "exit 3")
    assert compiler._obstacle(silent, str(tmp_path)) == f"{silent} cannot compile a small library: exit status 3"
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    said = compiler._obstacle(str(tmp_path / "text"), str(tmp_path))
    assert said is not None
    assert "does not run" in said


@pytest.mark.compiles
def test_it_is_the_compiler_that_cxx_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert compiler.obstacle.__wrapped__() is None
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    assert f"no C++ compiler ({tmp_path}/nowhere)" in (compiler.obstacle.__wrapped__() or "")


@pytest.mark.slow
def test_without_python_s_headers_a_run_says_so_in_a_line_and_is_eager(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sysconfig\nreal = sysconfig.get_path\n"
        f"sysconfig.get_path = lambda name, *a, **k: {str(tmp_path)!r} if name == 'include' else real(name, *a, **k)\n"
    )
    working = program(tmp_path / "c++", "exit 0")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    done: Done = run(
        *("net.train", "--max-steps", 1, "--compile", "--output-dir", tmp_path / "run"), PYTHONPATH=path, CXX=working
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "running eager" in line]
    assert len(said) == 1
    assert f"no Python.h in {tmp_path}; install Python's headers" in said[0]
    assert done.stderr == ""
    assert ", eager;" in done.stdout
    code = "import torch, kernels; print(kernels.max_pool2d(torch.ones(1, 1, 4, 4), 2))"
    variables = environment(PYTHONPATH=path, CXX=working, KERNELS_IMPLEMENTATION="inductor")
    called = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert called.returncode == 0, called.stderr
    assert called.stderr.count("running 'reference' instead of 'inductor': no Python.h in") == 1
