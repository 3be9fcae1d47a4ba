"""The repository layout: imports go kernels <- net <- bench and one way within net; --help imports nothing heavy."""

import ast
import functools
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "net", "bench")
#: The project's packages that each package may import.
ALLOWED = {"kernels": {"kernels"}, "net": {"kernels", "net"}, "bench": {"kernels", "net", "bench"}}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of each import; level counts the dots of a relative one."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    assert sources(package)
    for path in sources(package):
        for level, module in imports(path):
            top = module.split(".")[0]
            if level == 0:
                assert top not in {*PACKAGES, "tests"} - ALLOWED[package], f"{path} imports {module}"
            else:
                # A relative import must not climb out of its package.
                assert level <= len(path.relative_to(ROOT).parts) - 1, f"{path} imports {'.' * level}{module}"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_inside_a_package_are_relative(package: str) -> None:
    """The name `kernels` also belongs to a distribution on the package index."""
    for path in sources(package):
        for level, module in imports(path):
            assert level > 0 or module.split(".")[0] != package, f"{path} imports {module}"


def test_the_direction_is_checked_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from ..net import x\nimport bench.report, torch\n")
    assert imports(tmp_path / "a.py") == [(2, "net"), (0, "bench.report"), (0, "torch")]


#: net's packages; each imports from those before it.
ORDER = ("common", "pretrained", "readers", "model", "data", "parallel", "training", "analysis")
#: Dataclasses of flags and a few names, free of numpy and torch: anything may import them.
FLAGS = {"net.model.config", "net.training.config", "net.data.config"}
#: Exceptions, with their reasons.
UPWARD = {
    "net/model/weights.py imports net.training": "a run folder is read by its newest checkpoint",
    "net/common/cli.py imports net.readers": "flags come from TOML files too, which a reader opens",
}
COMMANDS = sorted(path.stem for path in (ROOT / "net").glob("*.py") if not path.stem.startswith("__"))


def imported_packages(path: Path, of: str = "net") -> set[tuple[str, str]]:
    """(package of ``of``, module) of each import of ``of`` within it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.relative_to(ROOT).parts[: -node.level]
            module = [*base, *(node.module or "").split(".")] if node.module else [*base]
            modules = [module] if len(module) > 1 else [[*module, alias.name] for alias in node.names]
            found |= {(parts[1], ".".join(parts)) for parts in modules if parts[0] == of}
    return found


def test_imports_inside_net_go_one_way() -> None:
    assert {path.parent.name for path in (ROOT / "net").glob("*/__init__.py")} == set(ORDER)
    upward = set()
    for path in sources("net"):
        here = path.relative_to(ROOT).parts[1]
        for package, module in imported_packages(path):
            if here not in ORDER or module in FLAGS:
                continue
            assert package in ORDER, f"{path} imports the command {module}"
            if ORDER.index(package) > ORDER.index(here):
                upward.add(f"{path.relative_to(ROOT)} imports net.{package}")
    assert upward == set(UPWARD)


#: bench's packages and its list of what is measured; each imports from those before it, and bench's commands from all.
BENCH_ORDER = ("measure", "predict", "subjects", "cells")


def test_imports_inside_bench_go_one_way() -> None:
    for path in sources("bench"):
        here = path.relative_to(ROOT).with_suffix("").parts[1]
        if here not in BENCH_ORDER:
            continue
        imported = {module for _, module in imported_packages(path, "bench")}
        below = BENCH_ORDER[: BENCH_ORDER.index(here) + 1]
        assert {module.split(".")[1] for module in imported} <= set(below), f"{path} imports {sorted(imported)}"


def test_net_s_root_holds_the_commands() -> None:
    from net.__main__ import COMMANDS as LISTED

    assert set(COMMANDS) == {name for name in LISTED if "." not in name}


def test_no_file_of_net_is_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources("net")}
    assert {path: length for path, length in lengths.items() if length > 450} == {}


def test_parameter_lists_of_the_kernels_are_short() -> None:
    """Compile-time choices are one tuple: two that are swapped among dozens of arguments would still compile."""
    functions = [
        (path.name, node.name, len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs))
        for path in sources("kernels")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert ("backward.py", "backward_kernel", 21) in functions
    assert max(count for _, _, count in functions) < 25


def test_commands_start_without_torch() -> None:
    modules = ["net", *(f"net.{name}" for name in COMMANDS), "net.data.shapes"]
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    heavy = {{"torch", "numpy", "matplotlib"}} & set(sys.modules)
    assert not heavy, f"{{module}} imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


#: Functions that open a file or load one.
OPENS = {"open", "read_text", "read_bytes", "memmap", "fromfile", "safe_open", "load_model_from_string"}
LOADS = {"np.load", "torch.load", "onnx.load", "tomllib.load", "json.load", "pickle.load", "torch.jit.load"}
#: Files outside of net/readers that open something, and why that is not input from a user.
OPENED = {
    "net/ablations.py": "appends a result",
    "net/analysis/activations.py": "appends a result",
    "net/common/cli.py": "/dev/null, and the package kernels",
    "net/data/digits.py": "the embedded digits",
    "net/data/packing.py": "the store that is being written",
    "net/data/prepare.py": "the store that is being written",
    "net/common/device.py": "/proc",
    "net/analysis/drawings.py": "a picture just drawn",
    "net/common/extras.py": "what pip noted",
    "net/common/files.py": "what is being written, and folders",
    "net/common/printing.py": "/dev/null",
    "net/training/runs.py": "appends to the log",
    "net/train.py": "/dev/null",
    "net/training/concurrent.py": "appends to the log",
    "net/training/tuning.py": "this program's own sources",
}


def opens(path: Path) -> list[str]:
    """The calls in a file that open another one."""
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [call for call in calls if call.rpartition(".")[2] in OPENS or call in LOADS]


def test_files_that_users_give_are_opened_by_readers() -> None:
    """net/readers checks sizes, types and content; opening a file elsewhere would bypass that."""
    found = {str(path.relative_to(ROOT)): opens(path) for path in sources("net")}
    assert found["net/readers/files.py"]
    # net/parallel calls a parameter that is named open.
    outside = {
        path for path, calls in found.items() if calls and not path.startswith(("net/readers/", "net/parallel/"))
    }
    assert outside == set(OPENED), "open files by a module of net/readers, which checks them first"


def test_openings_are_found_at_all(tmp_path: Path) -> None:
    lines = ("x = open(p)", "y = path.read_text()", "z = np.load(p)", "Image.open(p)", "opened(p)", "store.load(p)")
    (tmp_path / "a.py").write_text("\n".join(lines))
    assert opens(tmp_path / "a.py") == ["open", "path.read_text", "np.load", "Image.open"]


#: The only places that may use a GPU's interfaces; elsewhere code asks functions of the first.
BY_DEVICE = ("net/common/device.py", "net/data/", "net/training/step.py")


def device_branches(path: Path) -> list[str]:
    """Uses of a GPU's interfaces in a file, and comparisons of a device's type."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            sides = (node.left, *node.comparators)
            if any(isinstance(side, ast.Attribute) and side.attr == "type" for side in sides):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if node.attr in ("is_cuda", "is_cpu", "is_mps") or re.match(r"torch\.(cuda|mps|backends)\.", name):
                found.append(name)
    return found


def test_code_that_differs_by_device_has_its_places() -> None:
    found = {str(path.relative_to(ROOT)): device_branches(path) for path in sources("net")}
    assert all(any(found[path] for path in found if path.startswith(place)) for place in BY_DEVICE)
    elsewhere = {path for path, branches in found.items() if branches and not path.startswith(BY_DEVICE)}
    assert not elsewhere, "put what differs by device into a function of net/common/device.py"


def test_device_branches_are_found_at_all(tmp_path: Path) -> None:
    lines = (
        "x = y.device.type != 'cpu'",
        "torch.cuda.synchronize()",
        "if x.is_cuda: pass",
        "type(x) == y",
        "x.type(y)",
    )
    (tmp_path / "a.py").write_text("\n".join(lines))
    assert sorted(device_branches(tmp_path / "a.py")) == [
        "torch.cuda.synchronize",
        "x.is_cuda",
        "y.device.type != 'cpu'",
    ]


#: The only hosts that the repository may mention.
HOSTS = re.compile(r"https?://(?!(www\.)?(github\.com|arxiv\.org|pytorch\.org|example\.(com|org)|[a-z.]*w3\.org)\b)")
#: The documented cache of measured forms, unless XDG_CACHE_HOME is set.
CACHE = 'os.path.expanduser("~/.cache")'
#: Machine-specific folders, and the home folder, which no command may write to unasked.
OWN = re.compile(r"(?<![\w.])/(home|root|Users|work|opt)/|Path\.home\(\)|expanduser")


def test_nothing_belongs_to_one_machine() -> None:
    """No machine-specific folders, and no hosts except the listed ones."""
    assert HOSTS.search("pip install --index-url https://mirror.invalid/simple")
    assert OWN.search("open('/home/somebody/x')")
    assert OWN.search("cd /root/")
    checked = 0
    for path in [*ROOT.glob("*"), *(path for package in (*PACKAGES, "tests", "reports") for path in sources(package))]:
        if (
            path.is_file()
            and path.suffix in (".py", ".md", ".toml", "")
            and path.name not in (".git", Path(__file__).name)
        ):
            text = path.read_text().replace(CACHE, "")
            assert str(ROOT) not in text, path
            for pattern in (HOSTS, OWN):
                found = pattern.search(text)
                assert found is None, f"{path} holds {found and found.group()!r}"
            checked += 1
    assert checked > 40


#: A reference in a docstring or comment, as Sphinx reads it.
REFERENCE = re.compile(r":(?:mod|func|class|data|meth|attr):`~?([^`]+)`")


@functools.cache
def names(path: Path) -> set[str]:
    """Everything that a module defines or imports, its classes' members included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def resolves(target: str, path: Path) -> bool:
    """Whether ``target``, referred to in the file ``path``, is a module or a name in one."""
    parts = target.split(".")
    if not parts[0]:
        parts = [*path.relative_to(ROOT).parts[:-1], *parts[1:]]
    if parts[0] in (*PACKAGES, "tests"):
        for count in range(len(parts), 0, -1):
            place = ROOT.joinpath(*parts[:count])
            for module in (place.with_suffix(".py"), place / "__init__.py"):
                if module.exists():
                    return set(parts[count:]) <= names(module)
        return False
    if len(parts) == 1:
        return parts[0] in names(path)
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return True


def test_references_in_docstrings_resolve() -> None:
    here = Path(__file__)
    assert all(resolves(target, here) for target in ("ROOT", "net.load", ".conftest", "torch.fx.Graph"))
    assert not any(resolves(target, here) for target in ("ROT", "net.lode", "net.lode.x", ".x", "torch.fixx"))
    found = [
        (str(path.relative_to(ROOT)), target)
        for package in (*PACKAGES, "tests")
        for path in sources(package)
        for target in REFERENCE.findall(path.read_text())
    ]
    assert len(found) > 200
    assert [item for item in found if not resolves(item[1], ROOT / item[0])] == []


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("reports/*.md")]), ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []
