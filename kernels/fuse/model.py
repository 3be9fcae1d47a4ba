"""``fuse(model)``: puts this package's operators into a model written with PyTorch's own.

Each module's forward is traced by itself; calls to other modules stay calls. In the trace, we replace the longest
chains of ReLU, local response normalization and max pooling that one operator computes, along with the bias of the
preceding convolution. The result becomes the ``forward`` of a copy of the module for as long as what was traced stays
the same: if layers are replaced, hooked or added, the copy runs the module's own forward. Everything else in the copy
is the module's own.
"""

import copy
import functools
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import modules, notices, private
from ..functional import (
    local_response_norm,
    max_pool2d,
    relu_local_response_norm,
    relu_lrn_max_pool2d,
    relu_max_pool2d,
)
from .tracing import Layout, is_new, is_patched, leaves, reason, trace, writes, written_after

# Bound here because torch.compile traces the callers.
_is_fx_tracing = private.found("torch.fx._symbolic_trace:is_fx_symbolic_tracing")
_is_jit_tracing = private.found("torch.jit._trace:is_tracing")

#: torch.fx patches nn.Module while it traces, for all threads; two traces at once would leave it patched.
_tracing = threading.RLock()

_OPERATORS: dict[tuple[str, ...], Callable[..., Tensor]] = {
    ("relu", "lrn", "pool"): relu_lrn_max_pool2d,
    ("relu", "lrn"): relu_local_response_norm,
    ("relu", "pool"): relu_max_pool2d,
    ("lrn",): local_response_norm,
    ("pool",): max_pool2d,
}
_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.LocalResponseNorm: "lrn", nn.MaxPool2d: "pool"}
_CALLS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, "relu", torch.relu_, "relu_"), "relu"),
    F.local_response_norm: "lrn",
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), "pool"),
}
#: Arguments after ``input``, in PyTorch's order; the modules' attributes have the same names.
_ARGUMENTS = {
    "relu": ("inplace",),
    "lrn": ("size", "alpha", "beta", "k"),
    "pool": ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "conv2d": ("weight", "bias", "stride", "padding", "dilation", "groups"),
}


def _arguments(node: fx.Node, kind: str) -> dict[str, Any]:
    """Arguments of a call by name, except the first."""
    bound = dict(zip(("input", *_ARGUMENTS[kind]), node.args, strict=False)) | node.kwargs
    return {name: value for name, value in bound.items() if name != "input"}


def _part(node: fx.Node, found: dict[str, nn.Module]) -> tuple[str, dict[str, Any]] | None:
    """The part of a chain that ``node`` is, and its arguments; None if it is not one or must not be replaced."""
    kind, arguments = None, {}
    if node.op == "call_module":
        module = found[str(node.target)]
        kind = None if is_patched(module) else _MODULES.get(type(module))
        if kind is not None:
            arguments = {name: getattr(module, name) for name in _ARGUMENTS[kind]}
    elif node.op in ("call_function", "call_method"):
        kind = _CALLS.get(node.target)
        if kind is not None:
            arguments = _arguments(node, kind)
    # A computed argument would be another node.
    if kind is None or len(node.all_input_nodes) != 1:
        return None
    if kind == "relu":
        (source,) = node.all_input_nodes
        # Other readers of its input's memory expect the ReLU's values there.
        unseen = is_new(source, found) and len(source.users) == 1
        return (kind, {}) if unseen or not writes(node, found) else None
    if arguments.pop("return_indices", False) or any(isinstance(value, Tensor) for value in arguments.values()):
        return None
    try:
        (modules.LocalResponseNorm if kind == "lrn" else modules.MaxPool2d)(**arguments)
    except (TypeError, ValueError):
        return None
    return kind, arguments


def _take_bias(source: fx.Node, found: dict[str, nn.Module]) -> fx.Node | None:
    """Removes and returns the bias of the convolution ``source``; None if it has none or must keep it."""
    if len(source.users) > 1:
        return None
    arguments: dict[str, Any] = {}
    if source.op == "call_module":
        conv = found[str(source.target)]
        if type(conv) is nn.Conv2d and conv.bias is not None and conv.padding_mode == "zeros" and not is_patched(conv):
            arguments = {name: getattr(conv, name) for name in _ARGUMENTS["conv2d"]}
            with source.graph.inserting_before(source):
                for name in ("weight", "bias"):
                    arguments[name] = source.graph.get_attr(f"{source.target}.{name}")
    elif source.op == "call_function" and source.target is F.conv2d:
        arguments = _arguments(source, "conv2d")
    bias = arguments.pop("bias", None)
    if not isinstance(bias, fx.Node):
        return None
    values = source.args[0] if source.args else source.kwargs["input"]
    source.op, source.target = "call_function", F.conv2d
    source.args, source.kwargs = (values,), arguments
    return bias


def _chain(head: fx.Node, parts: dict[fx.Node, tuple[str, dict[str, Any]]]) -> list[fx.Node]:
    """The longest chain from ``head`` that one operator computes and whose intermediate results nothing else reads."""
    chain = [head]
    kinds: tuple[str, ...] = (parts[head][0],)
    while len(chain[-1].users) == 1:
        (user,) = chain[-1].users
        if user not in parts or (*kinds, parts[user][0]) not in _OPERATORS:
            break
        chain.append(user)
        kinds = (*kinds, parts[user][0])
    return chain if kinds in _OPERATORS else []


def _replace_chains(graph: fx.Graph, found: dict[str, nn.Module], prefix: str) -> list[str]:
    """Replaces the chains of ``graph`` with operators; returns one line per chain."""
    parts = {node: part for node in graph.nodes if (part := _part(node, found)) is not None}
    lines = []
    for head in list(parts):
        chain = _chain(head, parts) if head in parts else []
        if not chain:
            continue
        kinds = tuple(parts[node][0] for node in chain)
        arguments = {name: value for node in chain for name, value in parts[node][1].items()}
        (source,) = head.all_input_nodes
        kept = source if "lrn" in kinds else chain[-1]
        theirs = source.op == "placeholder" and kept is source
        if kinds[0] == "relu" and (theirs or written_after(kept, head, found)):
            # The operator saves it for backward; PyTorch's ReLU does not.
            del parts[head]
            continue
        bias = _take_bias(source, found) if kinds[0] == "relu" else None
        # Insert at the first node of the chain: its input may have changed by the time the last node runs.
        with graph.inserting_before(head):
            if bias is not None:
                arguments["bias"] = bias
            if bias is not None and kinds == ("relu", "lrn"):
                # An image without a batch dimension would be normalized over its rows, which do not match the bias.
                batched = graph.call_function(operator.eq, (graph.call_method("dim", (source,)), 4))
                graph.call_function(
                    private.found("torch._assert"), (batched, "a fused convolution's input must have 4 dimensions")
                )
            if "pool" in kinds:
                # The operator of the whole chain defaults to the paper's stride.
                arguments.setdefault("stride", None)
            result = graph.call_function(_OPERATORS[kinds], (source,), arguments)
            if kinds == ("relu", "pool") and leaves(chain[-1], found):
                result = graph.call_function(_to_be_written_to, (result,))
            chain[-1].replace_all_uses_with(result)
        names = [_name(node, prefix) for node in ([bias, *chain] if bias is not None else chain)]
        lines.append(f"{', '.join(names)} -> {_OPERATORS[kinds].__name__}")
        for node in reversed(chain):
            graph.erase_node(node)
            del parts[node]
    return lines


def _to_be_written_to(output: Tensor) -> Tensor:
    """``output``, or a copy if it is saved for backward, so that in-place writes work as on PyTorch's output."""
    return output.clone() if output.requires_grad else output


def _name(node: fx.Node, prefix: str) -> str:
    return prefix + str(getattr(node.target, "__name__", node.target))


def _foreign() -> bool:
    """Whether a tracer that does not know these operators is running, or an export to a runtime without them."""
    return bool(_is_fx_tracing() or _is_jit_tracing() or torch.onnx.is_in_onnx_export())


class _Trace:
    """What a module's new forward was made of. Copies share it; it is not pickled."""

    def __init__(self, graph: fx.Graph, fused: Callable[..., Any], layout: Layout) -> None:
        self.graph, self.fused, self.layout = graph, fused, layout

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Trace":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class _Fused(nn.Module):
    """First base class of a module with a new forward.

    A copy takes over the trace. An unpickled module is traced again, and so is a copy of one that has been changed.
    """

    _fused_from: type[nn.Module]
    _trace: _Trace

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Slicing an ``nn.Sequential`` constructs another instance of its class, which has not been traced.
        _unfuse(self)
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        known = self._trace if self._trace.layout.is_that_of(self) else None
        return _blank, (self._fused_from, known), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        known = getattr(type(self), "_trace", None)
        if known is None:
            _rewrite(self, "")
        else:
            _unfuse(self)
            _set_forward(self, known.graph, known.fused, Layout(self, known.graph))

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError("fuse: torch.jit.script cannot take a fused model; script the one it was made of")


class _FusedGraph(_Fused):
    """The same for modules whose class was generated by torch.fx, which copies them in its own way."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _fused_again, (self._unfused(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return _fused_again(copy.deepcopy(self._unfused(), memo))

    def _unfused(self) -> nn.Module:
        """A module of the original class that shares the attributes."""
        module = object.__new__(self._fused_from)
        module.__dict__ = self.__dict__
        return module


def _class(own: type[nn.Module], **members: Any) -> type[nn.Module]:
    metaclass: Any = type(own)
    base = _FusedGraph if issubclass(own, fx.GraphModule) else _Fused
    members = {"__module__": own.__module__, "_fused_from": own, **members}
    cls: type[nn.Module] = metaclass(f"Fused{own.__name__}", (base, own), members)
    return cls


def _unfuse(module: nn.Module) -> None:
    """Restores the original class of ``module``."""
    module.__class__ = getattr(type(module), "_fused_from", type(module))


def _blank(own: type[nn.Module], known: _Trace | None = None) -> nn.Module:
    """A module of class ``own``, which is fused when its state is set."""
    cls = _class(own) if known is None else _class(own, _trace=known)
    return cls.__new__(cls)


def _set_forward(module: nn.Module, graph: fx.Graph, fused: Callable[..., Any], layout: Layout) -> None:
    """Gives ``module`` the forward ``fused``; ``graph`` is the trace that it was made of."""
    own = type(module)
    module.__class__ = _class(own, forward=_forward(own, fused, layout), _trace=_Trace(graph, fused, layout))


def _fused_again(module: nn.Module) -> nn.Module:
    _rewrite(module, "")
    return module


def _forward(own: type[nn.Module], fused: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """``fused`` while it still computes what ``own``'s forward does, otherwise that forward."""

    @functools.wraps(own.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _foreign():
            return own.forward(self, *args, **kwargs)
        if layout.is_that_of(self):
            return fused(self, *args, **kwargs)
        if not torch.compiler.is_compiling():
            notices.warn(f"fuse: {own.__name__} has been changed and runs as it was written; fuse the model again")
        return own.forward(self, *args, **kwargs)

    return forward


def _rewrite(module: nn.Module, prefix: str) -> tuple[list[str], list[tuple[str, nn.Module]]]:
    """Gives ``module`` a new forward if it has a chain; returns one line per chain, and the modules it calls."""
    _unfuse(module)
    with _tracing:
        graph = trace(module)
    traced = copy.deepcopy(graph)
    found = dict(module.named_modules(remove_duplicate=False))
    layout = Layout(module, graph)
    lines = _replace_chains(graph, found, prefix)
    if lines:
        _set_forward(module, traced, type(fx.GraphModule(module, graph)).forward, layout)
    return lines, [(str(node.target), found[str(node.target)]) for node in graph.nodes if node.op == "call_module"]


def _rewrite_all(module: nn.Module, path: str, replaced: list[str], untraced: list[str], seen: set[nn.Module]) -> None:
    """:func:`_rewrite` for ``module`` and for those of its submodules that are still called."""
    if module in seen:
        return
    seen.add(module)
    below = list(module.named_children())
    theirs = type(module).__module__.startswith("torch.nn.")
    if isinstance(module, torch.jit.ScriptModule):
        untraced.append(f"{path or 'the model'} (TorchScript)")
        below = []
    elif not theirs or isinstance(module, (nn.Sequential, nn.LocalResponseNorm, nn.MaxPool2d)):
        try:
            lines, below = _rewrite(module, f"{path}." if path else "")
            replaced += lines
        except Exception as error:  # a forward may raise anything when it is given proxies
            untraced.append(f"{path or 'the model'} ({type(module).__name__}): {reason(error)}")
    for name, child in below:
        _rewrite_all(child, f"{path}.{name}".lstrip("."), replaced, untraced, seen)


def _twin(model: nn.Module) -> nn.Module:
    """An unfused copy that shares parameters and buffers."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        values = (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values())
        memo |= {id(value): value for value in values if isinstance(value, Tensor)}
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # the model's own code may raise anything
        raise ValueError(f"fuse: model cannot be copied: {error}") from error
    for module in twin.modules():
        _unfuse(module)
    twin.__dict__.pop("replaced", None)
    return twin


def _compare(model: nn.Module, fused: nn.Module, inputs: tuple[Any, ...], chains: int) -> None:
    """Raise ValueError if ``fused`` does not compute what ``model`` does, both in evaluation mode.

    An operator and its PyTorch form are each within 32 half ulps of the exact result; in the half types, where PyTorch
    rounds at every step, 2 ulps together. Later layers may amplify that eightfold.
    """
    training = [(module, module.training) for module in fused.modules()]
    expected = private.tree_leaves(_evaluate(_twin(model), inputs))
    try:
        found = private.tree_leaves(_evaluate(fused, inputs))
    except Exception as error:
        raise ValueError(f"fuse: the fused model fails on example_input: {error}") from error
    for module, mode in training:
        module.training = mode
    for ours, theirs in zip(found, expected, strict=True):
        if not isinstance(theirs, Tensor) or not theirs.is_floating_point() or theirs.numel() == 0:
            continue
        ulps = 8 * chains * (2 if theirs.dtype.itemsize == 2 else 32)
        largest = theirs.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
        allowed = ulps * torch.finfo(theirs.dtype).eps * largest
        if ours.shape != theirs.shape:
            said = f"gives {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        elif not torch.allclose(ours.double(), theirs.double(), rtol=0, atol=allowed, equal_nan=True):
            off = (ours.double() - theirs.double()).abs().max().item()
            said = f"is off by {off:.3g}, where {allowed:.3g} is allowed for outputs of up to {largest:.3g}"
        else:
            continue
        raise ValueError(f"fuse: on example_input the fused model {said}; tracing has missed what its forward does")


def _evaluate(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Runs ``model`` on copies of ``inputs``, which it may write to, with the same random numbers every time."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    exact = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    with torch.no_grad(), torch.random.fork_rng(devices), exact:
        torch.manual_seed(0)
        return model.eval()(
            *private.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs)
        )


def fuse(model: nn.Module, example_input: Tensor | tuple[Any, ...] | None = None) -> nn.Module:
    """A copy of ``model``, sharing its parameters, in which this package's operators run.

    Chains of ReLU, local response normalization and max pooling, as modules or functions, are replaced if one operator
    computes up to three of them in a row within one module's forward and nothing else reads the intermediate results.
    The bias of an ``nn.Conv2d`` or ``F.conv2d`` right before a ReLU is fused too. Arguments carry over unchanged, since
    PyTorch also divides alpha by ``size``. One line is printed per chain, and one per module that could not be traced;
    the submodules of such a module are then fused one by one::

        fused: conv1.bias, relu1, norm1, pool1 -> relu_lrn_max_pool2d

    The copy's ``.replaced`` has the same lines.

    Only the forward differs: the copy's class is derived from the model's, and modules and ``state_dict`` keys have the
    same names. Parameters and buffers are the tensors of ``model``, so an optimizer of one trains both; the modules
    around them are copies, and ``train()`` or ``eval()`` of one does not affect the other. To change the device, move
    both, or move the copy and discard ``model``.

    The copy can be used like the model: slice it, append to it, replace its head, hook, prune, copy or pickle it, wrap
    it in DistributedDataParallel or FSDP. If something changes that a module's chains depend on, such as a layer's
    hooks or stride, the module runs its own class's forward from then on and warns once; fuse the copy again after the
    changes. Under ``torch.fx`` tracing, ``torch.jit.trace``, the ONNX exporters and PyTorch's quantization, modules run
    PyTorch's own operators. ``torch.jit.script`` is refused. As with any compiled model, hooks added after
    ``torch.compile`` have no effect.

    Not replaced: layers with hooks or parametrizations, pooling with ``return_indices``, convolutions with nonzero
    padding modes, chains that span the forwards of several modules, and a ReLU whose memory is shared with an in-place
    operation.

    Tracing runs a forward once, on proxies instead of tensors. A forward that depends on their values, on ``training``
    or on whether an argument is None, or that switches gradients or autocast, is detected and not traced. One that
    depends on something else, such as Python's random numbers or ``isinstance(x, Tensor)``, is only detected with an
    ``example_input``.

    The operators keep their input's dtype: under autocast, what follows a convolution stays in the half type, while
    PyTorch's normalization returns to float32. They take floating-point inputs only.

    Args:
        model: any module. It is not changed.
        example_input: an input of ``model``, a tensor or a tuple of arguments. If given, both models run on it in
            evaluation mode and must agree.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing in ``model`` can be replaced; it has uninitialized parameters (run it once first), is a
            ``DistributedDataParallel``, or cannot be copied, such as a model sharded by FSDP; or the two models do not
            agree on ``example_input``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("fuse: model is a DistributedDataParallel; fuse what it was made of and wrap the result")
    lazy = [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise ValueError(f"fuse: {lazy[0]} has no shape yet; run the model once first")
    fused = _twin(model)
    replaced: list[str] = []
    untraced: list[str] = []
    _rewrite_all(fused, "", replaced, untraced, set())
    notes = [f"not traced: {line}" for line in untraced]
    if not replaced:
        nothing = f"fuse: no relu, local_response_norm or max_pool2d to replace in {type(model).__name__}"
        raise ValueError("; ".join([nothing, *notes]))
    if example_input is not None:
        inputs = example_input if isinstance(example_input, tuple) else (example_input,)
        _compare(model, fused, inputs, len(replaced))
    fused.replaced = replaced  # type: ignore[assignment]
    for line in (*(f"fused: {line}" for line in replaced), *notes):
        print(line)
    return fused
