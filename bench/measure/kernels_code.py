"""Which state of the stages' GPU kernels a measurement belongs to: a hash of what is compiled and how it is launched.

Hashed is the code of the functions that launch them, and of everything in :mod:`kernels` that these use: the kernels,
their device functions, the choices of tiles, warps and registers, and the constants. Docstrings, comments and layout
are left out, and so are the names of files: moving a function or explaining it orphans no measurement; changing what it
does, or its name, does.
"""

import ast
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

#: What launches the kernels, wherever it is defined.
LAUNCHES = ("forward_launch", "backward_launch")
#: States of the code, and the later state that compiles to the same kernels: the compiler's first stage gives the same
#: program for all 267 kernels compared (sm_90 and gfx950, under Triton 3.6 and 3.9); reports/LOG.md, 2026-11-27.
SAME_KERNELS = {"d309ec4b49": "23a3f218bb", "ae19969164": "23a3f218bb"}
#: A definition: its module and its name.
Key = tuple[str, str]


def read_sources(package: Path) -> dict[str, str]:
    """The text of each module below the folder of a package, by its dotted name within it."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip("."): path.read_text()
        for path in package.rglob("*.py")
    }


def kernels_code(sources: Mapping[str, str]) -> str:
    """Ten hexadecimal digits, none where there are no kernels; ``sources`` are those of :func:`read_sources`."""
    read: dict[str, _Module] = {}

    def module(name: str) -> _Module:
        # Most modules are never asked for.
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
    # In the order of names: files are in no order that means anything.
    texts = sorted((name, _code(node)) for (_, name), node in found.items())
    return hashlib.sha256("\n".join(text for _, text in texts).encode()).hexdigest()[:10] if texts else ""


class _Module:
    """What a module defines at its top, and what its names mean where they come from another one."""

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
        """What a piece of this module's code names: definitions, and other names, which have none."""
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
