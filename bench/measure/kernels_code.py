"""Which version of the stages' GPU kernels a measurement belongs to: a hash of the kernels and their launch code.

The hash covers the functions that launch them, and everything in :mod:`kernels` that these use: the kernels, their
device functions, the choices of tiles, warps and registers, and the constants. It ignores docstrings, comments, layout
and file names. So moving or documenting a function does not orphan measurements; changing what it does, or its name,
does.
"""

import ast
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

#: What launches the kernels, wherever it is defined.
LAUNCHES = ("forward_launch", "backward_launch")
#: Versions of the code, each with the later version that compiles to the same kernels: the compiler's first stage gives
#: the same program for all 267 kernels compared (sm_90 and gfx950, Triton 3.6 and 3.9); reports/LOG.md, 2026-11-27.
#: Since 23a3f218bb, only the code that launches them has changed.
SAME_KERNELS = dict.fromkeys(("d309ec4b49", "ae19969164", "23a3f218bb"), "50d72fd87d")
#: A definition: its module and its name.
Key = tuple[str, str]


def read_sources(package: Path) -> dict[str, str]:
    """The text of each module below the folder of a package, by its dotted name within it."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip("."): path.read_text()
        for path in package.rglob("*.py")
    }


def kernels_code(sources: Mapping[str, str]) -> str:
    """Ten hexadecimal digits; empty if there are no kernels. ``sources`` come from :func:`read_sources`."""
    read: dict[str, _Module] = {}

    def module(name: str) -> _Module:
        # Most modules are never needed.
        if name not in read:
            read[name] = _Module(name, sources[name], sources)
        return read[name]

    found: dict[Key, ast.stmt] = {}
    waiting = {(name, launch) for name, text in sources.items() for launch in LAUNCHES if f"def {launch}(" in text}
    while waiting:
        name, definition = key = waiting.pop()
        node = module(name).definitions.get(definition) if name in sources else None
        if node is not None and key not in found:
            found[key] = node
            waiting |= module(name).uses(node)
    # Sort by name, because the order of files is arbitrary.
    texts = sorted((name, _code(node)) for (_, name), node in found.items())
    return hashlib.sha256("\n".join(text for _, text in texts).encode()).hexdigest()[:10] if texts else ""


class _Module:
    """A module's top-level definitions, and the origin of its imported names."""

    def __init__(self, name: str, text: str, modules: Iterable[str]) -> None:
        self.name, known = name, set(modules)
        self.definitions: dict[str, ast.stmt] = {}
        #: Imported names: a definition of another module, or, with an empty name, the module.
        self.imported: dict[str, Key] = {}
        is_package = any(other.startswith(f"{name}.") for other in known)
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                named = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
                self.definitions |= dict.fromkeys(named, node)
            elif isinstance(node, ast.ImportFrom) and node.level:
                parents = name.split(".") if name else []
                outer = parents[: len(parents) - node.level + is_package]
                source = ".".join([*outer, *([node.module] if node.module else [])])
                for alias in node.names:
                    module = f"{source}.{alias.name}".lstrip(".")
                    self.imported[alias.asname or alias.name] = (
                        (module, "") if module in known else (source, alias.name)
                    )

    def uses(self, node: ast.AST) -> set[Key]:
        """The names in a piece of this module's code: definitions, and names without one."""
        found = set()
        for each in ast.walk(node):
            if isinstance(each, ast.Name):
                found.add(self.imported.get(each.id, (self.name, each.id)))
            elif isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name):
                module, name = self.imported.get(each.value.id, ("", "none"))
                found |= set() if name else {(module, each.attr)}
        return found


def _code(node: ast.stmt) -> str:
    """The definition as text, without docstrings."""
    for each in ast.walk(node):
        if isinstance(each, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(each) is not None:
            each.body = each.body[1:] or [ast.Pass()]
    return ast.unparse(node)
