"""Whole networks, ready to be called: training steps and inference, eager, compiled or captured as a CUDA graph."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..measure.implementations import NONDETERMINISTIC
from ..measure.records import time_columns
from ..measure.timing import chained_seconds, wall_seconds
from ..predict.roofline import Work
from .network import build_any, describe_step, images_and_labels, inference_step, training_step, update_step

#: Beginnings of ``how`` without ``torch.compile``.
UNCOMPILED = ("eager", "recorded", "unrecorded", NONDETERMINISTIC)


class Step(NamedTuple):
    """A whole network's ``update`` or ``inference`` (``what``).

    ``how`` is eager or a mode of ``torch.compile`` (compiled: its default), followed by ``, recorded`` if the whole
    step is captured as a CUDA graph, as in net.train. ``recorded`` alone is the eager network captured, ``unrecorded``
    the same kernels launched by the host. ``nondeterministic, recorded`` lets cuDNN use all of its algorithms, as
    net.train does not.
    """

    what: str
    network: str
    implementation: str
    how: str
    dtype: str
    images: int

    def describe(self) -> tuple[dict[str, object], Work]:
        """The columns that name it in a record, and the work that it must do."""
        return describe_step(self.what, self.network, self.implementation, self.how, self.dtype, self.images)

    @property
    def mode(self) -> str:
        """The mode of ``torch.compile``; empty where nothing is compiled."""
        mode, _, _ = self.how.partition(", ")
        return "" if mode in UNCOMPILED else mode.replace("compiled", "default")

    @property
    def name(self) -> str:
        return f"{self.what} of {self.network}, {self.implementation}, {self.how}, {self.dtype}, {self.images}"


def prepared(step: Step, device: torch.device) -> tuple[Callable[[], object], torch.nn.Module]:
    """The measured call, and its network. Compiling starts from Inductor's cache on disk."""
    # Has cuDNN use deterministic algorithms.
    model = build_any(step.network, device).train(step.what == "update")
    if step.how.startswith(NONDETERMINISTIC):
        torch.backends.cudnn.deterministic = False
    forward: Callable[[Tensor], Tensor] = model
    if step.mode:
        torch._dynamo.reset()
        forward = torch.compile(model, mode=step.mode, dynamic=False)
    images, labels = images_and_labels(step.network, step.images, device)
    if step.how.endswith("recorded"):
        record = device.type == "cuda" and not step.how.endswith("unrecorded")
        return training_step(model, forward, images, labels, step.dtype, record=record), model
    if step.what == "update":
        return update_step(model, forward, images, labels, step.dtype), model
    return inference_step(forward, images, step.dtype), model


def timed(step: Step, device: torch.device, samples: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds from the end of one call to the end of the next, and further columns.

    On a GPU the columns hold ``synchronized_us``, the time with a synchronization after each call, ``peak_mib``, and
    the seconds of the first call with a warm compiler cache. The caller has selected the implementation.
    """
    begin = time.perf_counter()
    call, _ = prepared(step, device)
    call()
    if device.type != "cuda":
        return wall_seconds(call, samples, 1), {}
    torch.cuda.synchronize()
    first = round(time.perf_counter() - begin, 1)
    torch.cuda.reset_peak_memory_stats()
    # The second call may record a graph.
    seconds = chained_seconds(call, samples, warmup=10)
    synchronized = time_columns(wall_seconds(call, samples))["median_us"]
    peak = round(torch.cuda.max_memory_allocated() / 2**20)
    return seconds, {"synchronized_us": synchronized, "peak_mib": peak, "first_call_warm_s": first}
