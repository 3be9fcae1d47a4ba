"""How far a result may be from the exact one, for every test, and why.

Inputs are compared after rounding to the dtype under test, against a float64 formula written in the tests.

Forward. float32 and float64 arithmetic accumulates the window's sum (at most a few dozen additions of positive numbers,
each off by half an ulp), one multiplication and addition, a power made of two roots, and a product: under 32 half ulps.
The half types are computed in float32 and rounded once, so they are off by half an ulp of the result, plus nothing that
shows: 1 ulp.

Gradients. Two terms of like size can cancel, so their error is measured against the sum of the terms' absolute values:
the same 32 half ulps for float32 and float64; 3 ulps for the half types, whose output gradient and input are exact.
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
    """Every element of ``actual`` is within ``tolerance * scale`` of ``exact`` (or a float16 subnormal's ulp)."""
    smallest = torch.finfo(actual.dtype).tiny * torch.finfo(actual.dtype).eps
    error = (actual.double() - exact).abs()
    allowed = tolerance * scale.abs() + smallest
    worst = (error / allowed).max().item()
    assert worst <= 1, f"error is {worst:.2f} times what is allowed"
