"""Inference of the paper's network with the alternatives a user has: our operators and PyTorch's, compiled, and ONNX
Runtime and OpenVINO with the file that ``net.export`` writes. Convolutions and dense layers of the first two are the
same. All compute in float32, with equal outputs, on the same number of threads, interleaved."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from net.model.alexnet import AlexNet

from .cells import RUNTIME_BATCHES, RUNTIMES
from .measure.ceilings import Ceilings
from .subjects import rivals
from .subjects.cases import failure, many_variants
from .subjects.installed import NotInstalledError
from .subjects.network import build, describe_step, images_and_labels
from .subjects.rivals import Inference

Row = Callable[..., None]
Together = Callable[..., list[dict[str, Any]]]
Say = Callable[[str], None]
NETWORK = "paper"
#: Maximum rounds per batch size; after this many seconds it ends, once there are ENOUGH.
ROUNDS, ENOUGH, SECONDS = 30, 4, 6.0
#: Images whose logits are compared with float64's.
CHECKED = 4
#: Seconds of a call for which the contents of the caches no longer matter.
SHORT = 0.1
OTHERS = {"onnxruntime": rivals.onnxruntime, "openvino": rivals.openvino}
COMPILED = tuple(name for name in RUNTIMES if name not in OTHERS)


@cache
def network() -> AlexNet:
    return build(NETWORK, torch.device("cpu")).eval()


@cache
def exported() -> bytes:
    return rivals.exported(network())


@cache
def compiled(implementation: str) -> Callable[[Tensor], Tensor]:
    """Compiled once for all batch sizes, as in a user's program: first for one image, then for a dynamic batch."""
    return torch.compile(network())


def ready(implementation: str, images: Tensor) -> Inference:
    """The inference call, after a first run that compiles it, or reads it from Inductor's cache."""
    if implementation in OTHERS:
        return OTHERS[implementation](exported(), images)
    forward = compiled(implementation)

    def infer() -> Tensor:
        with torch.inference_mode(), kernels.implementation(implementation), many_variants():
            return forward(images)

    infer()
    return infer


@cache
def measured(count: int, names: tuple[str, ...], say: Say) -> dict[str, list[float] | Exception]:
    """Seconds per inference of each implementation, sampled interleaved; or the error."""
    images, _ = images_and_labels(NETWORK, count, torch.device("cpu"))
    expected = rivals.in_float64(network(), images[:CHECKED])
    found: dict[str, list[float] | Exception] = {}
    calls: dict[str, Inference] = {}
    for name in names:
        say(f"inference of {count} images: the first by {name}")
        try:
            calls[name] = ready(name, images)
            rivals.agree(calls[name]()[:CHECKED], expected)
        except Exception as error:  # It becomes the row's status; the others continue.
            calls.pop(name, None)
            found[name] = error
    say(f"inference of {count} images: {', '.join(calls)}, interleaved")
    return found | in_turns(calls)


def in_turns(calls: dict[str, Inference]) -> dict[str, list[float]]:
    """Seconds of each call. Of two short calls, the second counts: the first finds other data in the caches."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for round in range(ROUNDS if calls else 0):
        if round >= ENOUGH and time.perf_counter() - begin > SECONDS:
            break
        for name, call in calls.items():
            if not times[name] or times[name][-1] < SHORT:
                call()
            before = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - before)
    return times


def _cells() -> list[object]:
    marks = {
        name: [pytest.mark.long, pytest.mark.ahead("inference", name)] if name in COMPILED else [] for name in RUNTIMES
    }
    return [pytest.param(images, name, marks=marks[name]) for images in RUNTIME_BATCHES for name in RUNTIMES]


@pytest.mark.skipif(torch.cuda.is_available(), reason="these runtimes are measured on CPUs")
@pytest.mark.parametrize(("images", "implementation"), _cells())
@pytest.mark.usefixtures("compiled_ahead")
def test_inference(
    together: Together,
    replay: Callable[[list[float]], None],
    row: Row,
    ceilings: Ceilings,
    say: Say,
    images: int,
    implementation: str,
) -> None:
    """Images per second, and the fraction of this processor's rate in large matrix products."""
    how = "compiled" if implementation in COMPILED else ""
    described, work = describe_step("inference", NETWORK, implementation, how, "float32", images)
    row(**described, work=work, threads=torch.get_num_threads())
    if not how:
        # The file's own layout; the runtimes choose theirs.
        row(implementation=implementation, memory_format="contiguous")
    names = tuple(cell["implementation"] for cell in together(test_inference, {"images": images}))
    found = measured(images, names, say)[implementation]
    if isinstance(found, Exception):
        row(status=failure(found))
        if isinstance(found, NotInstalledError):
            pytest.skip(str(found))
        raise found
    replay(found)
