"""Pack an image folder into a store: decode in several processes, stream to disk, resume after an interruption."""

import contextlib
import hashlib
import json
import os
import shlex
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import DataError
from ..common.files import PARTIAL, atomic_write, locked
from ..common.printing import on_one_line, printable, size_text
from ..common.progress import Progress, duration
from ..readers.files import read
from ..readers.image import decoder, pillow
from ..readers.store import CHUNK, FORMATS, META, SPLITS, PackedFiles, read_arrays, read_meta
from . import processes
from .folder import Listing, listed
from .images import ImageData, PixelStatistics
from .packing import Done, Packing, Task, pack, start_worker, write_at
from .sampling import check_space, full_disk_named, needed_bytes, note_enlarging, sampled_sizes
from .store import checksum, images_file, is_store, kind_of, largest_jpeg, open_store, small_files

PROGRESS = "progress.npz"
#: A file that reserves the space of the last snapshot, so that it can be written even if the disk fills up.
RESERVE = "progress.reserve"
#: The progress arrays of each split.
_ARRAYS = ("done", "valid", "checksums", "lengths")
#: Seconds between snapshots of the progress, which is the most work that an interruption can lose.
SNAPSHOT_EVERY = 10.0
#: Bytes of the reserve for the headers, and for the skipped files that come until the next snapshot.
_SPARE = 2**20


@dataclass
class _State:
    """The finished work of every split, stored in ``PROGRESS`` until the store is complete.

    ``lengths`` are those of JPEG files; empty for pixels.
    """

    done: dict[str, NDArray[np.bool_]]
    valid: dict[str, NDArray[np.bool_]]
    checksums: dict[str, NDArray[np.uint64]]
    lengths: dict[str, NDArray[np.int64]]
    statistics: PixelStatistics
    enlarged: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def start(cls, listing: Listing, packing: Packing) -> "_State":
        counts = {split: len(listing.files[split]) for split in SPLITS}
        return cls(
            {split: np.zeros(-(-count // CHUNK), bool) for split, count in counts.items()},
            {split: np.zeros(count, bool) for split, count in counts.items()},
            {split: np.zeros(-(-count // CHUNK), np.uint64) for split, count in counts.items()},
            {split: np.zeros(count if packing.quality else 0, np.int64) for split, count in counts.items()},
            PixelStatistics(packing.size),
        )

    def take(self, done: Done, files: list[str]) -> None:
        rows = slice(done.chunk * CHUNK, done.chunk * CHUNK + len(done.reasons))
        self.done[done.split][done.chunk] = True
        self.valid[done.split][rows] = [not reason for reason in done.reasons]
        self.checksums[done.split][done.chunk] = done.checksum
        if done.encoded:
            self.lengths[done.split][rows] = [len(content) for content in done.encoded]
        self.enlarged += done.enlarged
        self.skipped += [(file, reason) for file, reason in zip(files, done.reasons, strict=True) if reason]
        if done.statistics is not None:
            self.statistics.merge(done.statistics)

    def _arrays(self, key: str) -> dict[str, Any]:
        arrays: dict[str, Any] = {
            "key": np.frombuffer(key.encode(), np.uint8),
            "count": np.int64(self.statistics.count),
            "total": self.statistics.total,
            "gram": self.statistics.gram,
            "enlarged": np.int64(self.enlarged),
            "skipped": np.frombuffer(json.dumps(self.skipped).encode(), np.uint8),
        }
        for name in _ARRAYS:
            for split in SPLITS:
                arrays[f"{name}_{split}"] = getattr(self, name)[split]
        return arrays

    def save(self, folder: Path, key: str, kind: str) -> None:
        for split in SPLITS:
            # Data must be on disk before the snapshot says so.
            with open(folder / images_file(split, kind), "r+b") as file:
                os.fsync(file.fileno())
        with atomic_write(folder / PROGRESS) as file:
            np.savez(file, **self._arrays(key))

    def reserve(self, folder: Path) -> None:
        """Take the room that :meth:`save` will need."""
        with atomic_write(folder / RESERVE) as file:
            file.write(bytes(sum(array.nbytes for array in self._arrays("").values()) + _SPARE))

    @classmethod
    def load(cls, folder: Path, key: str, listing: Listing, packing: Packing) -> "_State | None":
        """The snapshot of an interrupted run over the same files; None if there is none."""
        fresh = cls.start(listing, packing)
        parts = {f"{name}_{split}": getattr(fresh, name)[split] for name in _ARRAYS for split in SPLITS}
        expected: dict[str, tuple[type[np.generic], tuple[int, ...] | None]] = {
            "key": (np.uint8, None),
            "skipped": (np.uint8, None),
            "count": (np.int64, ()),
            "enlarged": (np.int64, ()),
            "total": (np.int64, (packing.size, packing.size, 3)),
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
        statistics = PixelStatistics(packing.size)
        statistics.count = int(arrays["count"])
        statistics.total, statistics.gram = arrays["total"], arrays["gram"]
        done, valid, checksums, lengths = ({split: arrays[f"{name}_{split}"] for split in SPLITS} for name in _ARRAYS)
        for split in SPLITS if packing.quality else ():
            path = folder / images_file(split, packing.kind)
            if lengths[split].min() < 0 or not path.is_file() or path.stat().st_size < lengths[split].sum():
                return None
        return cls(done, valid, checksums, lengths, statistics, int(arrays["enlarged"]), skipped)


def _header(path: Path, shape: tuple[int, ...]) -> int:
    """Write the header of a uint8 ``.npy`` file in place and return its length, which is the same for any count."""
    with open(path, "r+b" if path.exists() else "w+b") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return file.tell()


def _lay_out(listing: Listing, state: _State, target: Path, packing: Packing) -> dict[str, int]:
    """Resize the image files to their required length; returns the offset of the images in each."""
    offsets = {}
    for split in SPLITS:
        path, shape = target / images_file(split, packing.kind), (packing.size, packing.size, 3)
        if packing.quality is None:
            count = len(listing.files[split])
            offsets[split] = _header(path, (count, *shape))
            length = offsets[split] + count * int(np.prod(shape))
            if path.stat().st_size < length:
                os.truncate(path, length)
        else:
            # Data written after the last snapshot is written again.
            path.touch()
            offsets[split] = 0
            os.truncate(path, int(state.lengths[split].sum()))
    return offsets


def _task(
    listing: Listing, split: str, chunk: int, files: list[str], packing: Packing, path: Path, offset: int
) -> Task:
    members = [] if listing.members is None else [listing.members[file] for file in files]
    return Task(split, chunk, listing.root, files, members, packing, path, offset)


def _tasks(listing: Listing, state: _State, target: Path, offsets: dict[str, int], packing: Packing) -> Iterator[Task]:
    for split in SPLITS:
        path = target / images_file(split, packing.kind)
        for chunk in np.flatnonzero(~state.done[split]):
            first = int(chunk) * CHUNK
            files = listing.files[split][first : first + CHUNK]
            yield _task(listing, split, int(chunk), files, packing, path, offsets[split] + first * packing.size**2 * 3)


def _without_gaps(valid: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which image takes each slot of the finished store, and the slots whose own image was skipped.

    The last images fill the gaps, so that few images move.
    """
    count = int(valid.sum())
    order, gaps = np.arange(count), np.flatnonzero(~valid[:count])
    order[gaps] = np.flatnonzero(valid[count:]) + count
    return order, gaps


def _finish(listing: Listing, state: _State, target: Path, offsets: dict[str, int], packing: Packing) -> dict[str, int]:
    """Close the gaps that skipped files left, write the small files and finally ``meta.json``."""
    counts, size = {}, packing.size
    for split in SPLITS:
        path = target / images_file(split, packing.kind)
        order, gaps = _without_gaps(state.valid[split])
        count = counts[split] = len(order)
        arrays: dict[str, NDArray[Any]] = {"labels": np.array(listing.labels[split], np.int64)[order]}
        images: NDArray[np.uint8] | PackedFiles
        if packing.quality is None:
            # The moved images also stay in their old place until meta.json is written, so repeating this after an
            # interruption gives the same result.
            mapped = np.memmap(path, np.uint8, "r+", offsets[split], (len(state.valid[split]), size, size, 3))
            for gap in gaps:
                mapped[gap] = mapped[order[gap]]
            mapped.flush()
            images = mapped
            _header(path, (count, size, size, 3))
        else:
            lengths = state.lengths[split]
            arrays["index"] = np.stack([np.cumsum(lengths) - lengths, lengths], 1)[order]
            images = PackedFiles(path, arrays["index"], largest_jpeg(size))
        checksums = arrays["checksums"] = state.checksums[split][: -(-count // CHUNK)].copy()
        for chunk in {*(gaps // CHUNK), *([count // CHUNK] if count % CHUNK else [])}:
            rows = range(chunk * CHUNK, min((chunk + 1) * CHUNK, count))
            checksums[chunk] = checksum(images[row] for row in rows)
        del images
        for name, array in arrays.items():
            with atomic_write(target / f"{split}_{name}.npy") as file:
                np.save(file, array)
    with atomic_write(target / "mean_image.npy") as file:
        np.save(file, state.statistics.mean())
    with atomic_write(target / "skipped.txt") as file:
        for name, reason in sorted(state.skipped):
            # A newline in a name would forge a line. Bytes that are not UTF-8 stay as they are.
            line = f"{on_one_line(name)}\t{on_one_line(reason)}\n"
            file.write(line.encode(errors="surrogateescape"))
    colour = state.statistics.colour()
    meta = {
        "format": FORMATS[packing.kind],
        "image_size": size,
        "counts": counts,
        "skipped": len(state.skipped),
        "classes": list(listing.classes),
        "colour": {"values": colour.values.tolist(), "vectors": colour.vectors.tolist()},
        "source": {"path": str(listing.root.resolve()), "sha256": listing.digest},
        "sha256": {
            name: hashlib.sha256(read(target / name, "store")).hexdigest() for name in small_files(packing.kind)
        },
    }
    if packing.quality is not None:
        meta["jpeg"] = {"quality": packing.quality, "decoder": decoder()}
    with atomic_write(target / META) as file:
        file.write(json.dumps(meta, indent=1).encode())
    if packing.quality is None:
        for split in SPLITS:
            os.truncate(target / images_file(split, "pixels"), offsets[split] + counts[split] * size * size * 3)
    (target / PROGRESS).unlink(missing_ok=True)
    return counts


def _existing(target: Path, listing: Listing, packing: Packing, any_kind: bool) -> bool:
    """Whether ``target`` is already the store of these files.

    Raises:
        DataError: it is something else.
    """
    if is_store(target):
        meta = read_meta(target)
        if meta["source"]["sha256"] != listing.digest:
            raise DataError(
                f"{target} was packed from other files than {listing.root} holds now; give another folder to pack into "
                "(net.train --store), or remove this one"
            )
        there = Packing(meta["image_size"], meta["jpeg"]["quality"] if kind_of(meta) == "jpeg" else None)
        if there != packing and not (any_kind and there.size == packing.size):
            raise DataError(
                f"{target} holds {there}, not {packing}; give another folder to pack into (net.train --store)"
            )
        return True
    if target.is_dir():
        other = "pixels" if packing.kind == "jpeg" else "jpeg"
        if any((target / images_file(split, other)).exists() for split in SPLITS):
            raise DataError(
                f"{target} holds an unfinished store of {'JPEG images' if other == 'jpeg' else 'pixels'}; to finish it "
                f"run python -m net.prepare {shlex.quote(str(listing.root))} {shlex.quote(str(target))} --format "
                f"{other}, with the other flags it was begun with; or remove it"
            )
        files = {images_file(split, packing.kind) for split in SPLITS}
        ours = {PROGRESS, RESERVE, "skipped.txt", *files, *small_files(packing.kind)}
        for path in target.iterdir():
            if path.name.endswith(PARTIAL):
                continue
            if path.name not in ours or path.is_symlink() or not path.is_file():
                raise DataError(f"{target} is not empty ({path.name}); give an empty or a new folder")
    elif target.exists():
        raise DataError(f"{target} is a file; give a folder")
    return False


def prepare(
    source: Path | Listing,
    target: Path,
    *,
    size: int = 256,
    quality: int | None = None,
    any_kind: bool = False,
    val_labels: Path | None = None,
    workers: int | None = None,
) -> None:
    """Pack the images of ``source`` into the store ``target``, or continue where an interrupted run stopped.

    Args:
        source: an image folder or an archive of one, see :func:`net.data.folder.scan`; or what
            :func:`net.data.folder.listed` returned.
        target: the store's folder; new, empty, or left by an interrupted run.
        size: rows and columns of a packed image.
        quality: 1 to 100: store JPEG images of this quality; None stores pixels.
        any_kind: accept a finished store of either kind, JPEG or pixels.
        val_labels: label file of a flat validation folder.
        workers: processes; None for one per core.

    Raises:
        DataError: the folder cannot be used, the disk space is insufficient, no image is readable, or this Pillow has
            no JPEG.
        DataError: the disk fills; the same call continues once there is room.
    """
    if size < 1:
        raise DataError(f"--size must be at least 1; got {size}")
    packing = Packing(size, quality)
    if quality is not None:
        # Raises before anything is written.
        decoder()
    listing = source if isinstance(source, Listing) else listed(source, val_labels)
    if not _existing(target, listing, packing, any_kind):
        needed = needed_bytes(listing, packing)
        check_space(target, needed, packing)
        with locked(target):
            # Another process may have finished it since.
            if not _existing(target, listing, packing, any_kind):
                with full_disk_named(target):
                    _pack_all(listing, target, packing, needed, workers or processes.available_cores())
                return
    print(f"{target} is prepared already")


def _pack_all(listing: Listing, target: Path, packing: Packing, needed: int, workers: int) -> None:
    """The body of :func:`prepare`."""
    total = sum(len(files) for files in listing.files.values())
    key = f"{listing.digest} {packing.key}"
    state = _State.load(target, key, listing, packing)
    if state is None:
        if (target / PROGRESS).exists():
            print(
                f"{listing.root}, how it is to be packed or the decoder (now {pillow()}) has changed since the "
                "interrupted run: starting again"
            )
        state = _State.start(listing, packing)
    offsets = _lay_out(listing, state, target, packing)
    before = sum(
        min(CHUNK, len(listing.files[split]) - int(chunk) * CHUNK)
        for split in SPLITS
        for chunk in np.flatnonzero(state.done[split])
    )
    about = "" if packing.quality is None else "about "
    print(
        f"packing {total:,} images of {len(listing.classes):,} classes from {listing.root} into {target} "
        f"({about}{size_text(needed)})" + (f"; {before:,} are there already" if before else "")
    )
    began = time.monotonic()
    # Scaling takes PyTorch, which takes seconds to import and room; otherwise each worker would import its own.
    sizes = sampled_sizes(listing, packing.size)
    modules = [pack.__module__, *([] if sizes == {(packing.size, packing.size)} else ["torch"])]
    note_enlarging(sizes, packing.size)
    state.reserve(target)
    tasks = _tasks(listing, state, target, offsets, packing)
    written = {split: int(state.lengths[split].sum()) for split in SPLITS}
    # In submission order, which is the order of JPEG images in their file.
    running: deque[tuple[Future[Done], Task]] = deque()

    def take_first() -> None:
        future, task = running.popleft()
        try:
            done = future.result()
            if done.encoded:
                content = b"".join(done.encoded)
                write_at(task.path, written[task.split], content)
                written[task.split] += len(content)
            state.take(done, task.files)
        except BaseException:
            # Without this result, no later one has an offset.
            running.clear()
            raise

    def take_what_is_done() -> None:
        while running and not running[0][0].cancelled() and running[0][0].exception() is None:
            take_first()

    with Progress("images", total, before) as progress, contextlib.ExitStack() as stack:
        pool = stack.enter_context(processes.pool(workers, *modules, start=start_worker))
        # Signals interrupt only the main thread, so a separate thread records each result without interruption.
        taker = stack.enter_context(ThreadPoolExecutor(1))
        saved = time.monotonic()
        try:
            while True:
                # A few tasks are queued per worker, so that memory stays bounded and no worker idles.
                while len(running) < 3 * workers and (task := next(tasks, None)) is not None:
                    running.append((pool.submit(pack, task), task))
                if not running:
                    break
                future, task = running[0]
                future.result()
                taker.submit(take_first).result()
                progress.update(len(task.files))
                if time.monotonic() - saved > SNAPSHOT_EVERY:
                    state.save(target, key, packing.kind)
                    state.reserve(target)
                    saved = time.monotonic()
        except BrokenProcessPool:
            raise DataError("a process decoding images was killed, perhaps for memory: try fewer --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            try:
                taker.submit(take_what_is_done).result()
            finally:
                (target / RESERVE).unlink(missing_ok=True)
                state.save(target, key, packing.kind)
    for split in SPLITS:
        if not state.valid[split].any():
            files = set(listing.files[split])
            file, reason = next(item for item in state.skipped if item[0] in files)
            raise DataError(f"no image for {split} in {listing.root} can be read; {file}: {reason}")
    counts = _finish(listing, state, target, offsets, packing)
    seconds = time.monotonic() - began
    present = set(np.array(listing.labels["train"])[state.valid["train"]])
    for number, name in enumerate(listing.classes):
        if number not in present:
            print(f"warning: no training image of class {name!r} can be read")
    print(
        f"packed {counts['train']:,} training and {counts['val']:,} validation images into {target} in "
        f"{duration(seconds)}, {(total - before) / seconds:,.0f} images/s"
    )
    if state.enlarged:
        print(f"images smaller than {packing.size}x{packing.size}, which were enlarged: {state.enlarged:,}")
    if state.skipped:
        print(f"left out {len(state.skipped):,} files, listed with the reasons in {target / 'skipped.txt'}; the first:")
        for file, reason in sorted(state.skipped)[:5]:
            print(f"  {printable(file)}: {printable(reason)}")


def verify(target: Path) -> ImageData:
    """Compare every byte of a store with its checksums."""
    return open_store(target, whole=True)
