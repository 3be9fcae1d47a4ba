"""Eager calls on a CPU: pieces, worker threads, and what must not reach them."""

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import kernels
from kernels import aten, autograd, cpu, threads
from kernels.arguments import Normalization, Pooling

WINDOW = Normalization(5, 0.5, 0.75, 2.0, 2)
POOL = Pooling((3, 3), (2, 2), (0, 0), (1, 1), False)
WIDE = Pooling((4, 9), (1, 3), (2, 4), (1, 1), True)
CHAINS: list[tuple[bool, Normalization | None, Pooling | None]] = [
    (True, WINDOW, POOL),
    (True, WINDOW, None),
    (True, None, POOL),
    (False, WINDOW, WIDE),
    *(
        (True, Normalization(size, 0.7, beta, 1.5, 1), None)
        for size, beta in itertools.product((1, 2, 3, 4, 6, 9), (0.75, 0.6))
    ),
]
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def inputs(format: torch.memory_format, dtype: torch.dtype = torch.float64, images: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(images, 6, 9, 7, generator=generator, dtype=torch.float64) * 2
    bias = torch.randn(6, generator=generator, dtype=torch.float64)
    return input.to(dtype).contiguous(memory_format=format).requires_grad_(), bias.to(dtype).requires_grad_()


def results(function: Any, input: Tensor, bias: Tensor, parts: tuple[Any, ...]) -> list[Tensor]:
    output = function(input, bias, *parts)
    gradient = torch.cos(torch.arange(output.numel(), dtype=torch.float64)).view(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, [input, bias], gradient)]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("piece", [40, 6 * 9 * 7, 3 * 6 * 9 * 7], ids=["parts of an image", "an image", "three images"])
def test_every_piece_is_pytorch_s(
    monkeypatch: pytest.MonkeyPatch, three_threads: None, piece: int, format: torch.memory_format
) -> None:
    """In float64, with pieces of unequal size; the buffers hold NaN where nothing was written."""
    monkeypatch.setattr(cpu, "_PIECE", piece)
    monkeypatch.setattr(torch, "empty", lambda *a, _empty=torch.empty, **k: poisoned(_empty(*a, **k)))
    input, bias = inputs(format)
    for parts in CHAINS:
        ours, theirs = results(autograd.run, input, bias, parts), results(aten.forward, input, bias, parts)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert ours[0].is_contiguous(memory_format=format), parts
        assert ours[1].stride() == input.stride(), parts


def test_rows_of_wide_images_are_found() -> None:
    """The gradient of a row's first element, whose number times 1 / 41 is just below the row in float32."""
    assert torch.tensor(41.0).mul(1 / 41).floor() == 0
    input = torch.linspace(1, 0, 41).repeat(1, 8, 5, 1) + torch.linspace(0, 1, 5)[:, None]
    input, bias = input.requires_grad_(), torch.zeros(8, requires_grad=True)
    parts = (False, None, POOL)
    ours, theirs = results(autograd.run, input, bias, parts)[1], results(aten.forward, input, bias, parts)[1]
    assert theirs[0, 0, 2, 0] != 0
    assert torch.equal(ours, theirs)


def poisoned(tensor: Tensor) -> Tensor:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(101)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("parts", CHAINS[:4] + CHAINS[-1:], ids=str)
def test_bits_depend_on_neither_batch_nor_threads(
    monkeypatch: pytest.MonkeyPatch, three_threads: None, parts: tuple[Any, ...], format: torch.memory_format
) -> None:
    """float32, where a loop's vectors and its rest might round differently."""
    monkeypatch.setattr(cpu, "_PIECE", 2 * 6 * 9 * 7)
    input, bias = inputs(format, torch.float32)
    whole = results(autograd.run, input, bias, parts)
    torch.set_num_threads(1)
    for one, other in zip(results(autograd.run, input, bias, parts), whole, strict=True):
        assert torch.equal(one, other)
    for image in range(len(input)):
        output = autograd.run(input.detach()[image : image + 1], bias.detach(), *parts)
        assert torch.equal(output, whole[0][image : image + 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_is_not_finite_stays_in_its_group(format: torch.memory_format, value: float) -> None:
    """The last channel of the first group is next to the gap."""
    input, bias = inputs(format)
    with torch.no_grad():
        input[:, 2, 4, 3] = value
    ours, theirs = (results(f, input, bias, (True, WINDOW, None)) for f in (autograd.run, aten.forward))
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert ours[0][:, 3:].isfinite().all()
    assert ours[1][:, 3:].isfinite().all()


def test_the_caller_keeps_its_threads(three_threads: None) -> None:
    """And so do threads that begin later; the workers have one each."""
    found: list[int] = []
    threads.run(lambda: found.append(torch.get_num_threads()), 3)
    assert found == [1, 1, 1]
    assert torch.get_num_threads() == 3
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found[-1] == 3


def test_a_worker_s_exception_is_the_caller_s(three_threads: None) -> None:
    with pytest.raises(ZeroDivisionError):
        threads.run(lambda: [][1 // 0], 3)
    done: list[int] = []
    threads.run(lambda: done.append(1), 3)
    assert sum(done) == 3


def test_several_callers_at_once(monkeypatch: pytest.MonkeyPatch, three_threads: None) -> None:
    monkeypatch.setattr(cpu, "_PIECE", 6 * 9 * 7)
    input, bias = inputs(FORMATS[0], torch.float32)
    exact = autograd.run(input, bias, True, WINDOW, POOL).detach()
    found: list[bool] = []

    def call(count: int) -> None:
        # A caller with other threads has the workers made anew.
        torch.set_num_threads(count)
        found.extend(torch.equal(autograd.run(input, bias, True, WINDOW, POOL), exact) for _ in range(20))

    callers = [threading.Thread(target=call, args=(count,)) for count in (2, 3, 4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [True] * 60


def test_inference_mode(monkeypatch: pytest.MonkeyPatch, three_threads: None) -> None:
    monkeypatch.setattr(cpu, "_PIECE", 6 * 9 * 7)
    input, bias = inputs(FORMATS[0])
    exact = autograd.run(input, bias, True, WINDOW, POOL)
    with torch.inference_mode():
        assert torch.equal(autograd.run(input, bias, True, WINDOW, POOL), exact)
        of_inference = input.clone()
        assert torch.equal(autograd.run(of_inference, bias, True, WINDOW, POOL), exact)
    with torch.no_grad():
        assert torch.equal(autograd.run(of_inference, bias, True, WINDOW, POOL), exact)


def test_what_records_sees_every_operator(monkeypatch: pytest.MonkeyPatch, three_threads: None) -> None:
    """A mode belongs to its thread: with one nothing may run on another."""
    monkeypatch.setattr(cpu, "_PIECE", 6 * 9 * 7)
    input, _ = inputs(FORMATS[0])
    graph = make_fx(lambda x: kernels.relu_lrn_max_pool2d(x, 5, 0.5, 0.75, 2.0))(input.detach())
    other = input.detach() + 1
    torch.testing.assert_close(graph(other), kernels.relu_lrn_max_pool2d(other, 5, 0.5, 0.75, 2.0))


ALONE = """
import os, threading, torch, kernels
assert threading.active_count() == 1, "importing starts threads"
torch.set_num_threads(2)
x = torch.randn(8, 64, 64, 32)
y = kernels.local_response_norm(x, 5)
assert any(each.name.startswith("kernels") for each in threading.enumerate()), "no workers"
child = os.fork()
if child == 0:
    same = torch.equal(kernels.local_response_norm(x, 5), y)
    os._exit(0 if same else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_importing_starts_nothing_and_a_fork_starts_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE], timeout=250, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert done.returncode == 0
