"""The paper's parameter update in one pass: gradient in; weight, velocity and working copy out (section 5).

:func:`update_together_` updates many parameters in one launch, :func:`update_` one; both run :func:`updated`. The
launch takes tuples of pointers as arguments, which a captured graph keeps, and each program selects its own. So no
table has to be copied to the device.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import FOUR_WARPS
from .runtime import launch

#: Elements per program: with four warps, eight per thread.
ELEMENTS = 1024
#: Most parameters per launch: a program selects among them one by one.
TOGETHER = 16


class Parameter(NamedTuple):
    """The tensors that a parameter's update reads and writes; all have the weight's strides.

    Attributes:
        weight: float32, in any dense memory format; updated.
        gradient: float32, bfloat16 or float16; arithmetic is float32.
        velocity: float32; updated.
        copy: a half type; receives the updated weight, rounded. None for no copy.
    """

    weight: Tensor
    gradient: Tensor
    velocity: Tensor
    copy: Tensor | None


@triton.jit
def updated(weight, gradient, velocity, copy, rate, momentum, weight_decay, element, count, COPY: tl.constexpr):
    """``v <- momentum v - weight_decay rate w - rate g``, ``w <- w + v``, and the rounded ``w`` into the copy."""
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
    """:func:`updated` for one parameter."""
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    updated(weight, gradient, velocity, copy, rate, momentum, weight_decay, element, count, COPY)


@triton.jit
def joint_update_kernel(
    weights,
    gradients,
    velocities,
    copies,
    rate,
    momentum,
    weight_decay,
    counts,
    COPY: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """:func:`updated` for several parameters, each with its own range of programs."""
    program = tl.program_id(0)
    weight, gradient, velocity, copy, count = weights[0], gradients[0], velocities[0], copies[0], counts[0]
    start = 0
    first = 0
    for number in tl.static_range(1, len(weights)):
        start += tl.cdiv(counts[number - 1], ELEMENTS)
        reached = program >= start
        weight = tl.where(reached, weights[number], weight)
        gradient = tl.where(reached, gradients[number], gradient)
        velocity = tl.where(reached, velocities[number], velocity)
        copy = tl.where(reached, copies[number], copy)
        count = tl.where(reached, counts[number], count)
        first = tl.where(reached, start, first)
    element = (program - first).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    updated(weight, gradient, velocity, copy, rate, momentum, weight_decay, element, count, COPY)


def suits(weight: Tensor) -> bool:
    """Whether :func:`update_` supports a parameter: float32, without gaps between its elements."""
    expected = 1
    for stride, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return weight.dtype == torch.float32


def alike(parameters: Iterable[Parameter]) -> Iterator[list[Parameter]]:
    """Lists for :func:`update_together_`: at most :data:`TOGETHER` parameters of the same dtypes each, in order."""
    kinds: dict[tuple[Any, ...], list[Parameter]] = {}
    for each in parameters:
        kinds.setdefault((each.gradient.dtype, None if each.copy is None else each.copy.dtype), []).append(each)
    for kind in kinds.values():
        for start in range(0, len(kind), TOGETHER):
            yield kind[start : start + TOGETHER]


def _check(parameter: Parameter) -> None:
    strides = parameter.weight.stride()
    for name, tensor in parameter._asdict().items():
        if tensor is not None and tensor.stride() != strides:
            raise ValueError(f"{name} must have the weight's strides {strides}; got {tensor.stride()}")


def arguments(parameters: Sequence[Parameter], rate: Tensor, momentum: float, weight_decay: float) -> dict[str, Any]:
    """The arguments of :func:`joint_update_kernel` for parameters of the same dtypes."""
    weights, gradients, velocities, copies = zip(*parameters, strict=True)
    return {
        "weights": weights,
        "gradients": gradients,
        "velocities": velocities,
        "copies": velocities if copies[0] is None else copies,
        "rate": rate,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "counts": tuple(weight.numel() for weight in weights),
        "COPY": copies[0] is not None,
        "ELEMENTS": ELEMENTS,
    }


def update_together_(parameters: Sequence[Parameter], rate: Tensor, momentum: float, weight_decay: float) -> None:
    """Update several parameters in place, in one launch, bitwise identical to :func:`update_`.

    Args:
        parameters: one of :func:`alike`'s lists.
        rate, momentum, weight_decay: as for :func:`update_`.

    Raises:
        ValueError: the strides differ.
    """
    for each in parameters:
        _check(each)
    programs = sum(triton.cdiv(each.weight.numel(), ELEMENTS) for each in parameters)
    named = arguments(parameters, rate, momentum, weight_decay)
    launch(joint_update_kernel, (programs,), rate.device, **named, **FOUR_WARPS)


def update_(parameter: Parameter, rate: Tensor, momentum: float, weight_decay: float) -> None:
    """Update one parameter in place.

    Args:
        parameter: the tensors to read and write.
        rate: the learning rate, one float32 on the device; a captured graph reads it at each replay.
        momentum, weight_decay: as in the paper; the decay is multiplied by the rate.

    Raises:
        ValueError: the strides differ.
    """
    _check(parameter)
    weight, gradient, velocity, copy = parameter
    count = weight.numel()
    launch(
        update_kernel,
        (triton.cdiv(count, ELEMENTS),),
        rate.device,
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
        **FOUR_WARPS,
    )
