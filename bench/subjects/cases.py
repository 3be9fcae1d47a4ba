"""The operators at the paper's shapes, their rivals, and the check that they compute the right thing.

Implementations are named as everywhere in this project: ``aten`` is PyTorch's own operators, ``compiled`` the same
under ``torch.compile``, ``reference`` and ``inductor`` the formulas of :mod:`kernels` called eagerly, ``traced`` the
formulas in a compiled caller's graph, ``triton`` the kernels, ``cudnn`` cuDNN's own normalization, which PyTorch does
not call, and ``xla`` the whole stages written in JAX.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from kernels import private
from kernels.arguments import Normalization, Pooling

from ..measure.memory import kept_bytes
from ..measure.timing import copies, seconds
from ..predict.roofline import Work, chain
from . import cudnn, xla
from .installed import NotInstalledError

#: Name: the switch of :mod:`kernels`, and whether the caller is compiled.
IMPLEMENTATIONS = {
    "aten": ("aten", False),
    "compiled": ("aten", True),
    "reference": ("reference", False),
    "inductor": ("inductor", False),
    "traced": ("reference", True),
    "triton": ("triton", False),
    "cudnn": ("aten", False),
    "xla": ("aten", True),
}
MODES = ("inference", "forward", "backward", "forward_backward")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: The faster memory format of each implementation on a CPU (reports/LOG.md); on a GPU all use channels_last.
CPU_FORMAT = {"aten": "contiguous", "compiled": "contiguous"}
#: Standard deviation of the input, which represents a convolution's output: the normalization's sums are then about k.
SCALE = 60.0
LRN = Normalization(5, 5e-4, 0.75, 2.0, 2)
POOL = Pooling((3, 3), (2, 2), (0, 0), (1, 1), False)


Operator = Callable[[Tensor, Tensor | None], Tensor]


class Case(NamedTuple):
    """An operator at one of the paper's layers: its input's shape, and the parts of its chain."""

    name: str
    channels: int
    size: int
    bias: bool
    relu: bool
    normalization: Normalization | None
    pooling: Pooling | None

    def operator(self) -> Operator:
        """The public operator that has these parts."""
        norm = self.normalization._asdict() if self.normalization else {}
        pool = self.pooling._asdict() if self.pooling else {}
        if self.relu and norm and pool:
            return lambda input, bias: kernels.relu_lrn_max_pool2d(input, **norm, bias=bias, **pool)
        if self.relu and norm:
            return lambda input, bias: kernels.relu_local_response_norm(input, **norm, bias=bias)
        if norm:
            return lambda input, bias: kernels.local_response_norm(input, **norm)
        if self.relu:
            return lambda input, bias: kernels.relu_max_pool2d(input, **pool, bias=bias)
        return lambda input, bias: kernels.max_pool2d(input, **pool)

    def work(self, images: int, dtype: torch.dtype) -> dict[str, Work]:
        """FLOPs and minimum memory traffic by mode."""
        return chain(
            images, self.channels, self.size, dtype.itemsize, self.bias, self.relu, self.normalization, self.pooling
        )


CASES = (
    Case("stage1", 96, 55, True, True, LRN, POOL),
    Case("stage2", 256, 27, True, True, LRN, POOL),
    Case("relu_lrn1", 96, 55, True, True, LRN, None),
    Case("lrn1", 96, 55, False, False, LRN, None),
    Case("max_pool1", 96, 55, False, False, None, POOL),
    Case("relu_max_pool5", 256, 13, True, True, None, POOL),
)
BY_NAME = {case.name: case for case in CASES}
NEEDS_GPU = "needs a GPU"
#: Seed of the inputs that implementations are checked with.
CHECKED = 1


def implementations(case: Case, device: torch.device) -> tuple[str, ...]:
    """The implementations of a case on a device; on a CPU ``triton`` is listed but not timed."""
    left_out = {"cudnn", "traced"} if device.type == "cpu" else {"inductor"}
    if case.relu or case.bias or case.pooling or not case.normalization:
        left_out.add("cudnn")
    if not (case.relu and case.bias and case.normalization and case.pooling):
        left_out.add("xla")
    return tuple(name for name in IMPLEMENTATIONS if name not in left_out)


class WrongResultError(Exception):
    """An implementation computes something other than the formula; it is not timed."""


def failure(error: BaseException) -> str:
    """The status of a row that could not be measured: the error, and its first cause."""

    def said(one: BaseException) -> str:
        return f"{type(one).__name__}: {(str(one).splitlines() or [''])[0]}"

    if isinstance(error, NotInstalledError):
        return str(error)
    first = error
    # The error that ends a graph capture does not give the cause.
    while before := first.__cause__ or (None if first.__suppress_context__ else first.__context__):
        first = before
    return f"failed: {said(error)}" + (f"; at first {said(first)}" if first is not error else "")


def inputs(
    case: Case, images: int, dtype: torch.dtype, format: str, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Input and bias that require gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (images, case.channels, case.size, case.size)
    input = (torch.randn(shape, generator=generator, device=device) * SCALE).to(dtype)
    input = input.contiguous(memory_format=FORMATS[format]).requires_grad_()
    bias = torch.randn(case.channels, generator=generator, device=device).requires_grad_() if case.bias else None
    return input, bias


@contextlib.contextmanager
def many_variants() -> Iterator[None]:
    """Raise PyTorch's limit of eight compiled variants of a function."""
    with private.dynamo(recompile_limit=256, accumulated_recompile_limit=4096):
        yield


class Prepared(NamedTuple):
    """An implementation of a case, ready to be called; :meth:`calls` creates the timed calls."""

    case: Case
    implementation: str
    function: Operator

    def __call__(self, input: Tensor, bias: Tensor | None) -> Tensor:
        switch = IMPLEMENTATIONS[self.implementation][0]
        # Otherwise a compiled backward pass may overwrite what forward saved, and could run only once.
        with kernels.implementation(switch), many_variants(), private.functorch(donated_buffer=False):
            return self.function(input, bias)

    def gradients(self, output: Tensor, input: Tensor, bias: Tensor | None, output_gradient: Tensor) -> list[Tensor]:
        wanted = [input] if bias is None else [input, bias]
        with many_variants():
            return list(torch.autograd.grad(output, wanted, output_gradient, retain_graph=True))

    def calls(self, mode: str, sets: list[tuple[Tensor, Tensor | None]]) -> list[Callable[[], object]]:
        """One call for each set of inputs."""
        if isinstance(self.function, xla.Stage):
            return self.function.calls(mode, sets)
        made: list[Callable[[], object]] = []
        for input, bias in sets:
            if mode == "inference":
                frozen, plain = input.detach(), None if bias is None else bias.detach()
                made.append(lambda x=frozen, b=plain: self(x, b))  # type: ignore[misc]
                continue
            if mode == "forward":
                made.append(lambda x=input, b=bias: self(x, b))  # type: ignore[misc]
                continue
            output = self(input, bias)
            gradient = torch.randn_like(output)
            if mode == "backward":
                made.append(
                    lambda o=output, x=input, b=bias, g=gradient: self.gradients(o, x, b, g)  # type: ignore[misc]
                )
            else:
                made.append(
                    lambda x=input, b=bias, g=gradient: self.gradients(self(x, b), x, b, g)  # type: ignore[misc]
                )
        return made


def prepare(case: Case, implementation: str) -> Prepared:
    """An implementation of a case."""
    if implementation == "cudnn":
        normalization = case.normalization
        assert normalization is not None
        return Prepared(case, implementation, lambda input, bias: cudnn.local_response_norm(input, normalization))
    if implementation == "xla":
        assert case.normalization is not None
        assert case.pooling is not None
        return Prepared(case, implementation, xla.Stage(case.normalization, case.pooling))
    run = case.operator()
    if IMPLEMENTATIONS[implementation][1]:
        run = torch.compile(run, dynamic=False)
    return Prepared(case, implementation, run)


@lru_cache(maxsize=1)
def _in_float64(
    case: Case, images: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The checked batch in float64, by PyTorch's operators: output, its gradient, and the gradients of the inputs. All
    implementations of a case are compared with the same."""
    tensors = inputs(case, images, dtype, "contiguous", device, seed=CHECKED)
    input, bias = (None if tensor is None else tensor.detach().double().requires_grad_() for tensor in tensors)
    assert input is not None
    oracle = prepare(case, "aten")
    output = oracle(input, bias)
    generator = torch.Generator(device).manual_seed(2)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64, device=device)
    return output.detach(), gradient, oracle.gradients(output, input, bias, gradient)


def check(
    prepared: Prepared, images: int, dtype: torch.dtype, device: torch.device, modes: Sequence[str] = MODES
) -> None:
    """Compare output and gradients of a batch with PyTorch's operators in float64.

    The batch is the timed one, because another one would be compiled separately. Without ``inference`` among the modes,
    nothing is called without a gradient, because that would be compiled separately too.

    Raises:
        WrongResultError: relative differences, by norm, of more than 1e-4 in float32, 2e-2 in bfloat16; gradients of
            bfloat16 may differ by 1e-1, because PyTorch's own operators round before they compare.
    """
    case = prepared.case
    exact, gradient, theirs = _in_float64(case, images, dtype, device)
    input, bias = inputs(case, images, dtype, formats(prepared.implementation, device), device, seed=CHECKED)
    output = prepared(input, bias)
    half = dtype != torch.float32
    outputs_allowed, gradients_allowed = (2e-2, 1e-1) if half else (1e-4, 1e-4)
    compared = [("output", output, exact, outputs_allowed)]
    # In the timed gradient's memory format: another one would be compiled separately too.
    ours = prepared.gradients(output, input, bias, torch.empty_like(output).copy_(gradient))
    for name, one, other in zip(("input gradient", "bias gradient"), ours, theirs, strict=False):
        compared.append((name, one, other, gradients_allowed))
    if "inference" in modes:
        with torch.no_grad():
            plain = prepared(input.detach(), None if bias is None else bias.detach())
        compared.append(("output without a gradient", plain, exact, outputs_allowed))
    for name, one, other, most in compared:
        difference = float((one.detach().double() - other.detach()).norm() / other.detach().norm())
        if not difference <= most:
            raise WrongResultError(f"{name} differs by {difference:.1e} of its norm, {most:g} is allowed")


def may_refuse(implementation: str, reason: str) -> bool:
    """Whether an implementation that could not be timed is excused.

    PyTorch's own operators and cuDNN's may refuse a dtype. Wrong results are not excused, and neither are our failures.
    """
    return reason == NEEDS_GPU or (IMPLEMENTATIONS[implementation][0] == "aten" and "WrongResultError" not in reason)


def describe(case: Case, implementation: str, mode: str, images: int, dtype: str, format: str) -> dict[str, Any]:
    """The columns that say what a row measures."""
    return {
        "suite": "kernels",
        "case": case.name,
        "implementation": implementation,
        "mode": mode,
        "shape": f"{images}x{case.channels}x{case.size}x{case.size}",
        "dtype": dtype,
        "memory_format": format,
        "images": images,
    }


def sampled(
    rivals: Sequence[Prepared], mode: str, images: int, dtype: torch.dtype, device: torch.device, samples: int
) -> list[list[float] | str]:
    """Seconds per call of each rival of a case, sampled interleaved, each in its fastest memory format.

    If one fails, they are sampled one by one; those that fail again return their status.
    """
    try:
        return list(_sampled(rivals, mode, images, dtype, device, samples))
    except Exception as error:  # Any error becomes the row's status.
        if len(rivals) == 1:
            return [failure(error)]
        print(
            f"{mode} of {rivals[0].case.name}: sampled one by one, because together they {failure(error)}", flush=True
        )
    return [found for rival in rivals for found in sampled([rival], mode, images, dtype, device, samples)]


def _sampled(
    rivals: Sequence[Prepared], mode: str, images: int, dtype: torch.dtype, device: torch.device, samples: int
) -> list[list[float]]:
    case = rivals[0].case
    # On a GPU, the calls alternate between inputs, so that none is in the cache.
    count = copies(case.work(images, dtype)[mode].bytes) if device.type == "cuda" else 1

    def calls(rival: Prepared) -> list[Callable[[], object]]:
        format = formats(rival.implementation, device)
        return rival.calls(mode, [inputs(case, images, dtype, format, device, seed) for seed in range(count)])

    # XLA's calls cannot be captured with the others.
    apart = [rival for rival in rivals if device.type == "cuda" and rival.implementation == "xla"]
    captured = [rival for rival in rivals if rival not in apart]
    found = dict(zip(captured, seconds([calls(rival) for rival in captured], device, samples), strict=True))
    found |= {rival: xla.gpu_seconds(calls(rival), samples) for rival in apart}
    return [found[rival] for rival in rivals]


def kept(prepared: Prepared, images: int, dtype: torch.dtype, device: torch.device) -> float:
    """MiB that a forward pass saves for backward."""
    input, bias = inputs(prepared.case, images, dtype, formats(prepared.implementation, device), device)
    return round(kept_bytes(lambda: prepared(input, bias), ()) / 2**20, 2)


def formats(implementation: str, device: torch.device) -> str:
    """An implementation's fastest memory format; for cuDNN, the only one in use."""
    if implementation == "cudnn":
        return "contiguous"
    return CPU_FORMAT.get(implementation, "channels_last") if device.type == "cpu" else "channels_last"
