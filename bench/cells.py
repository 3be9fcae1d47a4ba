"""What is measured: one list, which pytest (``bench_*.py``) and the device suite (:mod:`bench.suite`) both read.

A cell is one row of a record. The lists depend on the device: a GPU runs what GPUs are used for, most important first;
a CPU, where compiling the whole network takes a minute and a half, runs less.
"""

import importlib.util
import itertools
from typing import NamedTuple

import torch

from .subjects.cases import CASES, DTYPES, IMPLEMENTATIONS, MODES, implementations
from .subjects.network import TORCHVISION
from .subjects.steps import Step

#: A large batch size, in addition to the paper's 128.
LARGE = 1024


class Scale(NamedTuple):
    """The device, the batch size and the network; ``toy`` for meaningless sizes that only show that everything runs."""

    device: str
    images: int
    network: str
    toy: bool = False

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def ours(self) -> str:
        """The implementation of this project's operators."""
        return "triton" if self.cuda else "reference" if self.toy else "auto"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.cuda else "float32"

    @property
    def best(self) -> str:
        """The fastest way to run this project's network."""
        return "recorded" if self.cuda or self.toy else "compiled"

    @property
    def compiled(self) -> str:
        """The fastest way to run other networks' updates that compiles in half a minute."""
        return "default, recorded" if self.cuda else "eager" if self.toy else "compiled"


def here() -> Scale:
    """This machine, for pytest: the paper's network, on a GPU with the paper's batch size, on a CPU a smaller one."""
    return Scale("cuda", 128, "paper") if torch.cuda.is_available() else Scale("cpu", 16, "paper")


def updates(scale: Scale) -> list[Step]:
    """Training steps."""
    network, ours, best, compiled = scale.network, scale.ours, scale.best, scale.compiled
    dtype, images = scale.dtype, scale.images
    if scale.toy:
        chosen = [(network, ours, best, dtype, images), (network, "aten", compiled, dtype, images)]
    elif scale.cuda:
        torchvision = [compiled] if _torchvision() else []
        chosen = [
            (network, ours, best, dtype, images),
            (network, ours, best, dtype, LARGE),
            (network, ours, "nondeterministic, recorded", dtype, images),
            (network, "aten", compiled, dtype, images),
            *((TORCHVISION, "aten", how, dtype, images) for how in torchvision),
            (network, "aten", compiled, dtype, LARGE),
            (network, ours, best, "float32", images),
            *((TORCHVISION, "aten", how, dtype, LARGE) for how in torchvision),
            (network, ours, "eager", dtype, images),
            (network, "aten", "eager", dtype, images),
            (network, ours, compiled, dtype, images),
            (network, "aten", compiled, "float32", images),
            ("one_weird_trick", "aten", compiled, dtype, images),
        ]
    else:
        chosen = [
            (network, "aten", "eager", dtype, images),
            (network, ours, "eager", dtype, images),
            (network, "aten", compiled, dtype, images),
            (network, ours, compiled, dtype, images),
            (network, ours, "eager", "bfloat16", images),
            ("one_weird_trick", "aten", "eager", dtype, images),
        ]
    return [Step("update", *each) for each in chosen]


def inference(scale: Scale) -> list[Step]:
    """Logits without a gradient."""
    how = "reduce-overhead" if scale.cuda else "eager"
    batches = (scale.images, 1, LARGE) if scale.cuda else (scale.images,)
    pairs = [(name, images) for images in batches for name in (scale.ours, "aten")]
    pairs += [] if scale.cuda or scale.toy else [(scale.ours, 1)]
    return [Step("inference", scale.network, name, how, scale.dtype, images) for name, images in pairs]


def profiled(scale: Scale) -> list[Step]:
    """The training steps that are profiled: ours, PyTorch's compiled one, and one without normalization."""
    network, dtype, images = scale.network, scale.dtype, scale.images
    chosen = [(network, scale.ours, scale.best)]
    if not scale.toy:
        chosen += [(network, "aten", scale.compiled), ("one_weird_trick", "aten", scale.compiled)]
    return [Step("update", *each, dtype, images) for each in chosen]


def autotuned(scale: Scale) -> list[Step]:
    """Training steps that Inductor autotunes first, which takes minutes: torchvision's, captured as ours is, then ours.

    Nothing compiles them ahead: Inductor would time its variants while other processes use the GPU.
    """
    if scale.toy:
        chosen = [(scale.network, scale.ours, "eager", scale.images)]
    else:
        how = "max-autotune-no-cudagraphs, recorded"
        batches = (scale.images, LARGE) if _torchvision() else ()
        chosen = [(TORCHVISION, "aten", how, images) for images in batches]
        chosen.append((scale.network, scale.ours, "max-autotune", scale.images))
    return [Step("update", name, code, how, scale.dtype, images) for name, code, how, images in chosen]


def _torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


class Operator(NamedTuple):
    """An operator at one of the paper's layers, in one mode; its case is a name in :mod:`bench.subjects.cases`."""

    case: str
    dtype: str
    mode: str
    implementation: str

    @property
    def compiled(self) -> bool:
        """Whether compiling it takes half a minute on a CPU."""
        return IMPLEMENTATIONS[self.implementation][1] or self.implementation == "inductor"


def modes(implementation: str, scale: Scale) -> tuple[str, ...]:
    """The measured modes; on a CPU no inference of compiled callers, which would take half a minute to compile."""
    caller_compiled = IMPLEMENTATIONS[implementation][1]
    return tuple(mode for mode in MODES if mode != "inference" or not caller_compiled or scale.cuda or scale.toy)


#: On a CPU, compiled code is measured only for whole stages (in bfloat16 only stage 1), and PyTorch's own operators
#: only in float32. ``traced``, the formula in a compiled caller's graph, costs the same as ``inductor`` minus one call.
COMPILED_ON_A_CPU, HALF_ON_A_CPU = ("stage1", "stage2"), ("stage1",)


def operators(scale: Scale) -> list[Operator]:
    """Every operator that is measured, ordered by dtype, case and mode."""
    cells = []
    dtypes = ("bfloat16", "float32") if scale.cuda else tuple(DTYPES)
    # On a GPU, the formula is never called eagerly in practice.
    left_out = "reference" if scale.cuda else ""
    for dtype, case, mode in itertools.product(dtypes, CASES[1:2] if scale.toy else CASES, MODES):
        for name in (scale.ours, "aten") if scale.toy else implementations(case, torch.device(scale.device)):
            cell = Operator(case.name, dtype, mode, name)
            if name != left_out and mode in modes(name, scale) and (scale.cuda or scale.toy or _on_a_cpu(cell)):
                cells.append(cell)
    return cells


def _on_a_cpu(cell: Operator) -> bool:
    if cell.compiled and cell.case not in COMPILED_ON_A_CPU:
        return False
    return cell.dtype != "bfloat16" or (cell.case in HALF_ON_A_CPU and not IMPLEMENTATIONS[cell.implementation][1])


#: Batch sizes at which a CPU's runtimes are compared, and the forms of our and PyTorch's operators next to them.
RUNTIME_BATCHES = (1, 16, 64)
RUNTIMES = ("auto", "aten", "onnxruntime", "openvino")
