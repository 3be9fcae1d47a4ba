"""Symbolic tracing that says no where :mod:`torch.fx` would record something else than the forward does, and what a
trace tells about memory that is written to.

A trace is one run of a forward on stand-ins for tensors. It does not see what depends on ``self.training`` or on an
argument's being None, tensors that the forward makes by itself, what it keeps on ``self``, and ``with`` blocks. Here
``training`` is read when the traced forward runs, and the rest is refused.
"""

import inspect
import math
import operator
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from . import dispatch, modules, private

_PACKAGE = __name__.rpartition(".")[0]


def is_patched(module: nn.Module) -> bool:
    """Whether calling ``module`` does more, or something else, than its class says."""
    return "forward" in module.__dict__ or private.has_hooks(module)


def _in_python(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of ``root`` that are not TorchScript, whose attributes are not in ``__dict__``."""
    return [(path, module) for path, module in root.named_modules() if not isinstance(module, torch.jit.ScriptModule)]


def _modes() -> tuple[object, ...]:
    """What a ``with`` block may switch; activation checkpointing hooks in where tensors are saved."""
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda", "mps")]
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *autocast,
        private.saved_tensor_hooks(),
        dispatch.selected(),
    )


class _Proxy(fx.Proxy):
    """A stand-in on which ``x += y`` is recorded as what it is; torch.fx makes ``x = x + y`` of it."""


def _augmented(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


_AUGMENTED = tuple(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
)
for _function in _AUGMENTED:
    setattr(_Proxy, f"__{_function.__name__}__", _augmented(_function))


class Tracer(fx.Tracer):
    """See the head of this file. Modules whose paths are in ``opaque`` are called and not traced."""

    proxy_buffer_attributes = True

    def __init__(self, opaque: Iterable[str] = ()) -> None:
        super().__init__(autowrap_modules=(math, sys.modules[_PACKAGE]))  # type: ignore[arg-type]
        self.opaque = opaque
        self.modes = _modes()

    @property
    def inside(self) -> str:
        """Path of the module whose forward is being traced; empty for the root."""
        path: str = next(reversed(self.module_stack.values()), ("",))[0]
        return path

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__ == modules.__name__
        called = ours or module_qualified_name in self.opaque or is_patched(m)
        return called or super().is_leaf_module(m, module_qualified_name)

    def trace(self, root: nn.Module, concrete_args: None = None) -> fx.Graph:  # type: ignore[override]
        if "forward" in root.__dict__:
            raise TraceError("its forward was replaced on the instance")
        before = {path: (module, dict(module.__dict__)) for path, module in _in_python(root)}
        try:
            graph = super().trace(root)
            for path, (module, attributes) in before.items():
                for name in {*attributes, *module.__dict__} - {"training"}:
                    if attributes.get(name, self) is not module.__dict__.get(name, self):
                        self.module_stack[path] = (path, type(module))
                        raise TraceError(f"forward sets self.{name}")
        finally:
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
    """The forward of ``module``, with the modules below it traced where that is possible and called where it is not.

    Raises:
        Exception: what the forward of ``module`` itself raises when it is given stand-ins; :func:`reason` says where.
    """
    opaque: set[str] = set()
    while True:
        tracer = Tracer(opaque)
        try:
            return tracer.trace(module)
        except Exception:  # Whatever a forward raises that is given stand-ins for tensors.
            path = tracer.inside
            while path in opaque:
                # Called, and still wrong: because of where, and so because of what calls it.
                path = path.rpartition(".")[0]
            if not path:
                raise
            opaque.add(path)


def reason(error: Exception) -> str:
    """One line: what ``error`` says, and the last line of a model's code on the way to it."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    said = str(error).partition("\n")[0]
    return f"{said} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else said


#: What makes a tensor that nobody else holds, not even as a view. Of anything else it is not taken for granted.
_MAKER_MODULES = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LocalResponseNorm, nn.MaxPool2d)
_MAKERS = (
    *(F.conv2d, F.linear, F.batch_norm, F.local_response_norm, F.max_pool2d, torch.max_pool2d),
    *(torch.cat, torch.add, torch.mul, operator.add, operator.mul),
)


def is_new(node: fx.Node, found: dict[str, nn.Module]) -> bool:
    """Whether ``node`` is a tensor of its own; ``found`` has the modules of the trace."""
    if node.op == "call_module":
        module = found[str(node.target)]
        theirs = type(module).__module__.startswith("torch.nn.")
        return theirs and isinstance(module, _MAKER_MODULES) and not is_patched(module)
    ours = str(getattr(node.target, "__module__", "")).startswith(f"{_PACKAGE}.")
    return node.op == "call_function" and (ours or node.target in _MAKERS) and "out" not in node.kwargs


def _bases(node: fx.Node, found: dict[str, nn.Module]) -> list[fx.Node]:
    """Whose memory ``node`` may be or, if it writes, writes to."""
    if is_new(node, found):
        return []
    first = node.args[0] if node.args else None
    views_first = node.op in ("call_function", "call_method") and "out" not in node.kwargs
    return [first] if views_first and isinstance(first, fx.Node) else node.all_input_nodes


def writes(node: fx.Node, found: dict[str, nn.Module]) -> bool:
    """Whether ``node`` is an operation in place."""
    if node.op == "call_module":
        return bool(getattr(found[str(node.target)], "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    in_place = name.endswith("_") or node.kwargs.get("inplace") or "out" in node.kwargs or node.target in _AUGMENTED
    return node.op in ("call_function", "call_method") and bool(in_place)


def written_after(node: fx.Node, moment: fx.Node, found: dict[str, nn.Module]) -> bool:
    """Whether memory that may be ``node``'s is written to behind ``moment`` in the trace."""
    order = {node: place for place, node in enumerate(node.graph.nodes)}
    shared: set[fx.Node] = set()
    todo = [node]
    while todo:
        one = todo.pop()
        if one not in shared:
            shared.add(one)
            todo += [*_bases(one, found), *(user for user in one.users if one in _bases(user, found))]
    # What writes to one of them shares its memory.
    return any(order[one] > order[moment] and writes(one, found) for one in shared)
