"""The paper's update of a parameter in one pass: gradient in, weight, velocity and working copy out (section 5)."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements of a program; of four warps each thread takes eight.
ELEMENTS = 1024
#: Fused multiply-adds are more exact than two roundings; Triton's default for them changes with its versions.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def update_kernel(
    weight,
    gradient,
    velocity,
    copy,
    rate,
    momentum,
    weight_decay,
    count,
    COPY: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """``v <- momentum v - weight_decay rate w - rate g``, ``w <- w + v``, and ``w`` rounded into the copy."""
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < count
    lr = tl.load(rate)
    w = tl.load(weight + element, mask=inside)
    v = momentum * tl.load(velocity + element, mask=inside)
    v -= weight_decay * lr * w
    v -= lr * tl.load(gradient + element, mask=inside).to(tl.float32)
    w += v
    tl.store(velocity + element, v, mask=inside)
    tl.store(weight + element, w, mask=inside)
    if COPY:
        tl.store(copy + element, w.to(copy.dtype.element_ty), mask=inside)


def suits(weight: Tensor) -> bool:
    """Whether :func:`update_` takes a parameter: float32, with no gaps between its elements."""
    expected = 1
    for stride, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return weight.dtype == torch.float32


def update_(
    weight: Tensor,
    gradient: Tensor,
    velocity: Tensor,
    copy: Tensor | None,
    rate: Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    """One update in place.

    Args:
        weight: float32, in any dense memory format.
        gradient: float32, bfloat16 or float16, with ``weight``'s strides; arithmetic is float32.
        velocity: float32, with ``weight``'s strides; updated.
        copy: a half type, with ``weight``'s strides; takes the updated weight, rounded. None for none.
        rate: the learning rate, one float32 on the device: a captured graph reads it at each replay.
        momentum, weight_decay: as the paper has them; the decay is multiplied by the rate.

    Raises:
        ValueError: strides that differ.
    """
    for name, tensor in (("gradient", gradient), ("velocity", velocity), ("copy", copy)):
        if tensor is not None and tensor.stride() != weight.stride():
            raise ValueError(f"{name} must have the weight's strides {weight.stride()}; got {tensor.stride()}")
    count = weight.numel()
    gpu = weight.device.type == "cuda"
    with torch.cuda.device(weight.device) if gpu else contextlib.nullcontext():
        update_kernel[(triton.cdiv(count, ELEMENTS),)](
            weight,
            gradient,
            velocity,
            velocity if copy is None else copy,
            rate,
            momentum,
            weight_decay,
            count,
            COPY=copy is not None,
            ELEMENTS=ELEMENTS,
            **OPTIONS,
        )
