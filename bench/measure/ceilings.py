"""A machine's ceilings: bytes copied and FLOPs per second, measured in the same run as the rows compared with them."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch

from .records import time_columns
from .timing import copies, seconds

#: MiB of the copied tensors: fits in a GPU's cache; size of the paper's activations; far larger than any cache.
COPIES = {"cuda": (16, 64, 1024), "cpu": (16, 256)}
#: Rows of the square matrices.
MATRIX = {"cuda": 8192, "cpu": 2048}
DTYPES = (torch.float32, torch.bfloat16)
#: Rows of the matrices whose product shows whether a processor has instructions for a dtype; takes 0.03 s if not.
PROBE = 256
#: Without bfloat16 instructions, a product takes 106 times as long as in float32 on an AVX2 processor, which computes
#: it element by element, and 3 to 5 times as long on an AVX-512 one, where oneDNN converts.
HOPELESS = 20.0


class Ceilings(NamedTuple):
    """Bytes and FLOPs per second; FLOPs by dtype."""

    bytes_per_s: float
    flop_per_s: dict[str, float]


def _product(dtype: torch.dtype, side: int, device: torch.device, samples: int) -> list[float]:
    """Seconds of multiplying two square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    (times,) = seconds([[lambda: torch.mm(a, b)]], device, samples)
    return times


@cache
def slowdown(dtype: torch.dtype, device: torch.device) -> float:
    """The time of a small matrix product in ``dtype`` relative to float32, each at its fastest.

    1 on every GPU.
    """
    if device.type == "cuda" or dtype == torch.float32:
        return 1.0
    threads = torch.get_num_threads()
    # On a busy machine, two threads wait for each other for longer than this product takes in float32.
    torch.set_num_threads(1)
    try:
        return min(_product(dtype, PROBE, device, 5)) / min(_product(torch.float32, PROBE, device, 30))
    finally:
        torch.set_num_threads(threads)


def lacking(dtype: torch.dtype, device: torch.device) -> str:
    """Why matrix products in ``dtype`` are not measured at full size on this device; empty if they are."""
    times = slowdown(dtype, device)
    if times < HOPELESS:
        return ""
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return f"needs {short} instructions: a product takes {times:.0f} x as long as in float32"


def copy(moved: int, device: torch.device, samples: int) -> list[float]:
    """Seconds of moving ``moved`` bytes, half read and half written."""
    # An elementwise kernel: copies in a CUDA graph are slower for some sizes.
    size = moved // 8
    count = copies(moved) if device.type == "cuda" else 1
    pairs = [torch.ones(2, size, device=device) for _ in range(count)]
    (times,) = seconds([[lambda pair=pair: torch.neg(pair[1], out=pair[0]) for pair in pairs]], device, samples)  # type: ignore[misc]
    return times


def rows(
    device: torch.device, samples: int = 10, announce: Callable[[str], None] = lambda what: None
) -> Iterator[dict[str, Any]]:
    """Copies of several sizes, and matrix products; :func:`ceilings` reads them.

    Args:
        device: where they run.
        samples: number of timings of each.
        announce: called with the name of the next measurement.
    """
    for mib in COPIES[device.type]:
        announce(f"copy of {mib} MiB")
        moved = 2 * mib * 2**20
        columns = time_columns(copy(moved, device, samples))
        yield {
            "suite": "ceilings",
            "case": "copy",
            "implementation": "aten",
            "shape": f"{mib} MiB",
            "dtype": "float32",
            **columns,
            "gb_per_s": round(moved / columns["median_us"] * 1e-3, 1),
        }
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        announce(f"matrix product in {name}")
        note = lacking(dtype, device)
        side = PROBE if note else MATRIX[device.type]
        columns = time_columns(_product(dtype, side, device, samples))
        yield {
            "suite": "ceilings",
            "case": "matrix product",
            "implementation": "aten",
            "shape": f"{side}x{side}x{side}",
            "dtype": name,
            **columns,
            "gflop_per_s": round(2 * side**3 / columns["median_us"] * 1e-3, 1),
            **({"note": note} if note else {}),
        }


def ceilings(measured: list[dict[str, Any]]) -> Ceilings:
    """The fastest copy, and the rate of each dtype.

    No dtype's rate is below float32's: without instructions for a half type, its products and sums are computed in
    float32.
    """
    copied = [row["gb_per_s"] for row in measured if row["case"] == "copy"]
    products = {row["dtype"]: row["gflop_per_s"] * 1e9 for row in measured if row["case"] == "matrix product"}
    return Ceilings(max(copied) * 1e9, {dtype: max(rate, products["float32"]) for dtype, rate in products.items()})
