"""Symbolic tracing that refuses what :mod:`torch.fx` would record wrongly; also what a trace depends on, and which
memory it writes to.

A trace is one run of a module's forward on proxies; modules that it calls are recorded as calls. torch.fx misses code
that depends on ``self.training`` or on whether an argument is None, tensors that the forward creates, state that it
stores on ``self``, and ``with`` blocks. Here ``training`` is read when the traced forward runs; the rest is refused.
"""

import copy
import inspect
import math
import operator
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from .. import dispatch, private

# Bound here: torch.compile traces what calls it.
_hooks_for_all = private.found("torch.nn.modules.module:_has_any_global_hook")

#: This project's package of operators.
_PACKAGE = dispatch.__name__.rpartition(".")[0]


def is_patched(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than run its class's forward."""
    return module.__dict__.get("forward") is not None or private.has_hooks(module)


def _in_python(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of ``root`` except TorchScript ones, whose attributes are not in ``__dict__``."""
    return [(path, module) for path, module in root.named_modules() if not isinstance(module, torch.jit.ScriptModule)]


def _modes() -> tuple[object, ...]:
    """Modes that a ``with`` block may switch, activation checkpointing among them."""
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda", "mps")]
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *autocast,
        private.saved_tensor_hooks(),
        dispatch.selected(),
    )


#: Lists, dictionaries and sets, each with a shallow copy of it.
_Containers = list[tuple[Any, Any]]


def _containers(value: Any, found: dict[int, tuple[Any, Any]] | None = None) -> _Containers:
    """The containers in ``value``, itself included, at any depth."""
    found = {} if found is None else found
    if isinstance(value, (list, tuple, dict, set)) and id(value) not in found:
        if not isinstance(value, tuple):
            found[id(value)] = value, copy.copy(value)
        for item in list(value.values()) if isinstance(value, dict) else list(value):
            _containers(item, found)
    return list(found.values())


def _changed(container: Any, contents: Any) -> bool:
    """Whether ``container`` differs from ``contents``, its earlier shallow copy, in its objects or their order."""
    if isinstance(container, set):
        return {id(item) for item in container} != {id(item) for item in contents}
    items = [
        list(each.items()) if isinstance(each, dict) else [(None, item) for item in each]
        for each in (container, contents)
    ]
    return len(items[0]) != len(items[1]) or any(
        name is not other or item is not its for (name, item), (other, its) in zip(*items, strict=True)
    )


def _restore(container: Any, contents: Any) -> None:
    if isinstance(container, list):
        container[:] = contents
    else:
        container.clear()
        container.update(contents)


class _Proxy(fx.Proxy):
    """A proxy that records ``x += y`` in place; torch.fx records ``x = x + y``."""


def _augmented(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


_AUGMENTED = tuple(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
)
for _function in _AUGMENTED:
    setattr(_Proxy, f"__{_function.__name__}__", _augmented(_function))


class Tracer(fx.Tracer):
    """See this module's docstring."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math, sys.modules[_PACKAGE]))  # type: ignore[arg-type]
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def trace(self, root: nn.Module, concrete_args: None = None) -> fx.Graph:  # type: ignore[override]
        if "forward" in root.__dict__:
            raise TraceError("its forward was replaced on the instance")
        before = {path: (module, dict(module.__dict__)) for path, module in _in_python(root)}
        stored = {
            f"{path}.{name}".lstrip("."): _containers(value)
            for path, (_, attributes) in before.items()
            for name, value in attributes.items()
            if name not in _COMMON
        }
        try:
            graph = super().trace(root)
            for path, (module, attributes) in before.items():
                for name in {*attributes, *module.__dict__} - {"training"}:
                    if attributes.get(name, self) is not module.__dict__.get(name, self):
                        raise TraceError(f"forward sets self.{f'{path}.{name}'.lstrip('.')}")
            for name, containers in stored.items():
                if any(_changed(container, contents) for container, contents in containers):
                    raise TraceError(f"forward changes the contents of self.{name}")
        finally:
            for containers in stored.values():
                for container, contents in containers:
                    if _changed(container, contents):
                        _restore(container, contents)
            for module, attributes in before.values():
                module.__dict__.clear()
                module.__dict__.update(attributes)
        for node in list(graph.nodes):
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
        return graph

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        for name, parameter in inspect.signature(root_fn).parameters.items():
            if parameter.default is None:
                raise TraceError(f"the argument {name!r} may be None or not")
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        for path, module in _in_python(self.root):
            module.__dict__["training"] = self.create_proxy("get_attr", f"{path}.training".lstrip("."), (), {})
        return function, arguments

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            raise TraceError("forward makes a tensor that does not come from its arguments")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise TraceError("forward switches gradients, checkpointing, autocast or the operators' implementation")
        return super().create_node(*args, **kwargs)


def trace(module: nn.Module) -> fx.Graph:
    """The traced forward of ``module``, which calls its submodules.

    Raises:
        Exception: whatever the forward raises on proxies; :func:`reason` says where.
    """
    return Tracer().trace(module)


#: Attributes that every module has. ``training`` and parameters are read when a traced forward runs; hooks are checked
#: separately.
_COMMON = {*nn.Module().__dict__, "_compiled_call_impl"}


def _is_constant(value: object) -> bool:
    """Whether ``value`` is compared with another by its content."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_constant, value))
    if isinstance(value, dict):
        return all(map(_is_constant, (*value, *value.values())))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype))


class _Watched(NamedTuple):
    """A module that a trace depends on."""

    path: tuple[str, ...]
    kind: type[nn.Module]
    #: Whether calling it must do exactly what its class does, because the fusion depends on that.
    bare: bool
    #: None for a module that is called, since the trace does not depend on its children.
    children: list[str] | None
    constants: tuple[tuple[str, Any], ...]
    objects: tuple[tuple[str, Any], ...]


def _kind(module: nn.Module) -> type[nn.Module]:
    """Its class, or the one that it had before it was fused."""
    kind: type[nn.Module] = getattr(type(module), "_fused_from", type(module))
    return kind


def _children(module: nn.Module) -> list[str]:
    return [name for name, child in module._modules.items() if child is not None]


class Layout:
    """What ``graph``, a trace of ``module``, depends on, besides the values of tensors and ``training``.

    This is what the forward may have read from ``module`` and from the modules in it, except those inside the ones it
    calls, and whether calling a layer does more than its class does. Modules may be replaced by others of the same
    class with the same attributes; hooks on ``module`` itself run around either forward.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        inside = tuple(f"{path}." for path in called)
        named = called | {path for path, _ in module.named_modules() if not f"{path}.".startswith(inside)}
        # Parameters of modules that it calls, read directly.
        named |= {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
        paths = {
            ".".join(atoms[:end]) for path in named for atoms in [path.split(".")] for end in range(len(atoms) + 1)
        }
        self.watched = tuple(self._watch(path, module.get_submodule(path), path in called) for path in sorted(paths))

    @staticmethod
    def _watch(path: str, module: nn.Module, called: bool) -> _Watched:
        kind = _kind(module)
        classes = [cls for cls in reversed(kind.__mro__) if cls not in (object, nn.Module)]
        defaults = {
            name: value
            for cls in classes
            for name, value in vars(cls).items()
            if not name.startswith("__") and _is_constant(value)
        }
        own = {name: value for name, value in module.__dict__.items() if name not in _COMMON}
        if isinstance(module, fx.GraphModule):
            # Its code reads them only through graph nodes; inspecting it changes some of them.
            own = {}
        attributes = {**defaults, **own}
        return _Watched(
            tuple(path.split(".")) if path else (),
            kind,
            bool(path) and isinstance(module, (nn.ReLU, *_MAKER_MODULES)) and not is_patched(module),
            None if called else _children(module),
            tuple((name, copy.deepcopy(value)) for name, value in attributes.items() if _is_constant(value)),
            # Tensors are read when a traced forward runs.
            tuple(
                (name, value) for name, value in own.items() if not (_is_constant(value) or isinstance(value, Tensor))
            ),
        )

    def is_that_of(self, root: nn.Module) -> bool:
        """Whether ``root`` is still as it was when traced; ``torch.compile`` traces this and guards on all of it."""
        if _hooks_for_all():
            return False
        for path, kind, bare, children, constants, objects in self.watched:
            module: Any = root
            for name in path:
                module = module._modules.get(name)
                if module is None:
                    return False
            if not isinstance(module, kind) or (bare and (_kind(module) is not kind or is_patched(module))):
                return False
            if children is not None and _children(module) != children:
                return False
            for name, value in constants:
                if getattr(module, name, None) != value:
                    return False
            for name, value in objects:
                if getattr(module, name, None) is not value:
                    return False
        return True


def reason(error: Exception) -> str:
    """One line: the message of ``error``, and the innermost line of the model's code in its traceback."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    said = str(error).partition("\n")[0]
    return f"{said} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else said


#: Operations that return a new tensor, sharing no memory. Anything else is assumed to return a view.
_MAKER_MODULES = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LocalResponseNorm, nn.MaxPool2d)
_MAKERS = (
    *(F.conv2d, F.linear, F.batch_norm, F.local_response_norm, F.max_pool2d, torch.max_pool2d),
    *(torch.cat, torch.add, torch.mul, operator.add, operator.mul),
)


def is_new(node: fx.Node, found: dict[str, nn.Module]) -> bool:
    """Whether ``node`` is a newly allocated tensor; ``found`` has the modules of the trace."""
    if node.op == "call_module":
        module = found[str(node.target)]
        theirs = type(module).__module__.startswith("torch.nn.")
        return theirs and isinstance(module, _MAKER_MODULES) and not is_patched(module)
    ours = str(getattr(node.target, "__module__", "")).startswith(f"{_PACKAGE}.")
    return node.op == "call_function" and (ours or node.target in _MAKERS) and "out" not in node.kwargs


def _bases(node: fx.Node, found: dict[str, nn.Module]) -> list[fx.Node]:
    """The nodes whose memory ``node`` may share or, if it writes in place, write to."""
    if is_new(node, found):
        return []
    first = node.args[0] if node.args else None
    views_first = node.op in ("call_function", "call_method") and "out" not in node.kwargs
    return [first] if views_first and isinstance(first, fx.Node) else node.all_input_nodes


def writes(node: fx.Node, found: dict[str, nn.Module]) -> bool:
    """Whether ``node`` is an in-place operation."""
    if node.op == "call_module":
        return bool(getattr(found[str(node.target)], "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    in_place = name.endswith("_") or node.kwargs.get("inplace") or "out" in node.kwargs or node.target in _AUGMENTED
    return node.op in ("call_function", "call_method") and bool(in_place)


def _sharing(node: fx.Node, found: dict[str, nn.Module]) -> set[fx.Node]:
    """The nodes that may share memory with ``node``."""
    shared: set[fx.Node] = set()
    todo = [node]
    while todo:
        one = todo.pop()
        if one not in shared:
            shared.add(one)
            todo += [*_bases(one, found), *(user for user in one.users if one in _bases(user, found))]
    return shared


def written_after(node: fx.Node, moment: fx.Node, found: dict[str, nn.Module]) -> bool:
    """Whether memory that ``node`` may share is written to after ``moment`` in the trace."""
    order = {node: place for place, node in enumerate(node.graph.nodes)}
    # A node that writes to one of them shares its memory.
    return any(order[one] > order[moment] and writes(one, found) for one in _sharing(node, found))


def leaves(node: fx.Node, found: dict[str, nn.Module]) -> bool:
    """Whether memory that ``node`` may share reaches code outside the trace: the caller's, or a module's."""

    def is_seen(user: fx.Node) -> bool:
        if user.op != "call_module":
            return user.op != "output"
        module = found[str(user.target)]
        return type(module).__module__.startswith("torch.nn.") and not module._modules and not is_patched(module)

    return not all(is_seen(user) for one in _sharing(node, found) for user in one.users)
