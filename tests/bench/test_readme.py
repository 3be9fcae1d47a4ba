"""bench/README.md: every command in it is understood, every part and column of it exists."""

import importlib
import re

import pytest

from bench import device_suite, parallelism
from bench.measure import records
from net.common import cli
from tests.commands import ROOT
from tests.test_readmes import commands

README = ROOT / "bench" / "README.md"
TEXT = README.read_text()


def given(module: str) -> list[list[str]]:
    """The flags of each command of a module."""
    found = [command[command.index("-m") + 1 :] for command in commands(README) if "-m" in command]
    return [list(command[1:]) for command in found if command[0] == module]


def test_flags_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, parser in (("device_suite", device_suite.parser()), ("parallelism", parallelism.parser())):
        for flags in given(f"bench.{name}"):
            parser.parse_args(flags)
        assert given(f"bench.{name}")
    for name, config in (("contention", "ContentionConfig"), ("report", "ReportConfig")):
        module = importlib.import_module(f"bench.{name}")
        for flags in given(f"bench.{name}"):
            cli.resolve(cli.given(getattr(module, config), name, "", flags), getattr(module, config))
            for path in re.findall(r"reports/data/\S+", " ".join(flags)):
                assert (ROOT / path).is_file()
        assert given(f"bench.{name}")
    ours = (ROOT / "bench" / "conftest.py").read_text()
    makefile = (ROOT / "Makefile").read_text()
    lines = [" ".join(flags) for flags in given("pytest")] + re.findall(r"make bench ARGS=(.*?)(?: {2}|$)", TEXT, re.M)
    assert len(lines) > 2
    for flag in re.findall(r"--[a-z-]+", " ".join(lines)):
        assert flag == "--benchmark-only" or f'"{flag}"' in ours, flag
    for target in re.findall(r"`make ([a-z]+)`", TEXT):
        assert f"\n{target}:" in makefile


def test_parts_and_columns_are_there() -> None:
    table = TEXT[TEXT.index("| part |") : TEXT.index("If the gate fails")]
    named = [name for line in table.split("\n|") for name in re.findall(r"`(\w+)`", line.partition("|")[0])]
    assert named == list(device_suite.PARTS)
    recorded = set().union(*records.read())
    table = TEXT[TEXT.index("| column |") : TEXT.index("`kernels_code` is a hash")]
    columns = [name for line in table.split("\n|") for name in re.findall(r"`(\w+)`", line.partition("|")[0])]
    assert set(columns) <= recorded
