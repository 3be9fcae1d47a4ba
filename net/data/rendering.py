"""Synthetic images: coloured, textured shapes on textured backgrounds, drawn from seeds alone."""

import io
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..common import seeds
from ..common.progress import Progress
from ..readers.store import SPLITS
from . import processes
from .config import SHAPES, ShapesConfig

#: The weights of red, green and blue in the luminance (ITU-R BT.601).
LUMINANCE = np.array([0.299, 0.587, 0.114])
#: Hue of each colour, as a fraction of the circle, and its maximum deviation.
_HUES = {"red": 0.0, "green": 0.33, "blue": 0.62}
_HUE_SPREAD = 0.035
#: Images that a worker draws per task.
_CHUNK = 100

Values = NDArray[np.floating[Any]]


def _colour(hue: float, saturation: float, luminance: float) -> Values:
    """RGB in [0, 1] of a hue at exactly this luminance, by darkening it or mixing it with white."""
    pure: Values = np.clip(np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    colour = saturation * pure + (1 - saturation) * (LUMINANCE @ pure)
    own = float(LUMINANCE @ colour)
    if luminance <= own:
        return colour * (luminance / own)
    return colour + (1 - colour) * ((luminance - own) / (1 - own))


def _noise(generator: np.random.Generator, size: int) -> Values:
    """Smooth noise at four scales, in [0, 1]: ``[size, size]``."""
    total = np.zeros((size, size), np.float32)
    for cells in (3, 6, 12, 24):
        grid = Image.fromarray(generator.standard_normal((cells, cells), np.float32) / np.float32(np.sqrt(cells)))
        total += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
    low, high = float(total.min()), float(total.max())
    return (total - low) / (high - low)


def _turned(angle: float, down: Values, across: Values) -> tuple[Values, Values]:
    """The coordinates in a frame rotated by ``angle``."""
    sine, cosine = np.float32(np.sin(angle)), np.float32(np.cos(angle))
    return cosine * down + sine * across, cosine * across - sine * down


def render(label: int, size: int, seed: tuple[int, ...]) -> NDArray[np.uint8]:
    """An image of class ``SHAPES[label]``: uint8 ``[size, size, 3]``.

    The texture mixes a dark and a light shade of the class's hue. The shades, position, size and angles have the same
    distribution for every class, so that only the three words of its name distinguish it.

    Args:
        label: index into :data:`net.data.config.SHAPES`.
        size: rows and columns.
        seed: numbers that seed the image, together with ``label``.
    """
    colour, texture, shape = SHAPES[label].split("_")
    generator = seeds.shape(*seed, label)
    hue = _HUES[colour] + generator.uniform(-_HUE_SPREAD, _HUE_SPREAD)
    saturation = generator.uniform(0.7, 1)
    colours = [
        _colour(hue, saturation, generator.uniform(0.5, 0.65)),
        _colour(hue, saturation, generator.uniform(0.1, 0.2)),
        _colour(generator.random(), generator.uniform(0, 0.5), generator.uniform(0.15, 0.7)),
        _colour(generator.random(), generator.uniform(0, 0.5), generator.uniform(0.15, 0.7)),
    ]

    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    down, across = np.meshgrid(line, line, indexing="ij")
    top, left = generator.uniform(0.4, 0.6, 2).astype(np.float32)
    radius = generator.uniform(0.29, 0.37)
    if shape == "disc":
        distance = np.hypot(down - top, across - left) - 0.9 * radius
    else:
        # An equilateral triangle: inside three half-planes.
        u, v = _turned(generator.uniform(0, 2 * np.pi), down - top, across - left)
        distance = np.maximum(u, np.sqrt(np.float32(0.75)) * np.abs(v) - 0.5 * u) - 0.6 * radius
    u, v = _turned(generator.uniform(0, 2 * np.pi), down, across)
    frequency = 2 * np.pi / generator.uniform(0.17, 0.21)
    wave = np.sin(frequency * u + generator.uniform(0, 2 * np.pi))
    if texture == "chequered":
        wave *= np.sin(frequency * v + generator.uniform(0, 2 * np.pi))

    inside = np.clip(0.5 - distance * size, 0, 1)
    bright = np.clip(0.5 + 2 * wave, 0, 1)
    ground = _noise(generator, size)
    shares = (inside * bright, inside * (1 - bright), (1 - inside) * ground, (1 - inside) * (1 - ground))
    pixels = 255 * (np.stack(shares, -1) @ np.array(colours, np.float32))
    pixels += 5 * generator.standard_normal(pixels.shape, np.float32)
    return pixels.clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class _Task:
    """Consecutive images of a class and split, and the folder they go to."""

    folder: Path
    label: int
    size: int
    seed: tuple[int, int]
    numbers: range


def write(task: _Task) -> int:
    """Render a task's images into JPEG files; returns how many."""
    for number in task.numbers:
        picture = io.BytesIO()
        image = Image.fromarray(render(task.label, task.size, (*task.seed, number)))
        # Colours at full resolution, since they distinguish classes.
        image.save(picture, "JPEG", quality=92, subsampling=0)
        (task.folder / f"{number:05d}.jpg").write_bytes(picture.getvalue())
    return len(task.numbers)


def _tasks(root: Path, config: ShapesConfig) -> Iterator[_Task]:
    for split_number, (split, count) in enumerate(zip(SPLITS, (config.train, config.val), strict=True)):
        for label, name in enumerate(SHAPES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for first in range(0, count, _CHUNK):
                numbers = range(first, min(first + _CHUNK, count))
                yield _Task(folder, label, config.size, (config.seed, split_number), numbers)


def write_folder(root: Path, config: ShapesConfig) -> None:
    """Render the image folder ``root``, which exists and is empty."""
    workers = config.workers or processes.available_cores()
    tasks = _tasks(root, config)
    total = len(SHAPES) * (config.train + config.val)
    with Progress("images", total) as progress, processes.pool(workers, __name__) as pool:
        try:
            running: set[Future[int]] = set()
            while running := running | {pool.submit(write, task) for task in islice(tasks, 3 * workers - len(running))}:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                progress.update(sum(future.result() for future in done))
        finally:
            pool.shutdown(cancel_futures=True)
