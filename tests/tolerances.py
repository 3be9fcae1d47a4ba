"""Tolerances of all tests, and their derivation.

Inputs are rounded to the dtype under test first, and results compared with a float64 formula written in the tests.

Forward. float32 and float64 accumulate the window's sum (at most a few dozen additions of positive numbers, each with
an error of half an ulp), one multiplication and addition, a power made of two roots, and a product: under 32 half ulps.
The half-precision dtypes are computed in float32 and rounded once: half an ulp of the result, and a negligible rest, so
1 ulp.

Gradients. Two terms of similar size can cancel, so the error is relative to the sum of the terms' absolute values: the
same 32 half ulps for float32 and float64; 3 ulps for the half-precision dtypes, whose output gradient and input are
exact.

Matrix products in float32. An element is a sum of a bias and K products; each of its K multiplications and K additions
adds at most half an ulp of the sum of the terms' absolute values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Largest error, relative to the exact value (forward) or to the sum of absolute terms (gradient)."""

    forward: float
    gradient: float


TOLERANCES = {
    torch.float64: Tolerance(32 * 2**-53, 32 * 2**-53),
    torch.float32: Tolerance(32 * 2**-24, 32 * 2**-24),
    torch.float16: Tolerance(2**-10, 3 * 2**-10),
    torch.bfloat16: Tolerance(2**-7, 3 * 2**-7),
}


def assert_within(actual: Tensor, exact: Tensor, scale: Tensor, tolerance: float) -> None:
    """Check that each element of ``actual`` is within ``tolerance * scale``, plus a subnormal's ulp, of ``exact``."""
    smallest = torch.finfo(actual.dtype).tiny * torch.finfo(actual.dtype).eps
    error = (actual.double() - exact).abs()
    allowed = tolerance * scale.abs() + smallest
    worst = (error / allowed).max().item()
    assert worst <= 1, f"error is {worst:.2f} times what is allowed"


def assert_product_within(actual: Tensor, input: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Check float32 ``input @ weight.T + bias`` against float64."""
    input, weight, bias = input.double(), weight.double(), bias.double()
    scale = input.abs() @ weight.abs().T + bias.abs()
    assert_within(actual, input @ weight.T + bias, scale, 2 * weight.shape[1] * 2**-24)
