"""cuDNN's own local response normalization, called through its C functions: a rival on NVIDIA GPUs.

PyTorch does not call it. cuDNN divides alpha by the window size like PyTorch, but has no groups. In contiguous NCHW, a
group of channels is laid out like a separate image, so we pass ``groups`` times as many images.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.arguments import Normalization

#: ``cudnnDataType_t``.
TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 9}
#: ``CUDNN_LRN_CROSS_CHANNEL_DIM1``.
ACROSS_CHANNELS = 0


class CudnnError(RuntimeError):
    """A cuDNN function returned an error."""


@cache
def library() -> ctypes.CDLL:
    """The library that this PyTorch has loaded.

    Raises:
        CudnnError: PyTorch was built without it, or it is not found.
    """
    version = torch.backends.cudnn.version()
    if version is None:
        raise CudnnError("this PyTorch was built without cuDNN")
    # 8907 is 8.9.7, 91002 is 9.10.2.
    name = f"libcudnn.so.{version // (10000 if version >= 90000 else 1000)}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise CudnnError(f"{name} cannot be loaded: {error}") from None


def _call(name: str, *arguments: Any) -> None:
    status = getattr(library(), name)(*arguments)
    if status:
        raise CudnnError(f"{name} returned the status {status}")


def _created(name: str, *arguments: Any) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    _call(name, ctypes.byref(handle), *arguments)
    return handle


@cache
def _handle(device: int) -> ctypes.c_void_p:
    with torch.cuda.device(device):
        return _created("cudnnCreate")


@cache
def _normalization(size: int, alpha: float, beta: float, k: float) -> ctypes.c_void_p:
    descriptor = _created("cudnnCreateLRNDescriptor")
    values = (ctypes.c_double(value) for value in (alpha, beta, k))
    _call("cudnnSetLRNDescriptor", descriptor, ctypes.c_uint(size), *values)
    return descriptor


@cache
def _tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> ctypes.c_void_p:
    """The descriptor of a contiguous tensor; ``0`` is ``CUDNN_TENSOR_NCHW``."""
    descriptor = _created("cudnnCreateTensorDescriptor")
    _call("cudnnSetTensor4dDescriptor", descriptor, 0, TYPES[dtype], *shape)
    return descriptor


class _LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, normalization: Normalization) -> Tensor:
        output = torch.empty_like(input)
        _run("cudnnLRNCrossChannelForward", normalization, input, [input], output)
        ctx.normalization = normalization
        ctx.save_for_backward(input, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        input, output = ctx.saved_tensors
        result = torch.empty_like(input)
        _run(
            "cudnnLRNCrossChannelBackward", ctx.normalization, input, [output, gradients[0].contiguous(), input], result
        )
        return result, None


def _run(name: str, normalization: Normalization, like: Tensor, read: list[Tensor], written: Tensor) -> None:
    """Call a function with the arguments 1, the tensors to read, 0, and the tensor to write."""
    number, channels, height, width = like.shape
    groups = normalization.groups
    shape = (number * groups, channels // groups, height, width)
    # The scales are double for double tensors, else float.
    scale = ctypes.c_double if like.dtype == torch.float64 else ctypes.c_float
    tensor = _tensor(like.dtype, shape)
    handle = _handle(like.get_device())
    _call("cudnnSetStream", handle, ctypes.c_void_p(torch.cuda.current_stream(like.device).cuda_stream))
    pairs = [part for one in read for part in (tensor, ctypes.c_void_p(one.data_ptr()))]
    descriptor = _normalization(normalization.size, normalization.alpha, normalization.beta, normalization.k)
    one, zero = scale(1), scale(0)
    _call(
        name,
        handle,
        descriptor,
        ACROSS_CHANNELS,
        ctypes.byref(one),
        *pairs,
        ctypes.byref(zero),
        tensor,
        ctypes.c_void_p(written.data_ptr()),
    )


def local_response_norm(input: Tensor, normalization: Normalization) -> Tensor:
    """Local response normalization by cuDNN, with its gradient.

    Args:
        input: ``[N, channels, height, width]``, contiguous, on an NVIDIA GPU.
        normalization: window and constants.

    Raises:
        CudnnError: cuDNN returned an error; it may not support the dtype.
    """
    if not input.is_contiguous() or input.dim() != 4:
        raise ValueError("input must be a contiguous tensor of four dimensions")
    return _LocalResponseNorm.apply(input, normalization)  # type: ignore[no-any-return]
