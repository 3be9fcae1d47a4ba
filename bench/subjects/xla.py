"""Bias, ReLU, normalization and pooling by XLA, written in JAX: a rival of every implementation here.

Of the forms tried on a CPU, in both layouts, this one is the fastest forward and backward (reports/LOG.md). Channels
are last. The window sum is a product with a band matrix, which costs less than ``lax.reduce_window`` or shifted sums,
whose transposes XLA recomputes in every loop that reads them. Pooling handles one direction after the other, each as
comparisons of strided slices: the gradient of ``lax.reduce_window`` is XLA's select-and-scatter, which takes twice as
long. Forward and backward are separate programs; in a single one, XLA computes parts of the forward pass twice.
"""

import os
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.arguments import Normalization, Pooling

from .installed import NotInstalledError, package

#: On a GPU the calls of one sample take at least this many seconds in all.
SAMPLE_SECONDS = 0.02

Inputs = tuple[Tensor, Tensor | None]


@cache
def jax(device_type: str) -> Any:
    """JAX, and a device of this type; on a CPU with as many threads as PyTorch.

    Raises:
        NotInstalledError: JAX is missing, or its support for such devices.
    """
    # Otherwise it takes three quarters of a GPU's memory when it starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = package("jax")
    threads = os.environ.get("NPROC")
    # XLA reads the affinity when it starts its threads; it has no other setting for their number.
    os.environ["NPROC"] = str(torch.get_num_threads())
    try:
        found.devices(device_type.replace("cuda", "gpu"))
    except RuntimeError:
        raise NotInstalledError("not installed: JAX for GPUs, pip install 'jax[cuda13]'") from None
    finally:
        del os.environ["NPROC"]
        if threads is not None:
            os.environ["NPROC"] = threads
    return found


def _shared(tensor: Tensor) -> Any:
    """A tensor as JAX's array, on the same memory; images with their channels last."""
    tensor = tensor.detach()
    return jax(tensor.device.type).numpy.from_dlpack(tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor)


def _tensor(array: Any) -> Tensor:
    """The inverse of the conversion above."""
    tensor: Tensor = torch.utils.dlpack.from_dlpack(array)
    return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor


class Stage:
    """The chain as an operator for PyTorch's tensors, and as the calls that are timed.

    Args:
        normalization: window and constants.
        pooling: window and strides; without padding, dilation and ``ceil_mode``.
    """

    def __init__(self, normalization: Normalization, pooling: Pooling) -> None:
        assert pooling[2:] == ((0, 0), (1, 1), False), "padding, dilation, ceil_mode"
        self.normalization = normalization
        self.pooling = pooling

    def _formula(self, input: Any, bias: Any) -> Any:
        """``[N, height, width, channels]`` to the same, pooled; computed in float32, rounded once."""
        numpy, lax, nn = self._jax.numpy, self._jax.lax, self._jax.nn
        size, alpha, beta, k, groups = self.normalization
        activated = nn.relu(input.astype(numpy.float32) + bias)
        *batch, channels = activated.shape
        number = np.arange(channels // groups)
        distance = number[:, None] - number
        band = numpy.asarray((-(size // 2) <= distance) & (distance <= (size - 1) // 2), numpy.float32)
        squares = numpy.square(activated).reshape(*batch, groups, channels // groups)
        # The default on a GPU is TF32.
        sums = numpy.matmul(squares, band, precision=lax.Precision.HIGHEST).reshape(activated.shape)
        scale = k + alpha / size * sums
        root = lax.rsqrt(scale)
        pooled = activated * (root * numpy.sqrt(root) if beta == 0.75 else scale**-beta)
        for axis, (window, stride) in enumerate(zip(self.pooling.kernel_size, self.pooling.stride, strict=True), 1):
            last = (pooled.shape[axis] - window) // stride * stride
            values = [lax.slice_in_dim(pooled, start, start + last + 1, stride, axis=axis) for start in range(window)]
            pooled = values[0]
            for value in values[1:]:
                # NaN propagates, as in PyTorch; lax.max would split a tie's gradient between its elements.
                pooled = numpy.where((value > pooled) | (value != value), value, pooled)
            # Otherwise XLA recomputes everything above for each of the slices.
            pooled = lax.optimization_barrier(pooled)
        return pooled.astype(input.dtype)

    @cached_property
    def _jax(self) -> Any:
        return package("jax")

    @cached_property
    def inference(self) -> Any:
        """The compiled chain: images and bias to the output."""
        return self._jax.jit(self._formula)

    @cached_property
    def forward(self) -> Any:
        """Likewise, to the output and the pullback, which holds what backward needs."""
        return self._jax.jit(lambda input, bias: self._jax.vjp(self._formula, input, bias))

    @cached_property
    def backward(self) -> Any:
        """The pullback and the output's gradient to the gradients of images and bias."""
        return self._jax.jit(lambda pullback, output_gradient: pullback(output_gradient))

    def __call__(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """The chain for PyTorch's autograd, by which it is checked; it is not timed so."""
        if torch.is_grad_enabled() and input.requires_grad:
            result: Tensor = _Differentiable.apply(input, bias, self)
            return result
        assert bias is not None
        return _tensor(self.inference(_shared(input), _shared(bias)))

    def calls(self, mode: str, sets: Sequence[Inputs]) -> list[Callable[[], Any]]:
        """One call for each set of inputs, of JAX's arrays alone; on a CPU they return when all is computed."""
        return [self._call(mode, input, bias) for input, bias in sets]

    def _call(self, mode: str, input: Tensor, bias: Tensor | None) -> Callable[[], Any]:
        assert bias is not None
        wait = jax(input.device.type).block_until_ready if input.device.type == "cpu" else lambda result: result
        x, b = _shared(input), _shared(bias)
        if mode == "inference":
            return lambda: wait(self.inference(x, b))
        if mode == "forward":
            return lambda: wait(self.forward(x, b))
        output, pullback = self.forward(x, b)
        gradient = _shared(torch.randn(output.shape, device=input.device).to(input.dtype).permute(0, 3, 1, 2))
        if mode == "backward":
            return lambda: wait(self.backward(pullback, gradient))

        def forward_backward() -> Any:
            output, pullback = self.forward(x, b)
            return wait((output, self.backward(pullback, gradient)))

        return forward_backward


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor, stage: Stage) -> Tensor:
        output, pullback = stage.forward(_shared(input), _shared(bias))
        kept, ctx.structure = jax(input.device.type).tree_util.tree_flatten(pullback)
        # As tensors, so that saved memory is counted as PyTorch's is.
        ctx.save_for_backward(*map(torch.utils.dlpack.from_dlpack, kept))
        ctx.stage = stage
        return _tensor(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        found = jax(gradients[0].device.type)
        pullback = found.tree_util.tree_unflatten(ctx.structure, map(found.numpy.from_dlpack, ctx.saved_tensors))
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        of_input, of_bias = ctx.stage.backward(pullback, _shared(gradient))
        return _tensor(of_input), _tensor(of_bias), None


def gpu_seconds(calls: Sequence[Callable[[], Any]], samples: int) -> list[float]:
    """Seconds of one call on a GPU, with many enqueued at a time.

    XLA has its own streams, which PyTorch's graphs cannot capture. The host stays ahead of the GPU as long as enqueuing
    a call takes less time than running it.
    """
    ready = jax("cuda").block_until_ready

    def elapsed(rounds: int) -> float:
        begin = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                last = call()
        ready(last)
        return time.perf_counter() - begin

    for _ in range(3):
        once = elapsed(1)
    rounds = max(1, round(SAMPLE_SECONDS / once))
    return [elapsed(rounds) / rounds / len(calls) for _ in range(samples)]
