"""Batches in random order from a mapped file in the page cache to the device."""

import tempfile
from pathlib import Path

from net.data.loader import Loader

from ..measure.records import time_columns
from ..measure.timing import wall_seconds
from ..subjects import stores
from ..subjects.network import STORED
from .run import Rows, Run


def rows(run: Run) -> Rows:
    """One row: two threads that read."""
    count = 4 * run.scale.images if run.scale.toy else 8192
    with tempfile.TemporaryDirectory() as folder:
        split = stores.pixels(Path(folder) / "images.npy", count, STORED)
        batches = iter(Loader(split, run.scale.images, run.device, shuffle=True, threads=2))
        times = wall_seconds(lambda: next(batches), 5 * run.samples)
        batches.close()
    columns = time_columns(times)
    yield {
        "suite": "input",
        "case": "loader, 2 reading",
        "shape": f"{run.scale.images}x{STORED}x{STORED}x3",
        "dtype": "uint8",
        **columns,
        "images_per_s": round(run.scale.images / columns["median_us"] * 1e6, 1),
    }
