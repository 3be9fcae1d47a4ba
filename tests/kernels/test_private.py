"""What is used of PyTorch and Triton that they do not promise to keep, and versions that were not tried."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import private
from tests.commands import ROOT, environment

#: Used where they stand: the first three are documented, the last a benchmark's. ``private.NAMES`` has them too.
IN_PLACE = (
    *("torch._foreach_mul_", "torch._foreach_add_", "torch._inductor.aoti_compile_and_package"),
    *("torch._dynamo.reset", "torch.cuda._sleep"),
)


def test_everything_that_is_used_is_there() -> None:
    assert private.missing() == []


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = "torch._C._no_such_thing"
    monkeypatch.setattr(private, "NAMES", (*private.NAMES, gone, "triton.compiler:NoSuchThing"))
    monkeypatch.setattr(private, "RENAMED", (("torch._C._new", "torch._C._old"),))
    monkeypatch.setattr(private, "_HOOKS", ("_no_such_hooks",))
    assert private.missing() == [
        "torch.nn.Module._no_such_hooks",
        gone,
        "triton.compiler:NoSuchThing",
        "torch._C._new or torch._C._old",
    ]
    said = re.escape(f"torch {importlib.metadata.version('torch')} has no {gone}; its tests ran with torch 2.11 to ")
    with pytest.raises(ImportError, match=said):
        private.found(gone)


def _uses(text: str) -> list[str]:
    """Private names in code, strings and mentions left out: by their place, imported, of tensors and modules."""
    text = re.sub(r'"[^"\n]*"|``[^`]*``', "", text)
    dotted = re.findall(r"\btorch(?:\.\w+)*?\._[a-z]\w*(?:\.\w+)*", text, re.IGNORECASE)
    imported = re.findall(
        r"^\s*(?:from|import) ((?:torch|triton)\S*\._\S*|triton\.(?:compiler|backends|runtime)\S*)", text, re.M
    )
    imported += re.findall(r"^\s*from (?:torch|triton)\S* import .*\b(_[a-z]\w*)", text, re.M)
    attributes = re.findall(
        r"\.(_is_view|_version|_schema|_current_level|_set_fwd_grad_enabled|_forward_hooks|_set_pg_timeout"
        r"|_get_sequence_number_for_group)\b",
        text,
    )
    return dotted + imported + attributes


def test_it_is_used_in_one_module_only() -> None:
    lines = ("x = torch.nn._a.b", "import torch._dynamo", "from triton.compiler import C", "from torch.a import B, _c")
    assert _uses("\n".join((*lines, "y._is_view()"))) == [
        "torch.nn._a.b",
        "torch._dynamo",
        "torch._dynamo",
        "triton.compiler",
        "_c",
        "_is_view",
    ]
    found = {
        f"{path.relative_to(ROOT)}: {use}"
        for package in ("kernels", "net", "bench")
        for path in (ROOT / package).rglob("*.py")
        if path != Path(private.__file__)
        for use in _uses(path.read_text())
        if use not in IN_PLACE
    }
    assert found == set()


def test_the_list_is_what_is_used() -> None:
    sources = [path for package in ("kernels", "net", "bench") for path in (ROOT / package).rglob("*.py")]
    asked = {name for path in sources for name in re.findall(r'found\("([^"]+)"\)', path.read_text())}
    # Settings are given by keyword, and three are read as they stand: sooner, or because Dynamo traces it.
    elsewhere = {
        name for name in private.NAMES if name.startswith(("torch._dynamo.config:", "torch._functorch.config:"))
    }
    elsewhere |= {"torch._C._are_functorch_transforms_active", "torch.autograd.forward_ad._current_level"}
    elsewhere |= {"torch.compiler._is_exporting_flag"}
    elsewhere |= {"torch.Tensor._is_view", "torch.Tensor._version", "torch.optim.sgd:sgd", *IN_PLACE}
    elsewhere |= {"torch.distributed.ProcessGroup._get_sequence_number_for_group"}
    assert asked | elsewhere == set(private.NAMES)


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("2.11.0", False),
        ("2.13.0+cpu", False),
        ("2.10.1", True),
        ("2.99.0.dev20270101+cu130", True),
        ("3.0.0", True),
        ("a source tree", False),
    ],
)
def test_an_untried_version_is_said(version: str, says: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"torch": version, "triton": "3.7.1"}.__getitem__)
    private.warn_untested.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            private.warn_untested()
    said = [str(one.message) for one in caught]
    least, most = (".".join(map(str, one)) for one in private.TRIED["torch"])
    line = f"kernels was not tried with torch {version}: its tests ran with torch {least} to {most}"
    assert said == [line] * says


def test_an_untried_version_works() -> None:
    """In a process of its own: the warning comes once, with the import, and the operators run."""
    code = """
import importlib.metadata
real = importlib.metadata.version
importlib.metadata.version = lambda name: "2.99.0" if name == "torch" else real(name)
import torch
import kernels, kernels.fuse
print(kernels.max_pool2d(torch.arange(4.).view(1, 1, 2, 2), 2).item())
"""
    clean = {name: value for name, value in environment().items() if name != "PYTHONWARNINGS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert (done.returncode, done.stdout) == (0, "3.0\n"), done.stderr
    assert done.stderr.count("kernels was not tried with torch 2.99.0") == 1


def test_without_its_shortcuts_the_longer_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not private.recorded()
    assert not private.derivatives_beyond_autograd()
    private.found.cache_clear()
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    assert private.recorded()
    assert private.derivatives_beyond_autograd()
    private.found.cache_clear()


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_the_project_asks_for_is_what_was_tried() -> None:
    """The least versions are those of the table; there is no largest one, and constraints.txt lies between."""
    wanted = [requirement.partition(";")[0] for requirement in _project()["dependencies"]]
    pinned = dict(re.findall(r"^(\w+)(?:==|<=)([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for package, (least, most) in private.TRIED.items():
        assert f"{package}>={least[0]}.{least[1]}" in wanted
        assert least <= tuple(map(int, pinned[package].split(".")[:2])) <= most
    assert not any("<" in requirement for requirement in wanted)


def test_constraints_leave_triton_to_torch() -> None:
    """Wheels of torch for GPUs ask for one triton each, older than the newest: a pin would leave nothing to install."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert any(line.startswith("torch==") for line in lines)
    assert [line for line in lines if line.startswith("triton")] == ["triton<=3.9.0"]
