"""A small packed store, made in this process to avoid starting workers that import PyTorch."""

import os
from pathlib import Path

from net.data import prepare
from net.data.folder import scan
from net.doors.store import SPLITS
from tests.pictures import picture


def small_store(root: Path, *, train: int = 1, val: int = 1, size: int = 16) -> Path:
    """Pack ``root/images``, with ``train`` and ``val`` images of each of two classes, into ``root/store``."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate("ab"):
            (root / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                picture(label, number, size, size).save(root / "images" / split / name / f"{number}.png")
    target, listing = root / "store", scan(root / "images")
    target.mkdir()
    shapes = {split: (len(listing.files[split]), size, size, 3) for split in SPLITS}
    offsets = {split: prepare._header(target / f"{split}_images.npy", shapes[split]) for split in SPLITS}
    state = prepare._State.start(listing, size)
    for task in prepare._tasks(listing, state, target, offsets, size):
        state.take(prepare.pack(task), [os.path.relpath(file, listing.root) for file in task.files])
    prepare._finish(listing, state, target, offsets, size)
    return target
