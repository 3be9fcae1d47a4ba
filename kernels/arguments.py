"""Checks of the operators' arguments. An error names the argument, its value and what is allowed."""

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: An integer for both, or (rows, columns).
Pair = int | tuple[int, int]


class Normalization(NamedTuple):
    """Local response normalization; see :mod:`kernels.functional`."""

    size: int
    alpha: float
    beta: float
    k: float
    groups: int

    @property
    def before(self) -> int:
        """Channels of the window before the current one; for an even ``size``, one more than after it."""
        return self.size // 2

    @property
    def after(self) -> int:
        """Channels of the window after the current one."""
        return (self.size - 1) // 2


class Pooling(NamedTuple):
    """Max pooling, each pair as (rows, columns); see :mod:`kernels.functional`."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "Pooling":
        """The inverse of :meth:`numbers`."""
        pairs = [(numbers[index], numbers[index + 1]) for index in range(0, 8, 2)]
        return cls(pairs[0], pairs[1], pairs[2], pairs[3], bool(numbers[8]))

    def numbers(self) -> list[int]:
        """As an operator's argument, which cannot be a tuple of tuples."""
        return [number for pair in self[:4] for number in pair] + [int(self.ceil_mode)]

    def extent(self, axis: int) -> int:
        """Rows (axis 0) or columns from a window's first element to its last."""
        return self.dilation[axis] * (self.kernel_size[axis] - 1) + 1

    def output_size(self, size: int, axis: int) -> int:
        """The number of windows along an axis (0 is rows) of ``size`` elements.

        With ``ceil_mode`` the last window may extend beyond the padding, but it may not start there.
        """
        stride, padding = self.stride[axis], self.padding[axis]
        free = size + 2 * padding - self.extent(axis)
        windows = (free + (stride - 1 if self.ceil_mode else 0)) // stride + 1
        if self.ceil_mode and (windows - 1) * stride >= size + padding:
            windows -= 1
        return windows

    @property
    def offset_dtype(self) -> torch.dtype:
        """The smallest type that holds an argmax index in a window."""
        elements = self.kernel_size[0] * self.kernel_size[1]
        return torch.uint8 if elements <= 2**8 else torch.int16 if elements <= 2**15 else torch.int32


def check_input(input: Tensor, name: str, *, at_least: int, at_most: int | None = None) -> None:
    """Check that ``input`` of the operator ``name`` is floating-point and has an allowed number of dimensions."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a torch.Tensor; got {type(input).__name__}")
    if input.dtype not in DTYPES:
        raise TypeError(f"{name}: input must be float64, float32, float16 or bfloat16; got {input.dtype}")
    if input.dim() < at_least or (at_most is not None and input.dim() > at_most):
        allowed = f"{at_least} or more" if at_most is None else " or ".join(map(str, range(at_least, at_most + 1)))
        raise ValueError(f"{name}: input must have {allowed} dimensions; got shape {tuple(input.shape)}")


# ``torch.compile(dynamic=True)`` makes numbers symbolic, and cannot tell whether a symbol has ``__index__``. Calling
# ``range`` or a function of ``math`` makes it specialize on the value, as it must: no kernel works for every beta.


def _integer(value: object, least: int) -> int | None:
    """``value`` as an integer of at least ``least``; None if it is not one."""
    if isinstance(value, bool):
        return None
    if not isinstance(value, int):
        if not hasattr(value, "__index__"):
            return None
        value = operator.index(value)
    if value < least:
        return None
    return len(range(value)) if torch.compiler.is_compiling() else value


def _real(value: object) -> float | None:
    """``value`` as a float; None if it is not a number, or one that would lose its gradient."""
    if isinstance(value, Tensor) and value.requires_grad:
        return None
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or hasattr(value, "__float__")):
        return None
    return math.copysign(value, value)


def normalization(name: str, size: int, alpha: float, beta: float, k: float, groups: int) -> Normalization:
    """The normalization with these arguments, checked without an input; ``name`` is the operator or module."""
    integers = []
    for argument, value in (("size", size), ("groups", groups)):
        number = _integer(value, 1)
        if number is None:
            raise ValueError(f"{name}: {argument} must be a positive integer; got {value!r}")
        integers.append(number)
    reals = []
    for argument, number_given in (("alpha", alpha), ("beta", beta), ("k", k)):
        real = _real(number_given)
        if real is None:
            got = "a tensor that requires a gradient" if isinstance(number_given, Tensor) else repr(number_given)
            raise TypeError(f"{name}: {argument} must be a number; got {got}")
        reals.append(real)
    return Normalization(integers[0], reals[0], reals[1], reals[2], integers[1])


def check_normalization(
    input: Tensor, name: str, size: int, alpha: float, beta: float, k: float, groups: int
) -> Normalization:
    """:func:`normalization`; also checks that ``groups`` divides the channels of ``input`` (dimension 1)."""
    checked = normalization(name, size, alpha, beta, k, groups)
    if input.shape[1] % checked.groups:
        raise ValueError(f"{name}: groups={groups} does not divide the {input.shape[1]} channels of input")
    return checked


def pooling(
    name: str, kernel_size: Pair, stride: Pair | None, padding: Pair, dilation: Pair, ceil_mode: bool
) -> Pooling:
    """The pooling with these arguments, checked without an input; ``name`` is the operator or module."""
    rows_and_columns = []
    for argument, value, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", kernel_size if stride is None else stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        pair = value if isinstance(value, (tuple, list)) else (value,)
        integers = [_integer(item, least) for item in pair]
        if len(pair) not in (1, 2) or None in integers:
            raise ValueError(f"{name}: {argument} must be an integer of at least {least} or two of them; got {value!r}")
        rows_and_columns.append((integers[0], integers[-1]))
    checked = Pooling(*rows_and_columns, bool(ceil_mode))  # type: ignore[arg-type,call-arg]
    for axis, what in enumerate(("rows", "columns")):
        if 2 * checked.padding[axis] > checked.kernel_size[axis]:
            raise ValueError(
                f"{name}: padding must be at most half the window, which is {checked.kernel_size[axis]} {what} without "
                f"its dilation; got {padding!r}"
            )
    return checked


def check_pooling(
    input: Tensor,
    name: str,
    kernel_size: Pair,
    stride: Pair | None,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
) -> Pooling:
    """:func:`pooling`; also checks that the window fits the last two dimensions of ``input``."""
    checked = pooling(name, kernel_size, stride, padding, dilation, ceil_mode)
    for axis, what in enumerate(("rows", "columns")):
        size = input.shape[input.dim() - 2 + axis]
        windows = checked.output_size(size, axis)
        if windows < 1:
            raise ValueError(
                f"{name}: the window of {checked.extent(axis)} {what} does not fit input of shape "
                f"{tuple(input.shape)} with padding {checked.padding[axis]}"
            )
        step, before, gap = checked.stride[axis], checked.padding[axis], checked.dilation[axis]
        if before and gap > size:
            # There PyTorch takes the maximum of no elements, and writes its gradient out of bounds.
            starts = range(-before, min(0, windows * step - before), step)
            if any(start % gap >= size for start in starts):
                raise ValueError(
                    f"{name}: dilation must leave each window an element; of {size} {what} one with dilation {gap} and "
                    f"padding {before} holds none"
                )
    return checked


def check_bias(input: Tensor, bias: Tensor | None, channel_dimension: int, name: str, *, inputs: int = 1) -> None:
    """Check that ``bias`` has one element per channel of ``input``, or of ``inputs`` tensors of its shape."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{name}: bias must be a torch.Tensor or None; got {type(bias).__name__}")
    channels = inputs * input.shape[channel_dimension]
    if tuple(bias.shape) != (channels,):
        raise ValueError(f"{name}: bias must have shape ({channels},), one a channel; got {tuple(bias.shape)}")
    if bias.dtype not in DTYPES:
        raise TypeError(f"{name}: bias must be float64, float32, float16 or bfloat16; got {bias.dtype}")
    if bias.device != input.device:
        raise ValueError(f"{name}: bias must be on input's device, {input.device}; got {bias.device}")
