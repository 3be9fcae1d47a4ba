"""What a machine can do at best: bytes copied and FLOPs in a second, measured in the run that they belong to."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .records import time_columns
from .timing import copies, seconds

#: MiB of the copied tensors: within a GPU's cache, of the size of the paper's activations, far beyond any cache.
COPIES = {"cuda": (16, 64, 1024), "cpu": (16, 256)}
#: Rows of the square matrices.
MATRIX = {"cuda": 8192, "cpu": 2048}


class Ceilings(NamedTuple):
    """Bytes and FLOPs in a second; FLOPs by dtype."""

    bytes_per_s: float
    flop_per_s: dict[str, float]


def copy(moved: int, device: torch.device, samples: int) -> list[float]:
    """Seconds of reading and writing ``moved`` bytes, half of them each."""
    # By an elementwise kernel: a CUDA graph's own copies are slower for some sizes.
    size = moved // 8
    count = copies(moved) if device.type == "cuda" else 1
    pairs = [torch.ones(2, size, device=device) for _ in range(count)]
    (times,) = seconds([[lambda pair=pair: torch.neg(pair[1], out=pair[0]) for pair in pairs]], device, samples)  # type: ignore[misc]
    return times


def rows(device: torch.device, samples: int = 10) -> Iterator[dict[str, Any]]:
    """Copies of several sizes, and matrix products; :func:`ceilings` reads them."""
    for mib in COPIES[device.type]:
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
    side = MATRIX[device.type]
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        (times,) = seconds([[lambda a=a, b=b: torch.mm(a, b)]], device, samples)  # type: ignore[misc]
        columns = time_columns(times)
        yield {
            "suite": "ceilings",
            "case": "matrix product",
            "implementation": "aten",
            "shape": f"{side}x{side}x{side}",
            "dtype": str(dtype).removeprefix("torch."),
            **columns,
            "gflop_per_s": round(2 * side**3 / columns["median_us"] * 1e-3, 1),
        }


def ceilings(measured: list[dict[str, Any]]) -> Ceilings:
    """The largest of the copies' and each dtype's rates."""
    copied = [row["gb_per_s"] for row in measured if row["case"] == "copy"]
    products = [row for row in measured if row["case"] == "matrix product"]
    return Ceilings(max(copied) * 1e9, {row["dtype"]: row["gflop_per_s"] * 1e9 for row in products})
