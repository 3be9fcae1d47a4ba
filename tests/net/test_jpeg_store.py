"""Stores of JPEG images: the same images as in a store of pixels, whole after interruptions, refused when damaged."""

import contextlib
import errno
import hashlib
import io
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from net.common.errors import DataError
from net.data import packing as packing_module
from net.data import prepare as module
from net.data import store as store_module
from net.data.folder import scan
from net.data.jpeg import JpegImages
from net.data.loader import Loader
from net.data.packing import Packing
from net.data.prepare import prepare
from net.data.sampling import needed_bytes
from net.data.store import checksum, open_store
from net.readers import image
from net.readers.store import CHUNK
from net.training.config import TrainConfig
from net.training.setup import identity
from tests.commands import run_here
from tests.pictures import image_folder, picture
from tests.stores import packed_here

CPU = torch.device("cpu")
SIZE = 24
QUALITY = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three chunks of training images; of the files some are no images, the first and the last among them."""
    root = image_folder(tmp_path_factory.mktemp("jpeg") / "images", train=50, val=10)
    for name in ("train/circle/0000.jpg", "train/cross/0020.jpg", "train/square/0049.jpg", "val/circle/0003.jpg"):
        (root / name).write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def pixels(folder: Path) -> Path:
    return packed_here(folder, folder.parent / "pixels", Packing(SIZE))


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    return packed_here(folder, folder.parent / "store", Packing(SIZE, QUALITY))


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    return shutil.copytree(store, tmp_path / "copy")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def again(pixels: np.ndarray) -> np.ndarray:
    """Through Pillow's JPEG and back."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=QUALITY, subsampling="4:4:4")
    return np.asarray(Image.open(content))


def test_holds_the_images_of_a_store_of_pixels(pixels: Path, store: Path) -> None:
    """In the same order, so that both are cropped and reflected alike, with the same mean and colours."""
    one, other = open_store(pixels), open_store(store)
    for split, count in (("train", 147), ("val", 29)):
        theirs, ours = getattr(one, split), getattr(other, split)
        assert len(theirs) == len(ours) == count
        assert (ours.labels == theirs.labels).all()
        for number in range(count):
            assert np.array_equal(ours.images[number], again(theirs.images[number]))
    assert (other.mean == one.mean).all()
    assert (other.colour.vectors == one.colour.vectors).all()
    assert other.classes == one.classes
    assert one.decoder is None
    assert other.decoder is not None
    assert other.decoder.startswith(f"Pillow {features.version('pil')}, libjpeg")


def test_reads_like_an_array(store: Path) -> None:
    images = open_store(store).train.images
    whole = np.stack([images[number] for number in range(len(images))])
    assert whole.shape == images.shape == (147, SIZE, SIZE, 3)
    assert whole.nbytes == images.nbytes
    assert np.array_equal(images[2:9], whole[2:9])
    assert np.array_equal(images[np.array([7, 0, 146])], whole[[7, 0, 146]])
    assert np.array_equal(images[-1], whole[-1])
    assert np.array_equal(images[np.int64(3)], whole[3])
    assert np.array_equal(images[::-50], whole[::-50])
    assert images[5:5].shape == (0, SIZE, SIZE, 3)
    for outside in (147, -148):
        with pytest.raises(IndexError):
            images[outside]


def test_its_file_is_closed_with_it(store: Path) -> None:
    images = open_store(store).train.images
    assert isinstance(images, JpegImages)
    file = images.files._file
    assert not file.closed
    del images
    assert file.closed


def test_colours_are_kept_at_full_resolution(store: Path) -> None:
    with Image.open(io.BytesIO((store / "train_images.jpegs").read_bytes())) as first:
        assert [component[1:3] for component in first.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]


def test_takes_less_room_with_less_quality(folder: Path, store: Path, tmp_path: Path) -> None:
    worse = packed_here(folder, tmp_path / "worse", Packing(SIZE, 20))
    assert (worse / "train_images.jpegs").stat().st_size < 0.8 * (store / "train_images.jpegs").stat().st_size


def test_several_processes_give_the_same(folder: Path, store: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "store", size=SIZE, quality=QUALITY, workers=2)
    assert contents(tmp_path / "store") == contents(store)


@pytest.mark.parametrize("chunks", [1, 3])
def test_goes_on_after_being_killed(
    folder: Path, store: Path, tmp_path: Path, chunks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was written after the last snapshot is written again."""
    listing, packing, target = scan(folder), Packing(SIZE, QUALITY), tmp_path / "store"
    target.mkdir()
    state = module._State.start(listing, packing)
    offsets = module._lay_out(listing, state, target, packing)
    for _, task in zip(range(chunks), module._tasks(listing, state, target, offsets, packing), strict=False):
        done = module.pack(task)
        with open(task.path, "ab") as file:
            file.write(b"".join(done.encoded))
        state.take(done, task.files)
    state.save(target, f"{listing.digest} {packing.key}", "jpeg")
    with open(target / "train_images.jpegs", "ab") as file:
        file.write(b"half a chunk")
    (target / f"meta.json.123{module.PARTIAL}").write_bytes(b"{")
    prepare(folder, target, size=SIZE, quality=QUALITY, workers=1)
    assert f"; {min(chunks * CHUNK, 150)} are there already" in capsys.readouterr().out
    assert contents(target) == contents(store)


@pytest.mark.parametrize("damage", ["shorter than noted", "other quality", "other decoder"])
def test_starts_again_where_it_cannot_go_on(
    folder: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    target = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        if damage == "other decoder":
            patch.setattr(packing_module, "decoder", lambda: "Pillow 1.0")
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, target, size=SIZE, quality=20 if damage == "other quality" else QUALITY, workers=1)
    if damage == "shorter than noted":
        os.truncate(target / "train_images.jpegs", 100)
    prepare(folder, target, size=SIZE, quality=QUALITY, workers=1)
    assert contents(target) == contents(store)


def test_an_unfinished_store_of_the_other_kind_is_named(folder: Path, tmp_path: Path) -> None:
    for quality, other, kind in ((QUALITY, None, "JPEG images"), (None, QUALITY, "pixels")):
        target = tmp_path / (kind.split()[0])
        target.mkdir()
        packing = Packing(SIZE, quality)
        listing = scan(folder)
        module._lay_out(listing, module._State.start(listing, packing), target, packing)
        before = contents(target)
        command = f"net.prepare {folder} {target} --format {packing.kind}, with the other flags"
        with pytest.raises(DataError, match=f"holds an unfinished store of {kind}; .*{command}"):
            prepare(folder, target, size=SIZE, quality=other, any_kind=True)
        assert contents(target) == before


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """No file of this process may grow beyond so many bytes: writing one fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills(
    folder: Path,
    store: Path,
    tmp_path: Path,
    full_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What was written stays, and the next run goes on there."""
    target = tmp_path / "store"
    # The reserve is a file, too, and must be smaller than the images here.
    monkeypatch.setattr(module, "_SPARE", 2**12)
    full_disk(int(0.6 * (store / "train_images.jpegs").stat().st_size))
    with pytest.raises(OSError, match="too large") as failed:
        prepare(folder, target, size=SIZE, quality=QUALITY, workers=1)
    assert failed.value.filename == str(target / "train_images.jpegs")
    full_disk(10**9)
    prepare(folder, target, size=SIZE, quality=QUALITY, workers=1)
    assert "; 64 are there already" in capsys.readouterr().out
    assert contents(target) == contents(store)


@pytest.mark.parametrize("snapshot_every", [1e9, 0.0])
def test_a_disk_without_room_for_the_progress(
    folder: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    snapshot_every: float,
) -> None:
    """From the first images on, every write fails, that of the progress included: before a snapshot or in one."""
    target, room = tmp_path / "store", [10**9]
    write_at, atomic_write = module.write_at, module.atomic_write

    def used() -> int:
        return sum(file.stat().st_size for file in target.iterdir())

    def check(path: Path, content: bytes) -> None:
        if used() + len(content) > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def one_write(path: Path, offset: int, content: bytes) -> None:
        check(path, content)
        write_at(path, offset, content)
        room[0] = used()

    @contextlib.contextmanager
    def whole_file(path: Path) -> Iterator[io.BytesIO]:
        content = io.BytesIO()
        yield content
        check(path, content.getvalue())
        with atomic_write(path) as file:
            file.write(content.getvalue())

    with monkeypatch.context() as patch:
        patch.setattr(module, "SNAPSHOT_EVERY", snapshot_every)
        patch.setattr(module, "write_at", one_write)
        patch.setattr(module, "atomic_write", whole_file)
        with pytest.raises(DataError, match="No space left on device; free some space and run the same command again"):
            prepare(folder, target, size=SIZE, quality=QUALITY, workers=1)
    prepare(folder, target, size=SIZE, quality=QUALITY, workers=1)
    assert "; 64 are there already" in capsys.readouterr().out
    assert contents(target) == contents(store)


def test_a_disk_that_fills_with_pixels_is_named(folder: Path, tmp_path: Path, full_disk: Callable[[int], None]) -> None:
    (tmp_path / "a.npy").write_bytes(b"")
    full_disk(1000)
    with pytest.raises(OSError, match="too large") as failed:
        module.pack(module._task(scan(folder), "val", 0, ["val/circle/0000.jpg"], Packing(SIZE), tmp_path / "a.npy", 0))
    assert failed.value.filename == str(tmp_path / "a.npy")


def test_the_room_is_estimated(folder: Path, store: Path) -> None:
    expected = needed_bytes(scan(folder), Packing(SIZE, QUALITY)) - 2**20
    assert expected == pytest.approx(sum(map(len, contents(store).values())), rel=0.1)


def test_another_kind_of_store_is_refused_or_taken(folder: Path, pixels: Path, store: Path) -> None:
    with pytest.raises(DataError, match="24x24 as pixels, not images of 24x24 in JPEG of quality 90; give another"):
        prepare(folder, pixels, size=SIZE, quality=QUALITY)
    with pytest.raises(DataError, match="in JPEG of quality 90, not images of 24x24 in JPEG of quality 80; give"):
        prepare(folder, store, size=SIZE, quality=80)
    with pytest.raises(DataError, match="in JPEG of quality 90, not images of 16x16 as pixels; give another"):
        prepare(folder, store, size=16, any_kind=True)
    # As net.train does with the folder of a store.
    prepare(folder, store, size=SIZE, any_kind=True)


def damaged(path: Path, **arrays: np.ndarray) -> None:
    """Put arrays in place, with right checksums in meta.json."""
    meta = json.loads((path / "meta.json").read_text())
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
        meta["sha256"][f"{name}.npy"] = hashlib.sha256((path / f"{name}.npy").read_bytes()).hexdigest()
    (path / "meta.json").write_text(json.dumps(meta))


def replaced(path: Path, number: int, content: bytes) -> None:
    """Put another file in an image's place, with the index and every checksum right."""
    index = np.load(path / "train_index.npy")
    whole = (path / "train_images.jpegs").read_bytes()
    index[number] = len(whole), len(content)
    (path / "train_images.jpegs").write_bytes(whole + content)
    whole += content
    files = [whole[start : start + length] for start, length in index]
    sums = np.array([checksum(files[first : first + CHUNK]) for first in range(0, len(files), CHUNK)], np.uint64)
    damaged(path, train_index=index, train_checksums=sums)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ((-1, 5), "image 70 should be the 5 from -1 on"),
        ((0, 0), "image 70 should be the 0 from 0 on"),
        ((0, -5), "image 70 should be the -5 from 0 on"),
        ((10**6, 5), "image 70 should be the 5 from 1,000,000 on"),
        ((2**63 - 1, 2**63 - 1), "image 70 should be the 9,223,372,036,854,775,807 from"),
        ((0, 2**63 - 1), "image 70 should be the 9,223,372,036,854,775,807 from 0 on, at most 72,448 of them"),
        ((2**62, 2**62), "image 70 should be the"),
    ],
)
def test_a_hostile_index(copy: Path, row: tuple[int, int], says: str) -> None:
    index = np.load(copy / "train_index.npy")
    index[70] = row
    damaged(copy, train_index=index)
    with pytest.raises(DataError, match=r"train_images\.jpegs has [\d,]+ bytes, and ") as refused:
        open_store(copy)
    assert says in str(refused.value)


def test_images_that_share_their_bytes(copy: Path) -> None:
    """A small file could stand for any number of images."""
    index = np.load(copy / "train_index.npy")
    index[:] = index[index[:, 1].argmax()]
    damaged(copy, train_index=index)
    with pytest.raises(DataError, match=r"train_images\.jpegs has .* fewer than its images take"):
        open_store(copy)


@pytest.mark.parametrize("shape", [(147,), (146, 2), (147, 3)])
def test_an_index_of_another_shape(copy: Path, shape: tuple[int, ...]) -> None:
    damaged(copy, train_index=np.ones(shape, np.int64))
    with pytest.raises(DataError, match=r"train_index\.npy is damaged: it holds int64"):
        open_store(copy)


def jpeg(pixels: Image.Image, **options: Any) -> bytes:
    content = io.BytesIO()
    pixels.save(content, "JPEG", **options)
    return content.getvalue()


WHOLE = jpeg(picture(0, 0, SIZE, SIZE))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no picture", "not a JPEG file"),
        (WHOLE[:-40], "truncated"),
        (WHOLE[:30], "image 70 cannot be decoded"),
        (jpeg(Image.new("RGB", (SIZE, SIZE + 1))), "it is 25x24 RGB and must be 24x24 RGB"),
        (jpeg(Image.new("L", (SIZE, SIZE))), "it is 24x24 L and must be 24x24 RGB"),
        (jpeg(Image.new("CMYK", (SIZE, SIZE))), "it is 24x24 CMYK and must be"),
        # 65,535 x 65,535 in the header: 13 GB of pixels, which are never made.
        (WHOLE.replace(b"\0\x18\0\x18", b"\xff\xff\xff\xff", 1), "it is 65535x65535 RGB and must be"),
    ],
    ids=["text", "cut short", "header alone", "another size", "gray", "CMYK", "bomb"],
)
def test_an_image_that_is_none(copy: Path, content: bytes, says: str) -> None:
    replaced(copy, 70, content)
    data = open_store(copy)
    assert data.train.images[69].shape == (SIZE, SIZE, 3)
    with pytest.raises(DataError, match=r"train_images\.jpegs: image 70 cannot be decoded: ") as refused:
        data.train.images[70]
    assert says in str(refused.value)
    # Whoever asks a loader for batches hears of it.
    with pytest.raises(DataError, match="image 70 cannot be decoded"):
        list(Loader(data.train, 49, CPU, shuffle=False, threads=2))


def test_a_changed_byte_is_noticed(copy: Path) -> None:
    with open(copy / "train_images.jpegs", "r+b") as file:
        file.seek(-30, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(DataError, match=r"train_images\.jpegs is damaged: the checksum of images \d+ to \d+ is wrong"):
        open_store(copy)


@pytest.mark.parametrize("name", ["train_images.jpegs", "val_index.npy"])
def test_a_missing_or_short_file_is_noticed(copy: Path, name: str) -> None:
    os.truncate(copy / name, 100)
    with pytest.raises(DataError, match=name):
        open_store(copy)
    (copy / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing; prepare the images again"):
        open_store(copy)


def test_a_file_that_is_cut_short_while_it_is_open(copy: Path) -> None:
    data = open_store(copy)
    os.truncate(copy / "train_images.jpegs", 1000)
    with pytest.raises(DataError, match=r"train_images\.jpegs has been cut short: image 100 is not all there"):
        data.train.images[100]


def test_a_large_store_is_sampled(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "CHECKED_WHOLE", 0)
    monkeypatch.setattr(store_module, "_SAMPLED_CHUNKS", 1)
    with open(copy / "train_images.jpegs", "r+b") as file:
        file.seek(-30, os.SEEK_END)
        file.write(b"\x55")
    open_store(copy)
    with pytest.raises(DataError, match="is damaged"):
        module.verify(copy)


@pytest.mark.parametrize(
    "damage", [{"jpeg": None}, {"jpeg": {"quality": "high", "decoder": ""}}, {"jpeg": {"quality": 80}}, {"format": 3}]
)
def test_meta_of_wrong_types(copy: Path, damage: dict[str, object]) -> None:
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, **damage}))
    with pytest.raises(DataError, match=r"meta\.json(: format| is damaged)"):
        open_store(copy)


def test_another_decoder_is_said(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_store(store)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(store_module, "decoder", lambda: "Pillow 99, libjpeg-turbo 9")
    data = open_store(store)
    assert data.decoder == f"Pillow 99, libjpeg-turbo 9, quality {QUALITY}"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: {store} was packed with {image.decoder()} and is decoded by Pillow 99, libjpeg-turb")


def test_a_pillow_without_jpeg(
    folder: Path, pixels: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "check", lambda name: False)
    monkeypatch.setattr(module, "decoder", image.decoder.__wrapped__)
    with pytest.raises(DataError, match="this Pillow was built without JPEG support"):
        prepare(folder, tmp_path / "new", size=SIZE, quality=QUALITY)
    assert not (tmp_path / "new").exists()
    assert image.pillow.__wrapped__() == f"Pillow {features.version('pil')} without JPEG"
    monkeypatch.setattr(store_module, "decoder", image.decoder.__wrapped__)
    with pytest.raises(DataError, match="this Pillow was built without JPEG support"):
        open_store(store)
    open_store(pixels)


def test_batches(store: Path) -> None:
    """However they are read and from wherever on."""
    data = open_store(store)
    expected = data.train.images[:]

    def batches(start: int = 0, **options: Any) -> list[tuple[list[int], np.ndarray]]:
        loader = Loader(data.train, 20, CPU, shuffle=True, seed=3, **options)
        loader.load_state_dict({"epoch": start // loader.batches, "batch": start % loader.batches})
        iterator = iter(loader)
        found = []
        for _ in range(start, 10):
            batch = next(iterator)
            found.append((batch.samples.tolist(), batch.images.numpy().copy()))
        iterator.close()
        return found

    whole = batches()
    for samples, images in whole:
        assert np.array_equal(images, expected[samples])
    ways: tuple[dict[str, Any], ...] = ({"threads": 3}, {"cache": "host"}, {"cache": "device", "threads": 2})
    for start, options in ((0, ways[0]), (0, ways[1]), (0, ways[2]), (8, {}), (5, ways[0])):
        for (samples, images), (others, theirs) in zip(batches(start, **options), whole[start:], strict=True):
            assert samples == others
            assert np.array_equal(images, theirs)


@pytest.fixture(scope="module")
def trained(store: Path) -> Path:
    """Six updates on the store."""
    run = store.parent / "run"
    arguments = ["--data-path", store, "--network", "digits", "--image-size", 20, "--batch-size", 16, "--max-steps", 6]
    done = run_here("net.train", *arguments, "--checkpoint-every", 2, "--no-compile", "--output-dir", run)
    assert done.returncode == 0, done.stderr
    return run


def resumed_from(run: Path, target: Path, step: int) -> Path:
    """The run as it was when it had been killed after an update."""
    shutil.copytree(run, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()
    (target / "model.safetensors").unlink()
    return target


def test_a_resumed_training_ends_with_the_same_bits(trained: Path, tmp_path: Path) -> None:
    run = resumed_from(trained, tmp_path / "run", 4)
    done = run_here("net.train", "--resume", run)
    assert done.returncode == 0, done.stderr
    assert "note: this run's images" not in done.stdout
    assert (run / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_a_training_resumed_with_another_decoder_says_so(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resumed_from(trained, tmp_path / "run", 4)
    monkeypatch.setattr(store_module, "decoder", lambda: "Pillow 99, libjpeg-turbo 9")
    done = run_here("net.train", "--resume", run)
    assert done.returncode == 0, done.stderr
    # One note: what packed the store, and whether that is another decoder, does not matter to this run.
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    quality = f"quality {QUALITY}"
    assert (
        f"this run's images were decoded by {image.decoder()}, {quality} and are now decoded by Pillow 99, "
        f"libjpeg-turbo 9, {quality}: " in line
    )
    assert line.endswith("so resuming is not bit-exact")


def test_a_training_resumed_with_another_quality_or_size_says_so(
    trained: Path, pixels: Path, folder: Path, tmp_path: Path
) -> None:
    """And with pixels: their difference from JPEG is not of a few gray levels, and is not called that."""
    worse = packed_here(folder, tmp_path / "worse", Packing(SIZE, 20))
    smaller = packed_here(folder, tmp_path / "smaller", Packing(20, QUALITY))
    for number, (store, says) in enumerate(
        (
            (worse, "quality 20: order"),
            (pixels, "are now stored as pixels: order"),
            (smaller, "this run's images were 24x24 and are now 20x20: "),
        )
    ):
        run = resumed_from(trained, tmp_path / f"run{number}", 4)
        done = run_here("net.train", "--resume", run, "--data-path", store)
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
        assert says in line
        assert "gray levels" not in line


def test_ranks_with_other_decoders_do_not_train_together(store: Path) -> None:
    data = open_store(store)
    config = TrainConfig(data_path=str(store))
    one, other = (identity(config, replace(data, decoder=name), 0) for name in (data.decoder, "Pillow 99"))
    assert {name for name in one if one[name] != other[name]} == {"decoder of the images"}
    # Flags are named as they are typed.
    assert "--hold-out" in one
