"""Packing an image folder, with and without interruptions, and opening the store."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from net.common.errors import DataError
from net.common.files import locked
from net.data import packing as packing_module
from net.data import prepare as module
from net.data.decode import decode
from net.data.folder import Listing, scan
from net.data.images import PixelStatistics
from net.data.packing import Packing
from net.data.prepare import prepare, verify
from net.data.sampling import full_disk_named, needed_bytes
from net.data.store import open_store
from tests.commands import one_line, run_here
from tests.pictures import CLASSES, image_folder, picture
from tests.stores import small_store

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes; a few files are damaged or not images."""
    root = image_folder(tmp_path_factory.mktemp("data") / "images", train=50, val=10)
    (root / "train" / "circle" / "0003.jpg").write_bytes(b"no picture")
    (root / "train" / "cross" / "notes.txt").write_text("nor this")
    whole = (root / "train" / "square" / "0007.jpg").read_bytes()
    (root / "train" / "square" / "0007.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "val" / "cross" / "0001.jpg").write_bytes(b"")
    return root


SKIPPED = [
    "train/circle/0003.jpg",
    "train/cross/notes.txt",
    "train/square/0007.jpg",
    "val/cross/0001.jpg",
]


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    target = folder.parent / "store"
    prepare(folder, target, size=40, workers=2)
    return target


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_holds_every_readable_image_with_its_label(folder: Path, store: Path) -> None:
    data = open_store(store)
    assert data.classes == CLASSES
    assert (len(data.train), len(data.val)) == (3 * 50 - 2, 3 * 10 - 1)
    listing = scan(folder)
    for split, packed in (("train", data.train), ("val", data.val)):
        expected = [
            (decode(folder / file, 40).tobytes(), label)
            for file, label in zip(listing.files[split], listing.labels[split], strict=True)
            if file not in SKIPPED
        ]
        found = [(image.tobytes(), int(label)) for image, label in zip(packed.images, packed.labels, strict=True)]
        assert sorted(found) == sorted(expected)


def test_statistics_are_numpy_s(store: Path) -> None:
    data = open_store(store)
    images = np.asarray(data.train.images).astype(np.float64)
    np.testing.assert_allclose(data.mean, images.mean(0), rtol=1e-6)
    covariance = np.cov(images.reshape(-1, 3).T, bias=True)
    values, vectors = data.colour.values, data.colour.vectors
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, covariance, rtol=1e-9)
    assert (np.diff(values) <= 0).all()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)


def test_skipped_files_are_listed_with_the_reason(store: Path) -> None:
    lines = [line.split("\t") for line in (store / "skipped.txt").read_text().splitlines()]
    assert [file for file, _ in lines] == SKIPPED
    assert all(reason for _, reason in lines)
    assert json.loads((store / "meta.json").read_text())["skipped"] == 4


def test_nothing_but_the_store_is_left(store: Path) -> None:
    assert set(contents(store)) == {
        "meta.json",
        "mean_image.npy",
        "skipped.txt",
        *(f"{split}_{part}.npy" for split in ("train", "val") for part in ("images", "labels", "checksums")),
    }


def test_the_number_of_processes_changes_nothing(folder: Path, store: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "store", size=40, workers=1)
    assert contents(tmp_path / "store") == contents(store)


def test_again_is_instant_and_says_so(folder: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(store)
    prepare(folder, store, size=40)
    assert "prepared already" in capsys.readouterr().out
    assert contents(store) == before


#: prepare with a pause, and a line, after every chunk. Arguments: source, target, seconds between snapshots.
SLOWLY = """
import sys, time
from pathlib import Path
from net.data import packing as packing_module
from net.data import prepare as module

take = module._State.take

def slowly(*arguments):
    take(*arguments)
    print("chunk", flush=True)
    time.sleep(0.3)

if __name__ == "__main__":
    module._State.take = slowly
    module.SNAPSHOT_EVERY = float(sys.argv[3])
    sys.argv = ["prepare", sys.argv[1], sys.argv[2], "--size", "40", "-j", "1"]
    from net import prepare
    from net.common import cli
    cli.run(prepare.main)
"""


def slow_command(folder: Path, target: Path, snapshot_every: float) -> list[str]:
    script = target.parent / "slowly.py"
    script.write_text(SLOWLY)
    return [sys.executable, str(script), str(folder), str(target), str(snapshot_every)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def children(session: int) -> list[str]:
    """Processes of a session that are still running."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # Behind the name, which is in parentheses.
            state, _, _, its, *_ = stat.read_text().rpartition(")")[2].split()
            if int(its) == session and state != "Z":
                found.append(stat.parent.name)
    return found


def test_goes_on_after_being_killed(
    folder: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL to the parent alone, after which its workers exit, and to all; the resumed store is the same."""
    target = tmp_path / "store"
    command = slow_command(folder, target, 0.0)
    progress = target / module.PROGRESS
    for alone in (True, False):
        before = progress.stat().st_mtime_ns if progress.exists() else 0
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
        while (progress.stat().st_mtime_ns if progress.exists() else 0) == before:
            time.sleep(0.01)
            assert process.poll() is None
        assert len(children(process.pid)) > 2
        if alone:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for _ in range(200):
            if not children(process.pid):
                break
            time.sleep(0.05)
        assert children(process.pid) == []
        with pytest.raises(DataError, match="is no finished store"):
            open_store(target)
    prepare(folder, target, size=40, workers=1)
    assert "are there already" in capsys.readouterr().out
    assert contents(target) == contents(store)


def test_a_target_is_for_one_process(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with locked(tmp_path / "store"), pytest.raises(DataError, match="store is in use by another process"):
        prepare(folder, tmp_path / "store", size=16, workers=1)


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_goes_on_after_being_interrupted(
    folder: Path,
    store: Path,
    tmp_path: Path,
    number: signal.Signals,
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Progress is saved although no snapshot is due."""
    target = tmp_path / "store"
    command = slow_command(folder, target, 1e9)
    process = subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests in a shell's background ignore SIGINT, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    while "chunk" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == status
    assert "Traceback" not in errors
    prepare(folder, target, size=40, workers=1)
    assert "are there already" in capsys.readouterr().out
    assert contents(target) == contents(store)


def test_images_are_on_the_disk_before_the_progress_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing, packing = scan(folder), Packing(40)
    state = module._State.start(listing, packing)
    module._lay_out(listing, state, tmp_path, packing)
    synced: list[str] = []

    def noted(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)

    monkeypatch.setattr(os, "fsync", noted)
    state.save(tmp_path, f"{listing.digest} {packing.key}", "pixels")
    assert synced[:2] == ["train_images.npy", "val_images.npy"]
    assert synced[2].startswith(f"{module.PROGRESS}.")


def test_closing_gaps_twice_gives_the_same(folder: Path, store: Path, tmp_path: Path) -> None:
    """Killed after images were moved into the gaps but before meta.json: the next run repeats it."""
    target = tmp_path / "store"

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, target, size=40, workers=2)
    assert not (target / "meta.json").exists()
    prepare(folder, target, size=40, workers=2)
    assert contents(target) == contents(store)


def test_changed_files_start_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = image_folder(tmp_path / "images", train=3, val=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(root, tmp_path / "store", size=16, workers=1)
    picture(0, 99).save(root / "train" / "circle" / "new.jpg")
    prepare(root, tmp_path / "store", size=16, workers=1)
    assert "starting again" in capsys.readouterr().out
    assert len(open_store(tmp_path / "store").train) == 10


def test_pixels_of_another_decoder_are_not_mixed_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing, packing = scan(folder), Packing(16)
    state = module._State.start(listing, packing)
    module._lay_out(listing, state, tmp_path, packing)
    state.save(tmp_path, packing.key, "pixels")
    assert module._State.load(tmp_path, packing.key, listing, packing) is not None
    monkeypatch.setattr(packing_module, "pillow", lambda: "Pillow 99, libjpeg-turbo 9")
    assert module._State.load(tmp_path, packing.key, listing, packing) is None


def test_store_of_other_files_or_size_is_refused(folder: Path, store: Path, tmp_path: Path) -> None:
    other = image_folder(tmp_path / "images", train=2, val=1)
    with pytest.raises(DataError, match="was packed from other files"):
        prepare(other, store, size=40)
    with pytest.raises(DataError, match="holds images of 40x40 as pixels, not images of 48x48 as pixels; give another"):
        prepare(folder, store, size=48)


def test_folder_with_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"is not empty \(thesis\.tex\)"):
        prepare(folder, tmp_path, size=40)
    with pytest.raises(DataError, match="is a file"):
        prepare(folder, tmp_path / "thesis.tex", size=40)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_too_small_a_disk_is_refused_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 10**6))
    with pytest.raises(DataError, match=r"needs 1\.\d MB in .* and the disk has 1\.0 MB free"):
        prepare(folder, tmp_path / "store", size=40)
    assert not (tmp_path / "store").exists()


def test_imagenet_takes_262_gigabytes() -> None:
    """1,281,167 training and 50,000 validation images of 256x256: 244 GiB."""
    files = {"train": [""] * 1_281_167, "val": [""] * 50_000}
    needed = needed_bytes(Listing(Path(), (), files, {}), Packing(256))
    assert needed == pytest.approx(1_331_167 * 256 * 256 * 3, rel=1e-3)
    assert needed / 1e9 == pytest.approx(261.7, abs=0.2)


def test_no_readable_image(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "images" / split / "a").mkdir(parents=True)
        (tmp_path / "images" / split / "a" / "1.jpg").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"no image for train in .* can be read; train/a/1\.jpg: no image in a raster"):
        prepare(tmp_path / "images", tmp_path / "store", size=16, workers=1)


def test_class_without_a_readable_image_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = image_folder(tmp_path / "images", train=2, val=1)
    for file in (root / "train" / "cross").iterdir():
        file.write_bytes(b"junk")
    prepare(root, tmp_path / "store", size=16, workers=1)
    assert "no training image of class 'cross'" in capsys.readouterr().out


def test_file_names_of_any_bytes(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", train=2, val=1)
    odd = os.path.join(os.fsencode(root), b"train", b"circle", b"caf\xe9 \xff.jpg")
    picture(0, 5).save(tmp_path / "x.jpg")
    with open(odd, "wb") as file:
        file.write((tmp_path / "x.jpg").read_bytes())
    bad = os.path.join(os.fsencode(root), b"train", b"circle", b"bad \xff.jpg")
    with open(bad, "wb") as file:
        file.write(b"junk")
    prepare(root, tmp_path / "store", size=16, workers=1)
    assert len(open_store(tmp_path / "store").train) == 7
    assert b"bad \xff.jpg" in (tmp_path / "store" / "skipped.txt").read_bytes()


@pytest.mark.parametrize("name", ["train_labels.npy", "val_checksums.npy", "mean_image.npy", "train_images.npy"])
def test_a_changed_byte_is_noticed(store: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(store, tmp_path / "store")
    with open(copy / name, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DataError, match=name):
        open_store(copy)


@pytest.mark.parametrize("name", ["train_labels.npy", "val_images.npy", "meta.json"])
def test_a_missing_or_short_file_is_noticed(store: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(store, tmp_path / "store")
    os.truncate(copy / name, 100)
    with pytest.raises(DataError, match=name):
        open_store(copy)
    (copy / name).unlink()
    with pytest.raises(DataError, match=name):
        open_store(copy)


def test_meta_of_another_format(store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(store, tmp_path / "store")
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(DataError, match="format 99 is not 1 or 2"):
        open_store(copy)
    (copy / "meta.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(DataError, match="is damaged"):
        open_store(copy)


@pytest.mark.parametrize(
    "damage",
    [
        {"counts": None},
        {"counts": {"train": "many", "val": 3}},
        {"classes": "abc"},
        {"classes": [1]},
        {"image_size": "40"},
        {"colour": {"values": [1], "vectors": []}},
        {"colour": 3},
        {"sha256": []},
        {"source": {}},
    ],
    ids=str,
)
def test_meta_of_wrong_types(store: Path, tmp_path: Path, damage: dict[str, object]) -> None:
    for name in store.iterdir():
        (tmp_path / name.name).symlink_to(name)
    meta = json.loads((store / "meta.json").read_text())
    (tmp_path / "meta.json").unlink()
    (tmp_path / "meta.json").write_text(json.dumps({**meta, **damage}))
    with pytest.raises(DataError, match=r"meta\.json is damaged: "):
        open_store(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps([meta]))
    with pytest.raises(DataError, match=r"meta\.json is damaged: "):
        open_store(tmp_path)


def test_large_stores_are_sampled_and_verified_on_request(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening checks only a few chunks; --verify checks all."""
    copy = shutil.copytree(store, tmp_path / "store")
    monkeypatch.setattr("net.data.store.CHECKED_WHOLE", 0)
    monkeypatch.setattr("net.data.store._SAMPLED_CHUNKS", 1)
    with open(copy / "train_images.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    open_store(copy)
    with pytest.raises(DataError, match="the checksum of images 128 to 147 is wrong"):
        verify(copy)
    verify(store)


def test_verify_command(store: Path, tmp_path: Path) -> None:
    assert "is whole" in run_here("net.prepare", "--verify", store).stdout
    one_line(run_here("net.prepare", "--verify", tmp_path), 1, "is no finished store")


def test_statistics_do_not_depend_on_the_order() -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 300, 300, 3), dtype=np.uint8)
    whole, parts = PixelStatistics(300), PixelStatistics(300)
    whole.add(images)
    for part in (images[7:], images[:3], images[3:7]):
        other = PixelStatistics(300)
        other.add(part)
        parts.merge(other)
    assert (whole.total == parts.total).all()
    assert (whole.gram == parts.gram).all()
    pixels = images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(whole.gram, pixels.T @ pixels, rtol=1e-7)


@pytest.mark.parametrize("before", ["", "import torch"])
def test_packing_loads_pytorch_only_to_scale(tmp_path: Path, before: str) -> None:
    """Importing PyTorch takes two seconds. A worker uses one thread, whatever it was imported with."""
    code = f"""
{before}
import sys
from pathlib import Path
import net.data.prepare
from net.data.packing import Packing, Task, pack, start_worker
start_worker()
Path({str(tmp_path)!r}, "images").write_bytes(bytes(12 * 20 * 20))
for size, loaded in ((12, {bool(before)}), (20, True)):
    task = Task("train", 0, Path({str(tmp_path)!r}), ["1.png"], [], Packing(size), Path({str(tmp_path)!r}, "images"), 0)
    assert pack(task).reasons == [""]
    assert ("torch" in sys.modules) == loaded, size
assert sys.modules["torch"].get_num_threads() == 1
"""
    Image.new("RGB", (12, 12), "red").save(tmp_path / "1.png")
    several = {**environment(), "OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=several)
    assert done.returncode == 0, done.stderr


def squares(root: Path, size: int) -> Path:
    """An image folder of an image for each split."""
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        Image.new("RGB", (size, size), "red").save(root / split / "a" / "1.png")
    return root


@pytest.mark.parametrize(("size", "modules"), [(20, ["net.data.packing"]), (24, ["net.data.packing", "torch"])])
def test_workers_that_scale_share_one_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, modules: list[str]
) -> None:
    """Each would take 140 MB for its own."""
    root, given = squares(tmp_path / "images", 20), []
    pool = module.processes.pool

    def noted(workers: int, *names: str, **options: Any) -> Any:
        given.extend(names)
        return pool(workers, *names, **options)

    monkeypatch.setattr(module.processes, "pool", noted)
    prepare(root, tmp_path / "store", size=size, workers=1)
    assert given == modules


def test_images_that_will_be_enlarged_are_noted_before(tmp_path: Path) -> None:
    root = squares(tmp_path / "images", 20)
    note = "note: the images seem to be 20x20 at most and are enlarged to 24x24; net.prepare --size sets this"
    first, again = (run_here("net.prepare", root, tmp_path / "enlarged", "--size", 24, "-j", 1).stdout for _ in "12")
    assert first.index(note) < first.index("packed 1 training")
    assert note not in again
    assert "enlarged" not in run_here("net.prepare", root, tmp_path / "same", "--size", 20, "-j", 1).stdout


def test_images_of_one_file_in_store(tmp_path: Path) -> None:
    """One image per split, smaller than the packed size, and gray."""
    for split in ("train", "val"):
        (tmp_path / "images" / split / "a").mkdir(parents=True)
        Image.new("L", (5, 4), 77).save(tmp_path / "images" / split / "a" / "1.png")
    prepare(tmp_path / "images", tmp_path / "store", size=16, workers=3)
    data = open_store(tmp_path / "store")
    assert (data.train.images == 77).all()
    assert data.train.images.shape == (1, 16, 16, 3)
    np.testing.assert_allclose(data.colour.values, 0, atol=1e-9)


def test_what_is_said_of_a_folder(tmp_path: Path) -> None:
    """Everything a user may not expect, in a line each, from the command itself."""
    root = image_folder(tmp_path / "images", train=2, val=1)
    picture(0, 0, 20, 30).save(root / "train" / "circle" / "small.jpg")
    (root / "val").rename(root / "test")
    shutil.rmtree(root / "test" / "square")
    done = run_here("net.prepare", root, tmp_path / "store", "--size", 24, "--format", "jpeg", "--quality", 90, "-j", 1)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert f"note: {root} has no folder val, validation or valid: test is used" in lines
    assert f"note: 1 of 3 classes have no image in {root / 'test'}: square" in lines
    assert "images smaller than 24x24, which were enlarged: 1" in lines
    assert json.loads((tmp_path / "store" / "meta.json").read_text())["jpeg"]["quality"] == 90
    done = run_here("net.prepare", root, tmp_path / "store", "--size", 24, "--format", "jpeg", "--quality", 90)
    assert done.stdout.splitlines()[-1] == f"{tmp_path / 'store'} is prepared already"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--quality", "80"), "--quality goes with --format jpeg"),
        (("--format", "jpeg", "--quality", "0"), "--quality must be at least 1; got 0"),
        (("--format", "jpeg", "--quality", "101"), "--quality must be at most 100; got 101"),
        (("--format", "png"), "invalid choice: 'png'"),
    ],
)
def test_flags_that_are_refused(tmp_path: Path, flags: tuple[str, ...], says: str) -> None:
    one_line(run_here("net.prepare", tmp_path, tmp_path / "store", *flags), 2, says)


def test_images_smaller_than_the_network_reads(tmp_path: Path) -> None:
    store = small_store(tmp_path, train=4, val=1, size=16)
    done = run_here("net.train", "--data-path", store, "--network", "digits", "--image-size", 28, "--batch-size", 4)
    one_line(done, 1, "are 16x16, but digits reads 28x28; prepare them with --size 32")


def test_a_full_disk_without_a_file_s_name_is_of_the_store(tmp_path: Path) -> None:
    """Flushing and syncing name none. Other errors stay as they are."""
    said = f"^{tmp_path}: No space left on device; free some space and run the same command again"
    with pytest.raises(DataError, match=said), full_disk_named(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(PermissionError), full_disk_named(tmp_path):
        raise PermissionError(errno.EACCES, "denied")
