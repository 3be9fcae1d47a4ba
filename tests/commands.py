"""Run the project's commands: in a subprocess, as users do, or in this process, which is faster."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from net.common import cli

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, with the checkout importable from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


def _command(module: str, arguments: Sequence[object]) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def run(module: str, *arguments: object, cwd: Path | None = None, **variables: str) -> Done:
    """Run ``python -m module arguments`` to completion."""
    done = subprocess.run(
        _command(module, arguments), capture_output=True, text=True, cwd=cwd, env=environment(**variables)
    )
    return Done(done.returncode, done.stdout, done.stderr)


def run_here(module: str, *arguments: object) -> Done:
    """Run the command in this process, which has PyTorch imported."""
    main = importlib.import_module(module).main
    output, errors = io.StringIO(), io.StringIO()
    # The fixture poisoned_memory enables it; users' runs have it off.
    torch.use_deterministic_algorithms(False)
    status: object = None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            cli.run(lambda: main(list(map(str, arguments))))
        except SystemExit as left:
            status = left.code
    assert isinstance(status, int)
    return Done(status, output.getvalue(), errors.getvalue())


def start(module: str, *arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start ``python -m module arguments``, with pipes to read its output while it runs."""
    return subprocess.Popen(
        _command(module, arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment(),
    )


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    """Read lines until one contains ``words``."""
    assert process.stdout is not None
    assert process.stderr is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return
    raise AssertionError(f"never printed {words}: {''.join(lines)}{process.stderr.read()}")


def one_line(done: Done, status: int, *says: str) -> None:
    """Check the exit status, and that stderr is a single line containing each of ``says``."""
    assert done.returncode == status, done.stderr + done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for words in says:
        assert words in done.stderr
