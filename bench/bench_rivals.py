"""Inference of the paper's network by what a user would take instead: ours and PyTorch's operators compiled, ONNX
Runtime and OpenVINO with the file that ``net.export`` writes. All compute in float32, with equal outputs, on as many
threads, in turns."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from net.model.alexnet import AlexNet

from . import rivals
from .cases import failure, many_variants
from .ceilings import Ceilings
from .installed import NotInstalledError
from .network import build, describe_step, images_and_labels
from .rivals import Inference

Row = Callable[..., None]
Together = Callable[..., list[dict[str, Any]]]
Say = Callable[[str], None]
NETWORK = "paper"
BATCHES = (1, 16, 64)
#: Rounds of a batch, and the seconds after which there are no more once there are enough.
ROUNDS, ENOUGH, SECONDS = 30, 5, 12.0
RUNTIMES = {"onnxruntime": rivals.onnxruntime, "openvino": rivals.openvino}
COMPILED = ("auto", "aten")


@cache
def network() -> AlexNet:
    return build(NETWORK, torch.device("cpu")).eval()


@cache
def exported() -> bytes:
    return rivals.exported(network())


@cache
def compiled(implementation: str) -> Callable[[Tensor], Tensor]:
    """Compiled once for all batches, as a user's calls compile it: for one image, then for any number."""
    return torch.compile(network())


def ready(implementation: str, images: Tensor) -> Inference:
    """The first call is over: what is to be compiled has been."""
    if implementation in RUNTIMES:
        return RUNTIMES[implementation](exported(), images)
    forward = compiled(implementation)

    def infer() -> Tensor:
        with torch.inference_mode(), kernels.implementation(implementation), many_variants():
            return forward(images)

    infer()
    return infer


@cache
def measured(count: int, names: tuple[str, ...], say: Say) -> dict[str, list[float] | Exception]:
    """Seconds of one inference of each implementation, sampled in turns; or why it has none."""
    images, _ = images_and_labels(NETWORK, count, torch.device("cpu"))
    expected = rivals.in_float64(network(), images)
    found: dict[str, list[float] | Exception] = {}
    calls: dict[str, Inference] = {}
    for name in names:
        compiles = ", which takes up to a minute to compile" if name in COMPILED else ""
        say(f"inference of {count} images: the first by {name}{compiles}")
        try:
            calls[name] = ready(name, images)
            rivals.agree(calls[name](), expected)
        except Exception as error:  # It is the row's status; the others go on.
            calls.pop(name, None)
            found[name] = error
    say(f"inference of {count} images: {', '.join(calls)} in turns")
    return found | in_turns(calls)


def in_turns(calls: dict[str, Inference]) -> dict[str, list[float]]:
    """Seconds of each call, the second of two: the first finds in the caches what another has left there."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for round in range(ROUNDS if calls else 0):
        if round >= ENOUGH and time.perf_counter() - begin > SECONDS:
            break
        for name, call in calls.items():
            call()
            before = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - before)
    return times


def _cells() -> list[object]:
    names = (*COMPILED, *RUNTIMES)
    long = {name: [pytest.mark.long] if name in COMPILED else [] for name in names}
    return [pytest.param(images, name, marks=long[name]) for images in BATCHES for name in names]


@pytest.mark.skipif(torch.cuda.is_available(), reason="these runtimes are measured on CPUs")
@pytest.mark.parametrize(("images", "implementation"), _cells())
def test_inference(
    together: Together,
    replay: Callable[[list[float]], None],
    row: Row,
    ceilings: Ceilings,
    cold_compiler: None,
    say: Say,
    images: int,
    implementation: str,
) -> None:
    """Images a second beside the share of this processor's rate in large products."""
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
