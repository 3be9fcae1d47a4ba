"""What cuDNN is told, held against a stand-in that reads the tensors the way its documentation says."""

# ruff: noqa: N802, N815

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.subjects import cudnn
from bench.subjects.cases import CASES, check, implementations, prepare

CPU = torch.device("cpu")
LRN = next(case for case in CASES if case.name == "lrn1")


class StandIn:
    """cuDNN's functions on the CPU's memory, for float32: what they are given is all they know."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.known: list[Any] = [None]

    def _create(self, handle: Any, value: Any = None) -> int:
        self.known.append(value)
        handle._obj.value = len(self.known) - 1
        return 0

    cudnnCreate = cudnnCreateLRNDescriptor = cudnnCreateTensorDescriptor = _create

    def cudnnSetStream(self, handle: Any, stream: Any) -> int:
        assert handle.value
        assert stream.value == 7
        return 0

    def cudnnSetLRNDescriptor(self, descriptor: Any, size: Any, alpha: Any, beta: Any, k: Any) -> int:
        self.known[descriptor.value] = (size.value, alpha.value, beta.value, k.value)
        return 0

    def cudnnSetTensor4dDescriptor(self, descriptor: Any, format: int, dtype: int, *shape: int) -> int:
        assert (format, dtype) == (0, 0)
        self.known[descriptor.value] = shape
        return 0

    def _tensor(self, descriptor: Any, pointer: Any) -> torch.Tensor:
        shape = self.known[descriptor.value]
        memory = (ctypes.c_float * int(np.prod(shape))).from_address(pointer.value)
        return torch.from_numpy(np.ctypeslib.as_array(memory).reshape(shape))

    def cudnnLRNCrossChannelForward(self, handle: Any, lrn: Any, mode: int, one: Any, *rest: Any) -> int:
        if self.refuses == "forward":
            return 3000
        x, (zero, *y) = self._tensor(*rest[:2]), rest[2:]
        assert (mode, one._obj.value, zero._obj.value) == (0, 1.0, 0.0)
        self._tensor(*y).copy_(F.local_response_norm(x, *self.known[lrn.value]))
        return 0

    def cudnnLRNCrossChannelBackward(self, handle: Any, lrn: Any, mode: int, one: Any, *rest: Any) -> int:
        y, dy, x = (self._tensor(*rest[i : i + 2]) for i in (0, 2, 4))
        zero, *dx = rest[6:]
        assert (mode, one._obj.value, zero._obj.value) == (0, 1.0, 0.0)
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            exact = F.local_response_norm(x, *self.known[lrn.value])
        torch.testing.assert_close(y, exact.detach())
        self._tensor(*dx).copy_(torch.autograd.grad(exact, x, dy)[0])
        return 0


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    found = StandIn()
    for cached in (cudnn.library, cudnn._handle, cudnn._normalization, cudnn._tensor):
        cached.cache_clear()
    monkeypatch.setattr(cudnn, "library", lambda: found)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    yield found
    for cached in (cudnn._handle, cudnn._normalization, cudnn._tensor):
        cached.cache_clear()


def test_forward_and_gradient(stand_in: StandIn) -> None:
    """With groups, against float64."""
    check(prepare(LRN, "cudnn"), 2, torch.float32, CPU)


def test_refusals(stand_in: StandIn) -> None:
    assert LRN.normalization is not None
    stand_in.refuses = "forward"
    with pytest.raises(cudnn.CudnnError, match="cudnnLRNCrossChannelForward returned the status 3000"):
        cudnn.local_response_norm(torch.ones(2, 4, 3, 3), LRN.normalization)
    with pytest.raises(ValueError, match="must be a contiguous tensor"):
        cudnn.local_response_norm(torch.ones(2, 4, 3, 3).to(memory_format=torch.channels_last), LRN.normalization)


@pytest.mark.skipif(torch.backends.cudnn.version() is not None, reason="this PyTorch has cuDNN")
def test_without_cudnn() -> None:
    cudnn.library.cache_clear()
    with pytest.raises(cudnn.CudnnError, match="built without cuDNN"):
        cudnn.library()


def test_only_where_it_can_be_called() -> None:
    gpu = torch.device("cuda")
    assert [case.name for case in CASES if "cudnn" in implementations(case, gpu)] == ["lrn1"]
    assert all("cudnn" not in implementations(case, CPU) for case in CASES)
