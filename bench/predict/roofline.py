"""The roofline: FLOPs and minimum memory traffic of each layer, and the time they take at a machine's measured rates.

A multiply-add is two FLOPs. Every tensor that crosses the layer's boundary is counted once: input, weights and output
forward; those and their gradients backward.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kernels.arguments import Normalization, Pooling
from kernels.flops import backward_flops, forward_flops
from net.model.config import AlexNetConfig, Layer

from ..measure.ceilings import Ceilings

#: Modes of a convolution or dense layer, whose backward pass is split in two; and of a stage.
PRODUCT_MODES, STAGE_MODES = ("forward", "input_gradient", "weight_gradient"), ("forward", "backward")


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one call on a batch."""

    flop: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def columns(self, median_us: float | None, dtype: str, ceilings: Ceilings | None) -> dict[str, Any]:
        """The columns of a record: the work, the rates, the limit and the percentage of it that was reached.

        The limit is the longer of two times: to compute, at the rate of matrix products in ``dtype``, and to move the
        bytes, at the rate of a copy. For several calls it is the sum of their limits.
        """
        found = {"gflop": round(self.flop * 1e-9, 4), "fewest_mb": round(self.bytes * 1e-6, 3)}
        if median_us:
            found["gflop_per_s"] = round(self.flop / median_us * 1e-3, 1)
            found["gb_per_s"] = round(self.bytes / median_us * 1e-3, 1)
        # A dtype that a processor has no instructions for may have no ceiling.
        if ceilings and dtype in ceilings.flop_per_s:
            limit = self.limit_seconds(dtype, ceilings) * 1e6
            found["limit_us"] = round(limit, 2)
            if median_us:
                found["percent_of_limit"] = round(100 * limit / median_us, 1)
        return found

    def limit_seconds(self, dtype: str, ceilings: Ceilings) -> float:
        """The longer of the times to compute and to move."""
        return max(self.flop / ceilings.flop_per_s[dtype], self.bytes / ceilings.bytes_per_s)


@dataclass(frozen=True)
class InOrder(Work):
    """Consecutive calls, each with its own limit."""

    parts: tuple[Work, ...]

    @classmethod
    def of(cls, parts: Iterable[Work]) -> "InOrder":
        parts = tuple(parts)
        return cls(sum(part.flop for part in parts), sum(part.bytes for part in parts), parts)

    def limit_seconds(self, dtype: str, ceilings: Ceilings) -> float:
        return sum(part.limit_seconds(dtype, ceilings) for part in self.parts)


def chain(
    images: int,
    channels: int,
    size: int,
    width: int,
    bias: bool,
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
) -> dict[str, Work]:
    """Work of a chain of :mod:`kernels` on ``[images, channels, size, size]`` of ``width`` bytes, by mode.

    In training, forward also writes one byte per window; inference does not. Backward reads the input if there is a
    normalization, or the output if there are only ReLU and pooling.
    """
    elements = images * channels * size * size
    out = pooling.output_size(size, 0) if pooling else size
    windows = images * channels * out * out
    offsets = windows * pooling.offset_dtype.itemsize if pooling else 0
    read = elements if normalization else windows if relu and pooling else 0
    forward = forward_flops(elements, windows, bias, relu, normalization, pooling)
    backward = backward_flops(elements, windows, bias, relu, normalization, pooling, bias)
    inference = Work(forward, (elements + windows) * width)
    works = {
        "inference": inference,
        "forward": Work(forward, inference.bytes + offsets),
        "backward": Work(backward, (windows + read + elements) * width + offsets),
    }
    works["forward_backward"] = works["forward"] + works["backward"]
    return works


def product(layer: Layer, images: int, width: int, first: bool) -> dict[str, Work]:
    """Work of a convolution or dense layer by mode; the ``first`` one needs no gradient of its input."""
    weights = layer.parameters * width
    inputs, outputs = (math.prod(shape) * images * width for shape in (layer.input_shape, layer.output_shape))
    # Whichever of the three tensors is computed, the other two are read.
    work = Work(2 * layer.multiply_adds * images, inputs + weights + outputs)
    modes = dict.fromkeys(("inference", "forward", "weight_gradient"), work)
    modes["training"] = work + work
    if not first:
        modes["input_gradient"] = work
        # The output's gradient is read once for both gradients.
        modes["training"] += Work(work.flop, weights + inputs)
    return modes


def optimizer(parameters: int) -> Work:
    """The paper's update in float32: weight, velocity and gradient in; weight and velocity out."""
    return Work(6 * parameters, 5 * 4 * parameters)


def layers(plan: AlexNetConfig, images: int, width: int) -> dict[str, dict[str, Work]]:
    """Work of every layer of a network by name and mode.

    The ReLU after a dense layer is counted with it. In training a stage's forward pass also writes what backward reads.
    """
    lrn = Normalization(plan.lrn_size, plan.lrn_alpha, plan.lrn_beta, plan.lrn_k, plan.towers)
    pool = Pooling((plan.pool_size,) * 2, (2, 2), (0, 0), (1, 1), plan.pool_ceil_mode)
    operations = {
        "stage" + convolution.name.removeprefix("conv"): plan.operations(convolution)
        for convolution in plan.convolutions
    }
    found: dict[str, dict[str, Work]] = {}
    for number, layer in enumerate(plan.layers()):
        if layer.kind != "stage":
            found[layer.name] = product(layer, images, width, first=number == 0)
            continue
        channels, size, _ = layer.input_shape
        parts = operations[layer.name]
        normalization, pooling = lrn if "lrn" in parts else None, pool if "pool" in parts else None
        works = chain(images, channels, size, width, True, True, normalization, pooling)
        if not normalization and not pooling:
            # Bias and ReLU by PyTorch: in and out, and backward gradient and output in, gradient out.
            works["backward"] += Work(0, images * math.prod(layer.input_shape) * width)
        works["training"] = works["forward"] + works["backward"]
        found[layer.name] = works
    return found
