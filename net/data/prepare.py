"""Pack an image folder into a store: decode in several processes, stream to disk, go on after an interruption."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.device import keep_freed_memory
from ..common.errors import DataError
from ..common.files import PARTIAL, atomic_write, locked
from ..common.printing import printable
from ..common.progress import Progress, duration
from ..doors.files import read
from ..doors.image import UnreadableImageError
from ..doors.store import CHUNK, FORMAT, META, SPLITS, read_arrays, read_meta
from . import processes
from .decode import decode
from .folder import Listing, scan
from .images import ImageData, PixelStatistics
from .store import checksum, is_store, open_store, small_files

PROGRESS = "progress.npz"
#: The arrays of the progress that each split has.
_ARRAYS = ("done", "valid", "checksums")
#: Seconds between snapshots of the progress: as much work an interruption can cost.
SNAPSHOT_EVERY = 10.0


@dataclass(frozen=True)
class Task:
    """Consecutive images of a split, one checksum long, and where they go."""

    split: str
    chunk: int
    path: Path
    offset: int
    files: list[str]
    size: int


@dataclass
class _Done:
    """What a worker says of a task: the reason for each file left out (empty for the others), sums, checksum."""

    split: str
    chunk: int
    reasons: list[str]
    statistics: PixelStatistics | None
    checksum: int


def pack(task: Task) -> _Done:
    """Decode a task's files and write the images to their place; a file left out leaves zeros."""
    size = task.size
    images = np.zeros((len(task.files), size, size, 3), np.uint8)
    reasons = []
    for image, file in zip(images, task.files, strict=True):
        try:
            image[:] = decode(Path(file), size)
            reasons.append("")
        except UnreadableImageError as error:
            reasons.append(str(error))
    with open(task.path, "r+b") as target:
        target.seek(task.offset)
        target.write(images.data)
    statistics = None
    if task.split == "train":
        statistics = PixelStatistics(size)
        statistics.add(images[[not reason for reason in reasons]])
    return _Done(task.split, task.chunk, reasons, statistics, checksum(images))


def _start_worker() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()


@dataclass
class _State:
    """What is done, of every split; kept in ``PROGRESS`` while the store is not finished."""

    done: dict[str, NDArray[np.bool_]]
    valid: dict[str, NDArray[np.bool_]]
    checksums: dict[str, NDArray[np.uint64]]
    statistics: PixelStatistics
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def start(cls, listing: Listing, size: int) -> "_State":
        counts = {split: len(listing.files[split]) for split in SPLITS}
        return cls(
            {split: np.zeros(-(-count // CHUNK), bool) for split, count in counts.items()},
            {split: np.zeros(count, bool) for split, count in counts.items()},
            {split: np.zeros(-(-count // CHUNK), np.uint64) for split, count in counts.items()},
            PixelStatistics(size),
        )

    def take(self, done: _Done, files: list[str]) -> None:
        rows = slice(done.chunk * CHUNK, done.chunk * CHUNK + len(done.reasons))
        self.done[done.split][done.chunk] = True
        self.valid[done.split][rows] = [not reason for reason in done.reasons]
        self.checksums[done.split][done.chunk] = done.checksum
        self.skipped += [(file, reason) for file, reason in zip(files, done.reasons, strict=True) if reason]
        if done.statistics is not None:
            self.statistics.merge(done.statistics)

    def save(self, folder: Path, key: str) -> None:
        for split in SPLITS:
            # What the workers wrote must be on the disk before the snapshot says that it is.
            with open(folder / f"{split}_images.npy", "r+b") as file:
                os.fsync(file.fileno())
        arrays: dict[str, Any] = {
            "key": np.frombuffer(key.encode(), np.uint8),
            "count": np.int64(self.statistics.count),
            "total": self.statistics.total,
            "gram": self.statistics.gram,
            "skipped": np.frombuffer(json.dumps(self.skipped).encode(), np.uint8),
        }
        for name in _ARRAYS:
            for split in SPLITS:
                arrays[f"{name}_{split}"] = getattr(self, name)[split]
        with atomic_write(folder / PROGRESS) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, folder: Path, key: str, listing: Listing, size: int) -> "_State | None":
        """The snapshot of an interrupted run over the same files; None when there is none."""
        fresh = cls.start(listing, size)
        parts = {f"{name}_{split}": getattr(fresh, name)[split] for name in _ARRAYS for split in SPLITS}
        expected: dict[str, tuple[type[np.generic], tuple[int, ...] | None]] = {
            "key": (np.uint8, None),
            "skipped": (np.uint8, None),
            "count": (np.int64, ()),
            "total": (np.int64, (size, size, 3)),
            "gram": (np.int64, (3, 3)),
            **{name: (part.dtype.type, part.shape) for name, part in parts.items()},
        }
        try:
            arrays = read_arrays(folder / PROGRESS, expected)
            skipped = [(str(file), str(reason)) for file, reason in json.loads(arrays["skipped"].tobytes())]
        except (DataError, ValueError, TypeError, RecursionError):
            return None
        if arrays["key"].tobytes() != key.encode():
            return None
        statistics = PixelStatistics(size)
        statistics.count = int(arrays["count"])
        statistics.total, statistics.gram = arrays["total"], arrays["gram"]
        done, valid, checksums = ({split: arrays[f"{name}_{split}"] for split in SPLITS} for name in _ARRAYS)
        return cls(done, valid, checksums, statistics, skipped)


def _header(path: Path, shape: tuple[int, ...]) -> int:
    """Write the header of a uint8 ``.npy`` file in place and return its length, which is the same for any count."""
    with open(path, "r+b" if path.exists() else "w+b") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return file.tell()


def needed_bytes(listing: Listing, size: int) -> int:
    """The size of the finished store."""
    count = sum(len(listing.files[split]) for split in SPLITS)
    return count * (size * size * 3 + 8) + size * size * 12 + 2**20


def _check_space(target: Path, listing: Listing, size: int) -> None:
    folder = target
    while not folder.exists():
        folder = folder.parent
    needed = needed_bytes(listing, size)
    have = sum(file.stat().st_blocks * 512 for file in target.glob("*_images.npy")) if target.exists() else 0
    free = shutil.disk_usage(folder).free
    if needed - have > free:
        raise DataError(
            f"the store needs {needed / 1e9:,.1f} GB in {target} and the disk has {free / 1e9:,.1f} GB free; give "
            "another folder or free some space"
        )


def _tasks(listing: Listing, state: _State, target: Path, offsets: dict[str, int], size: int) -> Iterator[Task]:
    for split in SPLITS:
        path = target / f"{split}_images.npy"
        for chunk in np.flatnonzero(~state.done[split]):
            first = int(chunk) * CHUNK
            files = [str(listing.root / file) for file in listing.files[split][first : first + CHUNK]]
            yield Task(split, int(chunk), path, offsets[split] + first * size * size * 3, files, size)


def _finish(listing: Listing, state: _State, target: Path, offsets: dict[str, int], size: int) -> dict[str, int]:
    """Close the gaps that skipped files left, write the small files and at last ``meta.json``."""
    counts = {}
    for split in SPLITS:
        path = target / f"{split}_images.npy"
        valid = state.valid[split]
        count = counts[split] = int(valid.sum())
        labels = np.array(listing.labels[split], np.int64)
        images = np.memmap(path, np.uint8, "r+", offsets[split], (len(valid), size, size, 3))
        # The last images move into the gaps. They stay where they were until meta.json is written, so that doing this
        # twice, after an interruption, gives the same.
        gaps, moved = np.flatnonzero(~valid[:count]), np.flatnonzero(valid[count:]) + count
        for gap, source in zip(gaps, moved, strict=True):
            images[gap] = images[source]
        labels[gaps] = labels[moved]
        checksums = state.checksums[split][: -(-count // CHUNK)].copy()
        for chunk in {*(gaps // CHUNK), *([count // CHUNK] if count % CHUNK else [])}:
            checksums[chunk] = checksum(images[chunk * CHUNK : min((chunk + 1) * CHUNK, count)])
        images.flush()
        del images
        _header(path, (count, size, size, 3))
        for name, array in (("labels", labels[:count]), ("checksums", checksums)):
            with atomic_write(target / f"{split}_{name}.npy") as file:
                np.save(file, array)
    with atomic_write(target / "mean_image.npy") as file:
        np.save(file, state.statistics.mean())
    with atomic_write(target / "skipped.txt") as file:
        for name, reason in sorted(state.skipped):
            # A name may hold a line end, which would forge a line; what is no UTF-8 stays the bytes it is.
            line = f"{_on_one_line(name)}\t{_on_one_line(reason)}\n"
            file.write(line.encode(errors="surrogateescape"))
    colour = state.statistics.colour()
    meta = {
        "format": FORMAT,
        "image_size": size,
        "counts": counts,
        "skipped": len(state.skipped),
        "classes": list(listing.classes),
        "colour": {"values": colour.values.tolist(), "vectors": colour.vectors.tolist()},
        "source": {"path": str(listing.root.resolve()), "sha256": listing.digest},
        "sha256": {name: hashlib.sha256(read(target / name, "store")).hexdigest() for name in small_files()},
    }
    with atomic_write(target / META) as file:
        file.write(json.dumps(meta, indent=1).encode())
    for split in SPLITS:
        os.truncate(target / f"{split}_images.npy", offsets[split] + counts[split] * size * size * 3)
    (target / PROGRESS).unlink(missing_ok=True)
    return counts


def _on_one_line(text: str) -> str:
    return "".join(printable(one) if ord(one) < 128 else one for one in text)


def _existing(target: Path, listing: Listing, size: int) -> bool:
    """Whether ``target`` is already the store of these files.

    Raises:
        DataError: it is something else.
    """
    if is_store(target):
        meta = read_meta(target)
        if meta["source"]["sha256"] != listing.digest:
            raise DataError(
                f"{target} was packed from other files than {listing.root} holds now; remove it or give another folder"
            )
        if meta["image_size"] != size:
            raise DataError(
                f"{target} holds images of {meta['image_size']}x{meta['image_size']}, not {size}x{size}; "
                "remove it or give another folder"
            )
        return True
    if target.is_dir():
        ours = {PROGRESS, "train_images.npy", "val_images.npy", "skipped.txt", *small_files()}
        for path in target.iterdir():
            if path.name.endswith(PARTIAL):
                continue
            if path.name not in ours or path.is_symlink() or not path.is_file():
                raise DataError(f"{target} is not empty ({path.name}); give an empty or a new folder")
    elif target.exists():
        raise DataError(f"{target} is a file; give a folder")
    return False


def prepare(
    source: Path, target: Path, *, size: int = 256, val_labels: Path | None = None, workers: int | None = None
) -> None:
    """Pack the images of ``source`` into the store ``target``, or go on where an interrupted run stopped.

    Args:
        source: an image folder, see :func:`net.data.folder.scan`.
        target: folder of the store; new, empty, or left by an interrupted run.
        size: rows and columns of a packed image.
        val_labels: label file of a flat validation folder.
        workers: processes; None is one for each core.

    Raises:
        DataError: a folder that cannot be used, too little disk space, or no readable image.
    """
    if size < 1:
        raise DataError(f"--size must be at least 1; got {size}")
    print(f"listing the files in {source}", flush=True)
    listing = scan(source, val_labels)
    if not _existing(target, listing, size):
        _check_space(target, listing, size)
        with locked(target):
            # Another process may have finished it since.
            if not _existing(target, listing, size):
                _pack_all(listing, target, size, workers or processes.available_cores())
                return
    print(f"{target} is prepared already")


def _pack_all(listing: Listing, target: Path, size: int, workers: int) -> None:
    """Do the work of :func:`prepare`."""
    total = sum(len(files) for files in listing.files.values())
    key = f"{listing.digest} {size}"
    state = _State.load(target, key, listing, size)
    if state is None:
        if (target / PROGRESS).exists():
            print(f"{listing.root} or --size has changed since the interrupted run: starting again")
        state = _State.start(listing, size)
    offsets = {
        split: _header(target / f"{split}_images.npy", (len(listing.files[split]), size, size, 3)) for split in SPLITS
    }
    for split in SPLITS:
        length = offsets[split] + len(listing.files[split]) * size * size * 3
        if (target / f"{split}_images.npy").stat().st_size < length:
            os.truncate(target / f"{split}_images.npy", length)
    before = sum(
        min(CHUNK, len(listing.files[split]) - int(chunk) * CHUNK)
        for split in SPLITS
        for chunk in np.flatnonzero(state.done[split])
    )
    print(
        f"packing {total:,} images of {len(listing.classes):,} classes from {listing.root} into {target} "
        f"({needed_bytes(listing, size) / 1e9:,.2f} GB)" + (f"; {before:,} are there already" if before else "")
    )
    began = time.monotonic()
    tasks = _tasks(listing, state, target, offsets, size)
    with Progress("images", total, before) as progress, contextlib.ExitStack() as stack:
        pool = stack.enter_context(processes.pool(workers, __name__, _start_worker))
        running: dict[Future[_Done], Task] = {}
        saved = time.monotonic()
        try:
            while True:
                # A few tasks wait for every worker, so that memory stays bounded and nobody idles.
                while len(running) < 3 * workers and (task := next(tasks, None)) is not None:
                    running[pool.submit(pack, task)] = task
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    state.take(future.result(), [os.path.relpath(file, listing.root) for file in task.files])
                    progress.update(len(task.files))
                if time.monotonic() - saved > SNAPSHOT_EVERY:
                    state.save(target, key)
                    saved = time.monotonic()
        except BrokenProcessPool:
            raise DataError("a process decoding images was killed, perhaps for memory: try fewer --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for future, task in running.items():
                if future.done() and not future.cancelled() and future.exception() is None:
                    state.take(future.result(), [os.path.relpath(file, listing.root) for file in task.files])
            state.save(target, key)
    for split in SPLITS:
        if not state.valid[split].any():
            files = set(listing.files[split])
            file, reason = next(item for item in state.skipped if item[0] in files)
            raise DataError(f"no image for {split} in {listing.root} can be read; {file}: {reason}")
    counts = _finish(listing, state, target, offsets, size)
    seconds = time.monotonic() - began
    present = set(np.array(listing.labels["train"])[state.valid["train"]])
    for number, name in enumerate(listing.classes):
        if number not in present:
            print(f"warning: no training image of class {name!r} can be read")
    print(
        f"packed {counts['train']:,} training and {counts['val']:,} validation images into {target} in "
        f"{duration(seconds)}, {(total - before) / seconds:,.0f} images/s"
    )
    if state.skipped:
        print(f"left out {len(state.skipped):,} files, listed with the reasons in {target / 'skipped.txt'}; the first:")
        for file, reason in sorted(state.skipped)[:5]:
            print(f"  {printable(file)}: {printable(reason)}")


def verify(target: Path) -> ImageData:
    """Compare every byte of a store with its checksums."""
    return open_store(target, whole=True)
