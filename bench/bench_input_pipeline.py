"""Throughput of the input pipeline: decoding for the packed store, reading from it, and the paper's augmentation."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture

from net.data.augmentation import TrainingInput, VariationTable
from net.data.config import JPEG_QUALITY
from net.data.decode import square
from net.data.images import ColourComponents, Split
from net.data.loader import Loader
from net.data.packing import Packing, Task, pack
from net.readers.image import encode_jpeg
from net.readers.store import CHUNK
from net.training.config import RecipeConfig

from .subjects import stores

BATCH, SIZE, CROP = 128, 256, 224
#: Rounds of calls that take some tenths of a second.
ROUNDS = 10
Row = Callable[..., None]


def photograph(seed: int, width: int = 500, height: int = 375) -> Image.Image:
    """A picture whose JPEG file is as large as a photograph's: smooth shapes and some noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = smooth + generator.integers(-12, 13, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@cache
def encoded(count: int) -> list[bytes]:
    """JPEG files of a packed store."""
    return [encode_jpeg(square(np.array(photograph(number)), SIZE), JPEG_QUALITY) for number in range(count)]


@pytest.mark.parametrize(("kind", "quality"), [("pixels", None), ("JPEG", JPEG_QUALITY)])
def test_prepare(benchmark: BenchmarkFixture, row: Row, tmp_path: Path, kind: str, quality: int | None) -> None:
    """One process decodes, scales, crops, sums and writes or encodes a chunk of 500x375 JPEG files."""
    files = []
    for number in range(CHUNK):
        files.append(f"{number}.jpg")
        photograph(number).save(tmp_path / files[-1], quality=90)
    target = tmp_path / "images"
    target.write_bytes(b"")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task = Task("train", 0, tmp_path, files, [], Packing(SIZE, quality), target, 0)
        benchmark.pedantic(pack, (task,), rounds=ROUNDS, warmup_rounds=1)
    finally:
        torch.set_num_threads(before)
    size = np.mean([(tmp_path / file).stat().st_size for file in files])
    row(
        suite="input",
        case="prepare, one process",
        shape=f"500x375 JPEG to 256x256 {kind}",
        images=CHUNK,
        file_kib=round(size / 1024, 1),
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_loader(benchmark: BenchmarkFixture, row: Row, tmp_path: Path, threads: int) -> None:
    """Batches in random order from a mapped file that is in the page cache."""
    count = 4096
    split = stores.pixels(tmp_path / "images.npy", count, SIZE)
    batches = iter(Loader(split, BATCH, torch.device("cpu"), shuffle=True, threads=threads))
    benchmark.pedantic(lambda: [next(batches) for _ in range(16)], rounds=20, warmup_rounds=2)
    batches.close()
    row(
        suite="input",
        case=f"loader, {threads} reading",
        shape=f"{BATCH}x{SIZE}x{SIZE}x3",
        dtype="uint8",
        images=16 * BATCH,
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_jpeg_loader(benchmark: BenchmarkFixture, row: Row, tmp_path: Path, threads: int) -> None:
    """Batches in random order, decoded from a file of JPEG images that is in the page cache."""
    files = encoded(512)
    count = len(files)
    split = Split(stores.jpegs(tmp_path / "images.jpegs", files, SIZE), np.arange(count, dtype=np.int64))
    batches = iter(Loader(split, BATCH, torch.device("cpu"), shuffle=True, threads=threads))
    benchmark.pedantic(lambda: [next(batches) for _ in range(4)], rounds=ROUNDS, warmup_rounds=1)
    batches.close()
    row(
        suite="input",
        case=f"loader, {threads} decoding",
        shape=f"{BATCH}x{SIZE}x{SIZE}x3",
        dtype="uint8",
        images=4 * BATCH,
        file_kib=round(sum(map(len, files)) / count / 1024, 1),
    )


def test_training_input(benchmark: BenchmarkFixture, row: Row) -> None:
    """Crop, reflection, mean subtraction and colour noise of a batch."""
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8))
    mean = generator.uniform(0, 255, (SIZE, SIZE, 3)).astype(np.float32)
    colour = ColourComponents(np.array([9000.0, 400.0, 25.0]), np.eye(3))
    make = TrainingInput(mean, colour, CROP, RecipeConfig(), torch.device("cpu"))
    varied = VariationTable(BATCH, make.margin, RecipeConfig(), 0).rows(0, np.arange(BATCH))
    benchmark.pedantic(make, (images, varied), rounds=20, warmup_rounds=2)
    row(
        suite="input",
        case="crop, reflect, colour, mean",
        shape=f"{BATCH}x{SIZE}x{SIZE}x3",
        dtype="float32",
        images=BATCH,
    )
