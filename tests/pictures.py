"""Folders of real JPEG files for tests: smooth coloured shapes that a network can learn."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("circle", "cross", "square")


def picture(label: int, seed: int, width: int = 60, height: int = 48) -> Image.Image:
    """A bright shape of its class on a dark gradient, at a random place, in a random colour, with noise."""
    generator = np.random.default_rng([label, seed])
    rows, columns = np.mgrid[:height, :width].astype(float)
    centre = np.array([height, width]) / 2 + generator.uniform(-4, 4, 2)
    radius = min(height, width) * generator.uniform(0.22, 0.32)
    down, across = np.abs(rows - centre[0]), np.abs(columns - centre[1])
    inside = (
        down**2 + across**2 < radius**2,
        ((down < radius / 3) | (across < radius / 3)) & (down < radius) & (across < radius),
        (down < radius) & (across < radius),
    )[label]
    pixels = generator.uniform(0, 60, 3) * (rows / height + columns / width)[..., None]
    pixels[inside] = generator.uniform(120, 255, 3)
    pixels += generator.normal(0, 8, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def image_folder(root: Path, train: int, val: int) -> Path:
    """``root`` with ``train`` and ``val`` JPEG files of each class."""
    for split, count, first in (("train", train, 0), ("val", val, 10_000)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                # Landscape, portrait and square.
                width, height = ((60, 48), (44, 56), (50, 50))[number % 3]
                picture(label, first + number, width, height).save(folder / f"{number:04d}.jpg", quality=92)
    return root
