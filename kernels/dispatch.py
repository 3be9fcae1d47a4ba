"""Which implementation of an operator runs: the choice, its fallbacks, and their warnings.

The choice is plain module state. ``torch.compile`` guards on it, so a compiled caller is retraced after a switch.
"""

import functools
import importlib.util
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from . import compiler, cpu, inductor, notices, private, reference, traced
from .arguments import Normalization
from .gpu.config import INTERPRETED

ENVIRONMENT_VARIABLE = "KERNELS_IMPLEMENTATION"

#: ``aten`` is PyTorch's own operators. ``reference`` is this package's formula in plain PyTorch with an explicit
#: backward; it has special forms for CPUs. ``inductor`` is the same, compiled, for eager calls. ``triton`` is this
#: package's GPU kernels; they run on CPU tensors if the environment variable ``TRITON_INTERPRET`` is 1. ``auto`` is
#: ``triton`` on a GPU, ``reference`` on a CPU, and ``aten`` on an Apple GPU.
IMPLEMENTATIONS = ("auto", "aten", "reference", "inductor", "triton")

#: What :func:`choose` returns, except ``aten``: modules with ``forward`` and ``backward``.
MODULES: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "traced": traced, "inductor": inductor}
if importlib.util.find_spec("triton") is not None:
    # Triton exists for Linux only.
    from .gpu import bias_relu, ops

    MODULES["triton"] = ops


def _checked(name: str, source: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{source} must be one of {', '.join(IMPLEMENTATIONS)}; got {name!r}")
    return name


_selected = _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


#: Held by the thread that is inside :func:`implementation`.
_switch = threading.RLock()


def selected() -> str:
    """The currently selected name, one of :data:`IMPLEMENTATIONS`."""
    return _selected


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Run the operators with the implementation ``name`` inside a ``with`` block.

    The switch applies to the whole process, so that the threads of autograd and of ``nn.DataParallel`` follow it. While
    one thread is inside the block, no other may enter one. A backward pass runs with its forward pass's implementation.

    Args:
        name: one of :data:`IMPLEMENTATIONS`. The environment variable ``KERNELS_IMPLEMENTATION`` sets the same switch
            for a whole process.

    Raises:
        ValueError: ``name`` is not one of these.
        RuntimeError: another thread is inside a block.
    """
    global _selected
    _checked(name, "name")
    # In a compiled function, the block takes effect when the function is traced.
    held = not torch.compiler.is_compiling()
    if held and not _switch.acquire(blocking=False):
        raise RuntimeError(
            f"implementation({name!r}): another thread has chosen {_selected!r} for the process; enter the block once, "
            "around the threads"
        )
    before = _selected
    _selected = name
    try:
        yield
    finally:
        _selected = before
        if held:
            _switch.release()


@functools.cache
def _say_once(notice: str) -> None:
    notices.warn(f"kernels: {notice}")


def _fall_back(wanted: str, reason: str) -> str:
    """``reference`` instead of ``wanted``, with one warning per reason; no warning while a graph is traced."""
    if not torch.compiler.is_compiling():
        _say_once(f"running 'reference' instead of {wanted!r}: {reason}")
    return "reference"


def _automatic(input: Tensor, normalization: Normalization | None) -> str:
    # The formulas were written for these devices and tested there. Apple's GPU runs PyTorch's own operators.
    name = {"cuda": "triton", "mps": "aten"}.get(input.device.type, "reference")
    if name == "triton" and (name not in MODULES or _beyond_triton(input, normalization)):
        return "reference"
    return name


def _beyond_triton(input: Tensor, normalization: Normalization | None) -> str | None:
    """Why the kernels do not support ``input``, in words; None if they do."""
    if input.dtype == torch.float64:
        # A GPU's roots are approximate, and float64 is not performance-critical.
        return "the kernels compute in float32, and input is float64"
    if normalization is not None and (normalization.alpha < 0 or normalization.k < 0 or normalization.beta == 0):
        # The kernels compute powers through the logarithm, which needs a positive base.
        return (
            "the kernels need alpha and k of at least 0 and a beta that is not 0; got "
            f"alpha={normalization.alpha:g}, beta={normalization.beta:g}, k={normalization.k:g}"
        )
    return None


def named(input: Tensor, normalization: Normalization | None) -> str:
    """The implementation that runs on ``input``, one of :data:`IMPLEMENTATIONS` without ``auto``.

    ``triton``, selected by name, falls back to ``reference`` for inputs that its kernels do not support, and so does
    ``inductor`` if nothing can be compiled; each warns once. ``auto`` falls back silently.

    Raises:
        ValueError: ``triton`` is selected, but Triton is missing or ``input`` is not on a GPU.
    """
    name = _selected
    if name == "auto":
        return _automatic(input, normalization)
    if name == "triton":
        if name not in MODULES:
            raise ValueError("the implementation 'triton' needs the package triton, which is not installed")
        if input.device.type != "cuda" and not INTERPRETED:
            raise ValueError(
                f"the implementation 'triton' needs a tensor on a GPU, or TRITON_INTERPRET=1; got one on {input.device}"
            )
        if (reason := _beyond_triton(input, normalization)) is not None:
            return _fall_back(name, reason)
    if name == "inductor" and not torch.compiler.is_compiling() and (obstacle := compiler.obstacle()) is not None:
        return _fall_back(name, obstacle)
    return name


def choose(input: Tensor, normalization: Normalization | None) -> str:
    """What computes the chain on ``input``: a key of :data:`MODULES`, or ``aten``.

    Raises:
        ValueError: as :func:`named`.
    """
    if input.numel() == 0:
        return "aten"
    name = named(input, normalization)
    if torch.compiler.is_compiling():
        # In the caller's graph the formula fuses with the surrounding code. Exported graphs get the plain formula,
        # because other programs read them, which do not have the Triton kernels either.
        inline = name in ("reference", "inductor") or (name == "triton" and private.exporting())
        return _formula_in_a_graph() if inline else name
    if torch.jit.is_tracing() or private.nested_forward_mode():  # type: ignore[attr-defined]
        # TorchScript cannot save an autograd.Function, and its jvp drops the outer level of nested forward mode.
        return "aten"
    return "cpu" if name == "reference" and cpu.suits(input) else name


def _formula_in_a_graph() -> str:
    return "reference" if private.exporting() else "traced"


def choose_backward(forward: str, output_gradient: Tensor) -> str:
    """What computes the gradient of a chain computed by ``forward``: the same, or the formula.

    The formula can be differentiated again, computes a batch of gradients under ``vmap``, and is seen by tracers that
    were not there in the forward pass.
    """
    if torch.compiler.is_compiling():
        return _formula_in_a_graph() if torch.is_grad_enabled() else forward
    if torch.is_grad_enabled() or private.derivatives_beyond_autograd():
        return "reference"
    if private.is_batch_of_gradients(output_gradient):
        return "reference"
    return "reference" if forward == "cpu" and not cpu.suits(output_gradient) else forward


def runs_bias_relu_kernel(input: Tensor) -> bool:
    """Whether ``bias_relu`` runs its Triton kernel on ``input``; otherwise it runs PyTorch's operators.

    Raises:
        ValueError: as :func:`named`.
    """
    if input.numel() == 0 or torch.compiler.is_compiling() or named(input, None) != "triton":
        return False
    # Forward mode and functorch's transforms go through PyTorch's operators.
    if private.derivatives_beyond_autograd():
        return False
    return type(input) in (Tensor, torch.nn.Parameter) and bias_relu.pixel_stride(input) is not None


def runs_chunks_kernel(inputs: Sequence[Tensor], normalization: Normalization | None) -> bool:
    """Whether ``inputs`` run through :mod:`kernels.gpu.chunks`; otherwise the chain runs chunk by chunk.

    Raises:
        ValueError: as :func:`named`.
    """
    return all(
        runs_bias_relu_kernel(input)
        and named(input, normalization) == "triton"
        and input.is_contiguous(memory_format=torch.channels_last)
        for input in inputs
    )
