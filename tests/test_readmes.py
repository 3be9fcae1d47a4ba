"""The READMEs: the flags of every command parse, and every Python block runs."""

import importlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from net.common import cli
from tests.commands import ROOT
from tests.pictures import picture

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), ROOT / "CONTRIBUTING.md"]


def commands(page: Path) -> list[list[str]]:
    """The arguments of each command in a page's indented lines and shell blocks, without comments."""
    # Python's blocks first: their closing fence looks like the opening one of a shell block.
    text = re.sub(r"```python\n.*?```", "", page.read_text(), flags=re.DOTALL).replace("\\\n", " ")
    lines = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    for block in re.findall(r"```(?:sh|bash|console)?\n(.*?)```", text, re.DOTALL):
        lines += block.splitlines()
    words = [
        shlex.split(line, comments=True) for line in lines if re.match(r"(\w+=\S+ )*(python|torchrun|alexnet) ", line)
    ]
    return [[word for word in each if word != "\\"] for each in words if each]


class Parsed(Exception):  # noqa: N818 - no error
    """Raised once the command line has been parsed."""


def module_and_flags(command: list[str]) -> tuple[str, list[str]] | None:
    """The module after ``-m`` and its flags; None for other programs, such as pytest."""
    if "-m" not in command:
        return ("net", command[1:]) if command[0] == "alexnet" else None
    at = command.index("-m")
    return command[at + 1], command[at + 2 :]


def net_commands() -> list[tuple[str, list[str]]]:
    found = [module_and_flags(command) for page in PAGES for command in commands(page)]
    return [each for each in found if each is not None and each[0].split(".")[0] == "net"]


@pytest.mark.parametrize("command", net_commands(), ids=lambda command: " ".join([command[0], *command[1]])[:80])
def test_flags_are_allowed(command: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    given = cli.given

    def parse(config: Any, program: str, description: str, arguments: Sequence[str] | None) -> dict[str, Any]:
        flags = given(config, program, description, arguments)
        cli.resolve(flags, config)
        raise Parsed

    monkeypatch.setattr(cli, "given", parse)
    module, flags = command
    with pytest.raises(Parsed):
        importlib.import_module(module).main(flags)


def test_there_are_commands_of_each_kind() -> None:
    modules = {module for module, _ in net_commands()}
    assert modules >= {f"net.{name}" for name in ("train", "evaluate", "predict", "prepare", "figures", "export")}


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_python_runs(page: Path, tmp_path: Path, shapes_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder with a trained run and the images that the pages mention."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits-001").symlink_to(shapes_run)
    for name in ("seven.png", "cat.jpg"):
        picture(0, 1).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    torch.use_deterministic_algorithms(False)
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), {})
