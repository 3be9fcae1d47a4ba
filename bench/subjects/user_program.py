"""A user's own program, controlled by another process: ``python -m bench.subjects.user_program 16``.

It runs stages 1 and 2 of the paper's network, forward and backward, on a CPU. It imports only PyTorch and
:mod:`kernels`, and keeps the default thread and memory settings. A line on stdin is ``time`` or ``scratch`` and one of
:data:`IMPLEMENTATIONS`. The answer is a line of JSON: the seconds of one call, or the memory that it takes beyond its
inputs and results.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernels

#: Name: the switch of :mod:`kernels`, whether the caller is compiled, and its fastest memory format. They are compiled
#: in this order: ``auto, compiled`` contains the loops of ``inductor`` and finds them in the compiler's cache.
IMPLEMENTATIONS = {
    "auto, eager": ("auto", False, torch.channels_last),
    "aten, eager": ("aten", False, torch.contiguous_format),
    "inductor": ("inductor", False, torch.channels_last),
    "aten, compiled": ("aten", True, torch.contiguous_format),
    "auto, compiled": ("auto", True, torch.channels_last),
}
#: Channels, rows and columns.
SHAPES = ((96, 55, 55), (256, 27, 27))


def stage(input: Tensor, bias: Tensor) -> Tensor:
    return kernels.relu_lrn_max_pool2d(input, size=5, alpha=5e-4, beta=0.75, k=2.0, groups=2, bias=bias)


class Stage:
    """One stage with an implementation, its inputs and its output's gradient."""

    def __init__(self, name: str, images: int, shape: tuple[int, int, int]) -> None:
        self.switch, compiled, format = IMPLEMENTATIONS[name]
        self.function: Callable[[Tensor, Tensor], Tensor] = torch.compile(stage, dynamic=False) if compiled else stage
        generator = torch.Generator().manual_seed(0)
        # Large enough that the normalization's sums are about as large as k.
        input = torch.randn(images, *shape, generator=generator) * 60
        self.input = input.contiguous(memory_format=format).requires_grad_()
        self.bias = torch.randn(shape[0], generator=generator).requires_grad_()
        self.gradient = torch.ones_like(self.forward())

    def forward(self) -> Tensor:
        with kernels.implementation(self.switch):
            return self.function(self.input, self.bias)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, (self.input, self.bias), self.gradient)

    def scratch(self) -> tuple[int, int]:
        """A call's peak bytes beyond its inputs, output and gradients, and the bytes of its input."""
        output, (forward, held) = allocated(self.forward)
        gradients, (backward, _) = allocated(lambda: self.backward(output))
        # What forward saves for backward is allocated beyond its output.
        kept = held - output.nbytes
        most = max(forward - output.nbytes, kept + backward - sum(one.nbytes for one in gradients))
        return most, self.input.nbytes


def allocated(call: Callable[[], Any]) -> tuple[Any, tuple[int, int]]:
    """A call's result, and the peak and the remaining increase of the process's memory in bytes.

    Counted by the kernel in pages, because PyTorch's profiler sees only the calling thread. Linux with glibc.
    """
    trim = ctypes.CDLL(None).malloc_trim
    # Otherwise memory freed earlier would be reused without being counted.
    trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        # Resets the peak.
        file.write("5")
    before = _resident("VmRSS")
    result = call()
    most = _resident("VmHWM") - before
    trim(0)
    return result, (most, _resident("VmRSS") - before)


def _resident(which: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{which}:"))


def main() -> None:
    images = int(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    # Libraries may print to stdout; answers go to a copy of it.
    os.dup2(2, 1)
    ready: dict[str, list[Stage]] = {}
    for line in sys.stdin:
        what, _, name = line.strip().partition(" ")
        if name not in ready:
            ready[name] = [Stage(name, images, shape) for shape in SHAPES]
        stages = ready[name]
        answer: dict[str, Any]
        if what == "scratch" and not os.access("/proc/self/clear_refs", os.W_OK):
            answer = {}
        elif what == "scratch":
            found = [one.scratch() for one in stages]
            answer = {
                "scratch_mib": round(max(most for most, _ in found) / 2**20, 2),
                "scratch_percent_of_input": round(max(100 * most / given for most, given in found), 1),
            }
        else:
            begin = time.perf_counter()
            outputs = [one.forward() for one in stages]
            gradients = [one.backward(output) for one, output in zip(stages, outputs, strict=True)]
            answer = {"seconds": time.perf_counter() - begin, "threads": torch.get_num_threads()}
            del outputs, gradients
        try:
            print(json.dumps(answer), file=answers, flush=True)
        except BrokenPipeError:
            # The parent is gone.
            os._exit(1)


if __name__ == "__main__":
    main()
