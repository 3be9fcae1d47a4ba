"""Packed stores of photographs, as pixels and as JPEG: ``python -m bench.photographs FOLDER``.

The training images of a folder are packed and read as in :mod:`net.prepare` and in training. Times are this process's
CPU time on one thread, the minimum of several rounds, so that other programs have little effect.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from net.common import cli
from net.common.allocator import keep_freed_memory
from net.common.errors import DataError
from net.common.fields import at_least, flag, flag_name
from net.data.config import JPEG_QUALITY
from net.data.folder import scan
from net.data.packing import Packing, Task, pack
from net.readers.image import decoder
from net.readers.store import CHUNK

from .measure.records import Row, write
from .subjects import stores

DESCRIPTION = (
    "Pack the photographs of a folder as pixels and as JPEG, and print the bytes per image, the gray levels lost, and "
    "the images/s of one core, packing and reading."
)
#: Training and validation images of ImageNet's challenge of 2012.
IMAGENET = 1_281_167 + 50_000
SIZE = 256
QUALITIES = (75, JPEG_QUALITY, 85, 90, 95)
TURNS = 3


@dataclass(frozen=True)
class PhotographsConfig:
    """The flags of ``python -m bench.photographs``."""

    folder: str = flag("", "image folder: train/CLASS/*, val/CLASS/*", positional=True)
    images: int = flag(960, "number of training images to measure", metavar="COUNT")
    record: bool = flag(False, "append the rows to reports/data")

    def __post_init__(self) -> None:
        at_least(self, 1, "images", called=flag_name)


def _seconds(jobs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The CPU time of each job, the minimum over rounds interleaved with the others."""
    least = dict.fromkeys(jobs, float("inf"))
    for _ in range(TURNS):
        for name, job in jobs.items():
            began = time.process_time()
            job()
            least[name] = min(least[name], time.process_time() - began)
    return least


def _pillow(files: Sequence[str]) -> None:
    """The equivalent without this project: decode at a fraction, scale the centre."""
    for file in files:
        with Image.open(file) as image:
            image.draft("RGB", (SIZE, SIZE))
            decoded = image.convert("RGB")
        side = min(decoded.size)
        left, top = (decoded.width - side) // 2, (decoded.height - side) // 2
        box = (left, top, left + side, top + side)
        np.asarray(decoded.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


def rows(source: Path, count: int) -> list[Row]:
    """Measure on the first ``count`` training images of ``source``, a folder.

    Raises:
        DataError: it is not an image folder, or none of these images can be read.
    """
    if not source.is_dir():
        raise DataError(f"{source} is no folder; extract an archive first")
    torch.set_num_threads(1)
    keep_freed_memory()
    listing = scan(source)
    files = listing.files["train"][:count]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "images"
        target.write_bytes(b"")

        def tasks(packing: Packing) -> list[Task]:
            each = packing.size**2 * 3
            return [
                Task("train", 0, listing.root, files[first : first + CHUNK], [], packing, target, first * each)
                for first in range(0, len(files), CHUNK)
            ]

        # Skip unreadable files; the others are in the page cache from here on.
        reasons = [reason for task in tasks(Packing(SIZE)) for reason in pack(task).reasons]
        if all(reasons):
            raise DataError(f"{source}: none of the first {len(files)} training images can be read; {reasons[0]}")
        files = [file for file, reason in zip(files, reasons, strict=True) if not reason]
        # The sizes at all qualities, and the error of each.
        for task in tasks(Packing(SIZE)):
            pack(task)
        pixels = np.memmap(target, np.uint8, "r", shape=(len(files), SIZE, SIZE, 3))
        encoded, gray_levels = {}, {}
        for quality in QUALITIES:
            contents = [content for task in tasks(Packing(SIZE, quality)) for content in pack(task).encoded]
            images = encoded[quality] = stores.jpegs(Path(folder) / f"{quality}.jpegs", contents, SIZE)
            differences = [
                np.abs(images[number].astype(np.int16) - pixels[number]).mean() for number in range(len(files))
            ]
            gray_levels[quality] = float(np.mean(differences))
        order = np.random.default_rng(0).permutation(len(files))
        out = np.empty((len(order), SIZE, SIZE, 3), np.uint8)
        jobs: dict[str, Callable[[], object]] = {
            "prepare photographs, Pillow alone": lambda: _pillow([os.path.join(listing.root, file) for file in files]),
            "prepare photographs, pixels": lambda: [pack(task) for task in tasks(Packing(SIZE))],
            "read photographs, pixels": lambda: pixels.take(order, 0, out, "clip"),
        }
        images, packing = encoded[JPEG_QUALITY], Packing(SIZE, JPEG_QUALITY)
        name = f"photographs, JPEG of quality {JPEG_QUALITY}"
        jobs[f"prepare {name}"] = lambda: [pack(task) for task in tasks(packing)]
        jobs[f"read {name}"] = lambda: images.take(order, 0, out, "clip")
        seconds = _seconds(jobs)
    about: Row = {"suite": "input", "shape": f"{SIZE}x{SIZE}", "photographs": len(files)}
    result = []
    for name in jobs:
        rate = round(len(files) / seconds[name], 1)
        result.append({**about, "case": name, "images_per_s": rate, "median_us": round(1e6 / rate, 2)})
    sizes = {"pixels": SIZE**2 * 3.0}
    sizes |= {f"JPEG of quality {quality}": float(encoded[quality].files.index[:, 1].mean()) for quality in QUALITIES}
    for kind, size in sizes.items():
        row = {**about, "case": f"photographs, {kind}", "kb_per_image": round(size / 1e3, 2)}
        row["imagenet_gb"] = round(size * IMAGENET / 1e9, 1)
        if kind != "pixels":
            row |= {"gray_levels": round(gray_levels[int(kind.split()[-1])], 2), "decoder": decoder()}
        result.append(row)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = cli.given(PhotographsConfig, "bench.photographs", DESCRIPTION, arguments)
    config = cli.resolve(given, PhotographsConfig)
    cli.check_exist(positional=config.folder)
    found = rows(Path(config.folder), config.images)
    for row in found:
        if "images_per_s" in row:
            print(f"{row['case']:<45} {row['images_per_s']:>9,.0f} images/s a core")
        else:
            error = f", {row['gray_levels']:.2f} gray levels from them" if "gray_levels" in row else ""
            print(f"{row['case']:<45} {row['kb_per_image']:7.2f} KB, ImageNet {row['imagenet_gb']:5.1f} GB{error}")
    if config.record:
        print(f"recorded {len(found)} rows in {write(found)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
